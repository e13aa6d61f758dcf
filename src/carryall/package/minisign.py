"""Keys and signatures of minisign: ed25519, as lines of base64 that its stock tool writes and reads.

After https://jedisct1.github.io/minisign/ (file formats). Needs the package `cryptography` to make and check signatures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryall.errors import InputError, MissingDependencyError

ALGORITHM, PREHASHED, SCRYPT, BLAKE2B, NO_PASSPHRASE = b"Ed", b"ED", b"Sc", b"B2", b"\0\0"
SCRYPT_N, SCRYPT_R = 2**17, 8  # 128 MiB and a third of a second
MAX_SCRYPT_BYTES = 1 << 30  # of minisign's own keys
SECRET = struct.Struct("<2s2s2s32sQQ104s")
COMMENT, TRUSTED = "untrusted comment: ", "trusted comment: "


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with."""

    key_id: bytes
    key: bytes

    @property
    def name(self) -> str:
        """The id as minisign prints it."""
        return self.key_id[::-1].hex().upper()

    @property
    def text(self) -> str:
        """The line of base64 that is the key."""
        return base64.b64encode(ALGORITHM + self.key_id + self.key).decode()


@dataclass(frozen=True)
class SecretKey:
    """A key that signs."""

    key_id: bytes
    seed: bytes
    public: bytes


@dataclass(frozen=True)
class Signature:
    """One signature of a file, as read; it says nothing before it is verified."""

    key_id: bytes
    signature: bytes
    comment: str
    trusted_comment: str
    global_signature: bytes

    @property
    def name(self) -> str:
        """The id of its key as minisign prints it."""
        return self.key_id[::-1].hex().upper()


def generate(path: str | Path, passphrase: str | None = None) -> PublicKey:
    """Write a new key pair, `path` (secret, for its owner only) and `path`.pub; InputError when one of them exists."""
    path = Path(path)
    public_path = path.with_name(path.name + ".pub")
    for one in (path, public_path):
        if one.exists():
            raise InputError(f"{one} exists: a key is never written over another")
    private = _ed25519().Ed25519PrivateKey.generate()
    seed, public = private.private_bytes_raw(), private.public_key().public_bytes_raw()
    key = SecretKey(secrets.token_bytes(8), seed, public)
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(_secret_text(key, passphrase))
    made = PublicKey(key.key_id, public)
    public_path.write_text(f"{COMMENT}minisign public key {made.name}\n{made.text}\n")
    return made


def as_public_key(key: str | Path | PublicKey) -> PublicKey:
    """A key itself (one line of base64), or the file that holds it; InputError for what is neither."""
    if isinstance(key, PublicKey):
        return key
    line = str(key)
    if Path(key).is_file():
        line = _key_line(Path(key))
    raw = _base64(line)
    if raw is None or len(raw) != 42 or raw[:2] != ALGORITHM:
        raise InputError(f"{str(key)[:80]} is neither a public key of minisign nor a file that holds one")
    return PublicKey(raw[2:10], raw[10:])


def sign_bytes(data: bytes, key: SecretKey, trusted_comment: str, comment: str = "signature from carryall") -> Signature:
    """A signature of BLAKE2b-512 of the data, and of the comment with it."""
    if not trusted_comment.isascii() or not trusted_comment.replace("\t", " ").isprintable():
        raise InputError("the comment of a signature is one line of ASCII text")
    private = _ed25519().Ed25519PrivateKey.from_private_bytes(key.seed)
    signature = private.sign(hashlib.blake2b(data, digest_size=64).digest())
    return Signature(key.key_id, signature, comment, trusted_comment, private.sign(signature + trusted_comment.encode()))


def verify_bytes(data: bytes, signature: Signature, key: PublicKey) -> bool:
    """Whether both the data and the comment are what was signed by the key."""
    from cryptography.exceptions import InvalidSignature

    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(key.key)
        public.verify(signature.signature, hashlib.blake2b(data, digest_size=64).digest())
        public.verify(signature.global_signature, signature.signature + signature.trusted_comment.encode())
    except InvalidSignature:
        return False
    return signature.key_id == key.key_id


def signature_text(signature: Signature) -> str:
    """The four lines of a `.minisig` file."""
    first = base64.b64encode(PREHASHED + signature.key_id + signature.signature).decode()
    last = base64.b64encode(signature.global_signature).decode()
    return f"{COMMENT}{signature.comment}\n{first}\n{TRUSTED}{signature.trusted_comment}\n{last}\n"


