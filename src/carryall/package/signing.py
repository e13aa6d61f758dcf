"""Who made a packed file: ed25519 signatures of its manifest, in the formats of minisign.

The manifest holds the SHA-256 of every other entry, so a signature of the manifest is one of the file. Keys, secret keys and
signatures are text as minisign writes it, so that its stock tool can make keys for us and check our signatures. The first
signature of a file is `signatures[0]` of its signature.json: saved as manifest.json.minisig beside its manifest.json, it passes

    minisign -Vm manifest.json -p mykey.pub
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carryall.errors import InputError
from carryall.package.archive import rewrite
from carryall.package.manifest import MAX_JSON_BYTES, SIGNATURE, Packed, as_packed, open_packed, parse_json
from carryall.package.minisign import (
    PublicKey,
    Signature,
    as_public_key,
    parse_signature,
    read_secret_key,
    sign_bytes,
    signature_text,
    verify_bytes,
)

VARIABLE = "CARRYALL_TRUSTED_KEYS"
MAX_SIGNATURES = 32


def sign(path: str | Path, key: str | Path, *, passphrase: str | None = None, comment: str | None = None) -> Signature:
    """Verify the file, then add a signature to it, in place of one by the same key; its other entries stay as they are.

    `comment` is signed as well; without one it is the time and the name of the file. InputError for a file that does not
    verify and for a key that cannot be read; MissingDependencyError without `cryptography`.
    """
    path = Path(path)
    secret = read_secret_key(key, passphrase)
    with open_packed(path) as packed:
        packed.check()
        kept = [text for text in _texts(packed) if parse_signature(text, f"{path}: {SIGNATURE}").key_id != secret.key_id]
        made = sign_bytes(packed.manifest, secret, comment or f"timestamp:{int(time.time())}\tfile:{path.name}\thashed")
    if len(kept) >= MAX_SIGNATURES:
        raise InputError(f"{path} has {len(kept)} signatures already, and no more than {MAX_SIGNATURES} are read")
    content = {"format": "minisign", "of": "manifest.json", "signatures": [*kept, signature_text(made)]}
    rewrite(path, {SIGNATURE: json.dumps(content, indent=1).encode()})
    return made


def verify_signature(source: str | Path | Packed, public_keys: Iterable[str | Path | PublicKey]) -> list[Signature]:
    """The signatures of the manifest by any of the keys, verified; InputError when one of theirs is not that of this file.

    The manifest alone is looked at: that the entries are those it lists is for `Packed.check` or the loaders. Signatures by
    other keys are passed over.
    """
    known = {key.key_id: key for key in map(as_public_key, public_keys)}
    with as_packed(source) as packed:
        found = [parse_signature(text, f"{packed.path}: {SIGNATURE}") for text in _texts(packed)]
        ours = [one for one in found if one.key_id in known]
        for one in ours:
            if not verify_bytes(packed.manifest, one, known[one.key_id]):
                raise InputError(
                    f"{packed.path}: the signature by key {one.name} is not one of this file, which was changed after it was "
                    "signed, or the signature is forged: get the file anew from its author"
                )
    return ours


def require_signature(source: str | Path | Packed, public_keys: Iterable[str | Path | PublicKey]) -> list[Signature]:
    """As `verify_signature`, and InputError when no trusted key has signed. Give it the open file that is loaded then."""
    keys = [as_public_key(key) for key in public_keys]
    with as_packed(source) as packed:
        if found := verify_signature(packed, keys):
            return found
        by = ", ".join(parse_signature(text, f"{packed.path}: {SIGNATURE}").name for text in _texts(packed))
        trusted = ", ".join(key.name for key in keys) or "nobody"
        raise InputError(
            f"{packed.path} is {f'signed by {by} only' if by else 'not signed'}, and only files signed by {trusted} are to be "
            "loaded here: add its author's public key to the trusted ones, or sign it yourself (carryall sign)"
        )


def trusted_keys(text: str | None = None) -> list[PublicKey]:
    """Keys out of a list of key files or keys, separated by commas; of the variable CARRYALL_TRUSTED_KEYS without `text`."""
    listed = os.environ.get(VARIABLE, "") if text is None else text
    return [as_public_key(part.strip()) for part in listed.split(",") if part.strip()]


def _texts(packed: Packed) -> list[str]:
    """The signatures of a file, unverified; none when it has no such entry."""
    if SIGNATURE not in packed.archive.records:
        return []
    content: Any = parse_json(packed.archive.read(SIGNATURE, MAX_JSON_BYTES), f"{packed.path}: entry {SIGNATURE}")
    texts = content.get("signatures") if isinstance(content, dict) else None
    if not isinstance(texts, list) or len(texts) > MAX_SIGNATURES or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{packed.path}: {SIGNATURE} holds no list of signatures: sign the file again")
    return texts
