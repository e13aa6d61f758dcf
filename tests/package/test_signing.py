"""Signatures hold for the file that was signed and for no other; keys and signatures are those of minisign."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from carryall.cli.sign import run as sign_verb
from carryall.errors import InputError, MissingDependencyError
from carryall.package import minisign
from carryall.package.archive import rewrite
from carryall.package.manifest import (
    MANIFEST,
    METADATA,
    SIGNATURE,
    append_facts,
    open_archive,
    open_packed,
    read_entry,
    read_json,
    seal,
    verify,
)
from carryall.package.minisign import (
    as_public_key,
    generate,
    has_passphrase,
    parse_signature,
    read_secret_key,
    sign_bytes,
    signature_text,
    verify_bytes,
)
from carryall.package.signing import require_signature, sign, trusted_keys, verify_signature

pytest.importorskip("cryptography")
MINISIGN = shutil.which("minisign")

# made by minisign 0.11: a key pair without passphrase, and its signature of b"carryall\n"
STOCK_SECRET = (
    "RWQAAEIyAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAcbGWlV3Lhyy55dnfbg5m8Ch9ygMUTwF8V8QzQN"
    "pDt3CGZ88QR0qdegFJ+MUj/064B4D/LRtPXCAQblUY5NoUuLtJlKw3fu9tAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
)
STOCK_PUBLIC = "RWRxsZaVXcuHLAFJ+MUj/064B4D/LRtPXCAQblUY5NoUuLtJlKw3fu9t"
STOCK_SIGNATURE = """untrusted comment: signature from minisign secret key
RURxsZaVXcuHLGI+JgA7aXkt0Te+QX/2EvcaA7f7wDPM7gly7EoJkdyqqRMy/fijDUIikpftRxL2DqPs9TtaurhyyaRULMA3Jw0=
trusted comment: made for a test
rAVmTfY21WY996zLM+Hi3bBeAi2uZnRlZY5kgfSuPNRlQMk+zwLk1RmPNjMFzWc6X3HfzYJ1SteYcgdPSL8JCQ==
"""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "model.pte"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
    append_facts(path, {"cutoff": 4.0}, "{}", {})
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate(tmp_path / "mykey")
    return tmp_path / "mykey"


def public(key: Path) -> Path:
    return key.with_name(key.name + ".pub")


def test_a_signed_file_is_the_same_file(packed: Path, key: Path) -> None:
    with open_archive(packed) as archive:
        before = {name: archive.read(name) for name in archive.namelist()}
    made = sign(packed, key, comment="for everybody")
    with open_archive(packed) as archive:
        after = {name: archive.read(name) for name in archive.namelist()}
    assert after.pop(SIGNATURE)
    assert after == before
    assert verify(packed) == {"cutoff": 4.0}
    (found,) = require_signature(packed, [public(key)])
    assert found == made
    assert (found.trusted_comment, found.name) == ("for everybody", as_public_key(public(key)).name)
    assert public(key).read_text().startswith(f"untrusted comment: minisign public key {found.name}\n")


def test_the_comment_says_when_and_what_by_itself(packed: Path, key: Path) -> None:
    assert "\tfile:model.pte\t" in sign(packed, key).trusted_comment
    for comment in ("two\nlines", "\x1b[2J", "é"):
        with pytest.raises(InputError, match="one line of ASCII text"):
            sign(packed, key, comment=comment)


def test_signing_again_replaces_and_others_are_kept(packed: Path, key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    generate(other)
    sign(packed, key, comment="one")
    sign(packed, other, comment="two")
    sign(packed, key, comment="three")
    assert [one.trusted_comment for one in verify_signature(packed, [public(key), public(other)])] == ["two", "three"]
    assert [one.trusted_comment for one in verify_signature(packed, [public(other)])] == ["two"]


def test_files_that_no_trusted_key_has_signed(packed: Path, key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    generate(other)
    assert verify_signature(packed, [public(key)]) == []
    with pytest.raises(InputError, match=r"model\.pte is not signed, and only files signed by [0-9A-F]{16} are to be loaded"):
        require_signature(packed, [public(key)])
    name = sign(packed, other).name
    with pytest.raises(InputError, match=rf"model\.pte is signed by {name} only"):
        require_signature(packed, [public(key)])
    with pytest.raises(InputError, match="only files signed by nobody"):
        require_signature(packed, [])


def test_a_signature_of_another_file_is_no_signature(packed: Path, key: Path, tmp_path: Path) -> None:
    """As when the file is changed, sealed anew, and the old signature is put back."""
    sign(packed, key)
    forged = Path(shutil.copyfile(packed, tmp_path / "forged.pte"))
    rewrite(forged, {METADATA: b'{"cutoff": 5.0}'})
    with pytest.raises(InputError, match="does not match the manifest"):
        verify(forged)
    seal(forged)
    with pytest.raises(InputError, match="is not signed"):
        require_signature(forged, [public(key)])
    rewrite(forged, {SIGNATURE: read_entry(packed, SIGNATURE)})
    assert verify(forged) == {"cutoff": 5.0}
    for function in (verify_signature, require_signature):
        with pytest.raises(InputError, match=r"forged\.pte: the signature by key [0-9A-F]{16} is not one of this file"):
            function(forged, [public(key)])


@pytest.mark.parametrize("line", range(4))
def test_every_line_of_a_signature_counts(packed: Path, key: Path, line: int) -> None:
    """But the first, which says that it does not."""
    sign(packed, key, comment="for everybody")
    content = read_json(packed, SIGNATURE)
    lines = content["signatures"][0].split("\n")
    place = 40
    lines[line] = lines[line][:place] + ("A" if lines[line][place : place + 1] != "A" else "B") + lines[line][place + 1 :]
    content["signatures"][0] = "\n".join(lines)
    rewrite(packed, {SIGNATURE: json.dumps(content).encode()})
    if line == 0:
        assert require_signature(packed, [public(key)])
    else:
        with pytest.raises(InputError, match="is not one of this file"):
            require_signature(packed, [public(key)])


def test_a_key_of_the_same_id_is_another_key(packed: Path, key: Path, tmp_path: Path) -> None:
    """The id is public and anyone may take it."""
    mine = read_secret_key(key)
    generate(tmp_path / "other")
    other = read_secret_key(tmp_path / "other")
    posing = minisign.SecretKey(mine.key_id, other.seed, other.public)
    made = sign_bytes(b"data", posing, "x")
    assert not verify_bytes(b"data", made, as_public_key(public(key)))
    assert verify_bytes(b"data", made, minisign.PublicKey(mine.key_id, other.public))
    assert not verify_bytes(b"other", made, minisign.PublicKey(mine.key_id, other.public))


def test_a_file_that_does_not_verify_is_not_signed(packed: Path, key: Path) -> None:
    rewrite(packed, {METADATA: read_entry(packed, METADATA).replace(b"4.0", b"5.0")})
    with pytest.raises(InputError, match="does not match the manifest"):
        sign(packed, key)


def test_signature_and_contents_by_one_handle(packed: Path, key: Path, tmp_path: Path) -> None:
    sign(packed, key)
    unsigned = Path(shutil.copyfile(packed, tmp_path / "unsigned.pte"))
    rewrite(unsigned, {METADATA: b'{"cutoff": 9.0}'})
    seal(unsigned)
    with open_packed(packed) as opened:
        assert require_signature(opened, [public(key)])
        unsigned.replace(packed)
        assert opened.check() == {"cutoff": 4.0}
    with pytest.raises(InputError, match="is not signed"):
        require_signature(packed, [public(key)])


SIGNATURES = {
    "not JSON": b"{",
    "a list": b"[]",
    "nothing": b"{}",
    "numbers": b'{"signatures": [1]}',
    "text": b'{"signatures": "x"}',
    "many": json.dumps({"signatures": ["x"] * 33}).encode(),
    "no signature": b'{"signatures": ["x"]}',
    "four lines": b'{"signatures": ["untrusted comment: \\nAA\\ntrusted comment: \\nAA\\n"]}',
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signatures_that_are_none(case: str, packed: Path, key: Path) -> None:
    rewrite(packed, {SIGNATURE: SIGNATURES[case]})
    with pytest.raises(InputError, match=r"model\.pte.*signature\.json"):
        require_signature(packed, [public(key)])


# --- keys ---


def test_keys_are_for_their_owner_and_never_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    for removed in (key, public(key)):
        removed.unlink()
        with pytest.raises(InputError, match="exists: a key is never written over another"):
            generate(key)
        removed.write_text("x")


def test_a_passphrase_protects_the_key(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minisign, "SCRYPT_N", 2**12)
    key = tmp_path / "guarded"
    generate(key, "correct horse")
    assert has_passphrase(key)
    assert sign(packed, key, passphrase="correct horse").name == require_signature(packed, [public(key)])[0].name
    for passphrase, message in (("wrong", "passphrase is wrong"), (None, "is protected by a passphrase, and none was given")):
        with pytest.raises(InputError, match=message):
            sign(packed, key, passphrase=passphrase)


KEYS = {
    "absent": (None, "cannot be read: No such file"),
    "empty": ("", "is no secret key"),
    "text": ("hello\n", "is no secret key"),
    "a public key": (f"untrusted comment: x\n{STOCK_PUBLIC}\n", "is no secret key"),
    "damaged": (f"untrusted comment: x\n{STOCK_SECRET[:100]}x{STOCK_SECRET[101:]}\n", "the key is damaged"),
    "another kind": (f"untrusted comment: x\nAA{STOCK_SECRET[2:]}\n", "of another kind"),
}


@pytest.mark.parametrize("case", KEYS)
def test_secret_keys_that_are_none(case: str, packed: Path, tmp_path: Path) -> None:
    content, message = KEYS[case]
    if content is not None:
        (tmp_path / "bad").write_text(content)
    with pytest.raises(InputError, match=message):
        sign(packed, tmp_path / "bad")


def test_a_key_that_asks_for_all_memory(packed: Path, key: Path) -> None:
    raw = minisign.SECRET.pack(b"Ed", b"Sc", b"B2", bytes(32), 2**40, 2**40, bytes(104))
    key.write_text("untrusted comment: x\n" + minisign.base64.b64encode(raw).decode())
    with pytest.raises(InputError, match="more memory or time than any key of minisign"):
        sign(packed, key, passphrase="x")


def test_trusted_keys_of_a_list(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_public_key(public(key)).text
    assert trusted_keys(f"{text}, {public(key)},") == [as_public_key(text), as_public_key(public(key))]
    assert as_public_key(text) == as_public_key(public(key))
    monkeypatch.setenv("CARRYALL_TRUSTED_KEYS", text)
    assert trusted_keys() == [as_public_key(text)]
    monkeypatch.delenv("CARRYALL_TRUSTED_KEYS")
    assert trusted_keys() == []
    for wrong in ("nonsense", STOCK_SECRET, str(key)):
        with pytest.raises(InputError, match="is neither a public key of minisign nor a file that holds one"):
            trusted_keys(wrong)


# --- minisign itself ---


def test_keys_and_signatures_of_the_stock_tool(tmp_path: Path) -> None:
    (tmp_path / "stock").write_text(f"untrusted comment: minisign encrypted secret key\n{STOCK_SECRET}\n")
    secret, public_key = read_secret_key(tmp_path / "stock"), as_public_key(STOCK_PUBLIC)
    assert (secret.key_id, secret.public) == (public_key.key_id, public_key.key)
    found = parse_signature(STOCK_SIGNATURE, "x")
    assert verify_bytes(b"carryall\n", found, public_key)
    assert not verify_bytes(b"carryall", found, public_key)
    # ed25519 is deterministic: the same key, data and comments make the same signature
    assert signature_text(sign_bytes(b"carryall\n", secret, found.trusted_comment, found.comment)) == STOCK_SIGNATURE


@pytest.mark.skipif(MINISIGN is None, reason="minisign is not installed")
def test_the_stock_tool_checks_our_signatures(packed: Path, key: Path, tmp_path: Path) -> None:
    sign(packed, key)
    data = tmp_path / "manifest.json"
    data.write_bytes(read_entry(packed, MANIFEST))
    data.with_name("manifest.json.minisig").write_text(read_json(packed, SIGNATURE)["signatures"][0])
    command = [str(MINISIGN), "-V", "-m", str(data), "-p", str(public(key))]
    assert "comment signature verified" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    data.write_bytes(b"other")
    assert subprocess.run(command, capture_output=True, check=False).returncode


# --- the verb ---


def test_the_verb(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "k"
    assert sign_verb(["--generate", str(key)]) == 0
    assert sign_verb([str(packed), "--key", str(key), "--comment", "hello [red]you[/red]"]) == 0
    assert sign_verb([str(packed), "--verify", str(public(key))]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    assert as_public_key(public(key)).text in out
    assert "hello [red]you[/red]" in out
    assert "whole, and signed by" in out


@pytest.mark.parametrize("argv", [[], ["--key", "x"], ["m.pte", "--key", "x", "--generate", "y"], ["m.pte"]])
def test_the_verb_says_what_is_missing(argv: list[str]) -> None:
    with pytest.raises(InputError, match="--key"):
        sign_verb(argv)


def test_the_verb_takes_a_passphrase_from_the_environment(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minisign, "SCRYPT_N", 2**12)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(InputError, match="set CARRYALL_KEY_PASSPHRASE"):
        sign_verb(["--generate", str(tmp_path / "k"), "--passphrase"])
    monkeypatch.setenv("CARRYALL_KEY_PASSPHRASE", "secret")
    assert sign_verb(["--generate", str(tmp_path / "k"), "--passphrase"]) == 0
    assert has_passphrase(tmp_path / "k")
    assert sign_verb([str(packed), "--key", str(tmp_path / "k")]) == 0


def test_without_cryptography(packed: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'carryall\[sign\]'"):
        sign(packed, key)
    assert verify(packed) == {"cutoff": 4.0}