def parse_signature(text: str, where: object) -> Signature:
    """The inverse of `signature_text`; InputError for other text."""
    lines = text.split("\n")
    if len(lines) == 5 and not lines[4] and lines[0].startswith(COMMENT) and lines[2].startswith(TRUSTED):
        raw, last = _base64(lines[1]), _base64(lines[3])
        if raw and last and len(raw) == 74 and len(last) == 64 and raw[:2] == PREHASHED:
            return Signature(raw[2:10], raw[10:], lines[0].removeprefix(COMMENT), lines[2].removeprefix(TRUSTED), last)
    raise InputError(f"{where} holds no signature of minisign (prehashed): sign the file again")


def read_secret_key(path: str | Path, passphrase: str | None = None) -> SecretKey:
    """A secret key of minisign; InputError when it is none, or when the passphrase is missing or wrong."""
    path = Path(path)
    raw = _base64(_key_line(path))
    if raw is None or len(raw) != SECRET.size:
        raise InputError(f"{path} is no secret key: carryall sign --generate {path.name} makes one")
    algorithm, kdf, checksum, salt, operations, memory, hidden = SECRET.unpack(raw)
    if algorithm != ALGORITHM or checksum != BLAKE2B or kdf not in (SCRYPT, NO_PASSPHRASE):
        raise InputError(f"{path} is a secret key of another kind than ed25519 of minisign")
    if kdf == SCRYPT:
        if passphrase is None:
            raise InputError(f"{path} is protected by a passphrase, and none was given")
        hidden = _mixed(hidden, _scrypt(passphrase, salt, operations, memory))
    key_id, seed, public, check = hidden[:8], hidden[8:40], hidden[40:72], hidden[72:]
    # minisign leaves the checksum of a key without passphrase empty
    if kdf == SCRYPT and not hmac.compare_digest(check, _check(key_id, seed, public)):
        raise InputError(f"{path}: the passphrase is wrong, or the key is damaged")
    if _ed25519().Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        raise InputError(f"{path}: the key is damaged")
    return SecretKey(key_id, seed, public)


def has_passphrase(path: str | Path) -> bool:
    """Whether a passphrase is needed to read the secret key."""
    raw = _base64(_key_line(Path(path)))
    return raw is not None and raw[2:4] == SCRYPT


def _secret_text(key: SecretKey, passphrase: str | None) -> str:
    plain = key.key_id + key.seed + key.public + _check(key.key_id, key.seed, key.public)
    if passphrase is None:
        raw = SECRET.pack(ALGORITHM, NO_PASSPHRASE, BLAKE2B, bytes(32), 0, 0, plain)
    else:
        salt, operations, memory = secrets.token_bytes(32), 4 * SCRYPT_N * SCRYPT_R, 128 * SCRYPT_N * SCRYPT_R
        hidden = _mixed(plain, _scrypt(passphrase, salt, operations, memory))
        raw = SECRET.pack(ALGORITHM, SCRYPT, BLAKE2B, salt, operations, memory, hidden)
    return f"{COMMENT}minisign secret key {key.key_id[::-1].hex().upper()}\n{base64.b64encode(raw).decode()}\n"


def _check(key_id: bytes, seed: bytes, public: bytes) -> bytes:
    return hashlib.blake2b(ALGORITHM + key_id + seed + public, digest_size=32).digest()


def _scrypt(passphrase: str, salt: bytes, operations: int, memory: int) -> bytes:
    """Key stream of a passphrase; N, r and p follow from the limits as in libsodium's `pickparams`."""
    if not 0 < memory <= MAX_SCRYPT_BYTES or operations > 2**27:
        raise InputError("the secret key asks for more memory or time than any key of minisign")
    operations = max(operations, 32768)
    limit = operations // (4 * SCRYPT_R) if operations < memory // 32 else memory // (128 * SCRYPT_R)
    log_n = next(n for n in range(1, 63) if 2**n > limit // 2)
    p = 1 if operations < memory // 32 else min(operations // 4 // 2**log_n, 0x3FFFFFFF) // SCRYPT_R
    return hashlib.scrypt(
        passphrase.encode(), salt=salt, n=2**log_n, r=SCRYPT_R, p=max(p, 1), maxmem=MAX_SCRYPT_BYTES + (1 << 25), dklen=104
    )


def _mixed(data: bytes, stream: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(data, stream, strict=True))


def _key_line(path: Path) -> str:
    """The line of a key file that is no comment; an empty one when there is none."""
    try:
        with path.open("rb") as stream:
            lines = stream.read(10_000).decode("ascii", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"key file {path} cannot be read: {error.strerror}") from None
    return next((line for line in lines if line and not line.startswith(COMMENT)), "")


def _base64(line: str) -> bytes | None:
    try:
        return base64.b64decode(line.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingDependencyError("signatures need the package cryptography: pip install 'carryall[sign]'") from None
    return ed25519
