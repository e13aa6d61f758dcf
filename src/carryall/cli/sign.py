"""`carryall sign`: make keys, sign packed files, check who signed them."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from carryall.cli.arguments import parse
from carryall.cli.console import console
from carryall.errors import InputError

PASSPHRASE = "CARRYALL_KEY_PASSPHRASE"


@dataclass(frozen=True)
class SignConfig:
    """Sign a packed file, check its signatures, or make a key pair; keys and signatures are those of minisign."""

    path: Positional[Path | None] = None
    """A .pt2 or .pte; left out with --generate."""
    key: Path | None = None
    """Secret key to sign with. Its passphrase, if it has one, is asked for, or taken from CARRYALL_KEY_PASSPHRASE."""
    comment: str | None = None
    """One line that is signed as well; left out: the time and the name of the file."""
    verify: tuple[str, ...] = ()
    """Public keys, or files of them: say which of them signed the file, and fail when none did."""
    generate: Path | None = None
    """Write a key pair: NAME, the secret key, and NAME.pub, to give away."""
    passphrase: bool = False
    """With --generate: protect the secret key by a passphrase."""


def run(argv: Sequence[str]) -> int:
    """The verb."""
    config = parse(SignConfig, "sign", argv)
    if sum((config.generate is not None, config.key is not None, bool(config.verify))) != 1:
        raise InputError("say one of --generate NAME (a new key pair), --key NAME (sign) and --verify NAME.pub (check)")
    if config.generate is not None:
        _generate(config.generate, config.passphrase)
    elif config.path is None:
        raise InputError("which file? carryall sign model.pt2 --key NAME")
    elif config.key is not None:
        _sign(config.path, config.key, config.comment)
    else:
        _verify(config.path, config.verify)
    return 0


def _generate(name: Path, protected: bool) -> None:
    from carryall.package.minisign import generate

    passphrase = _passphrase("new passphrase", twice=True) if protected else None
    public = generate(name, passphrase)
    console().print(
        f"{name}: the secret key {public.name}, keep it to yourself\n{name}.pub: the public key, to give away", markup=False
    )
    console().print(public.text)


def _sign(path: Path, key: Path, comment: str | None) -> None:
    from carryall.package.minisign import has_passphrase
    from carryall.package.signing import sign

    passphrase = _passphrase(f"passphrase of {key}") if has_passphrase(key) else None
    made = sign(path, key, passphrase=passphrase, comment=comment)
    console().print(f"{path}: signed by {made.name} ({made.trusted_comment})", markup=False)


def _verify(path: Path, keys: tuple[str, ...]) -> None:
    from carryall.package.manifest import open_packed
    from carryall.package.signing import require_signature

    with open_packed(path) as packed:
        packed.check()
        for one in require_signature(packed, keys):
            console().print(f"{path}: whole, and signed by {one.name} ({one.trusted_comment})", markup=False)


def _passphrase(prompt: str, twice: bool = False) -> str:
    if found := os.environ.get(PASSPHRASE):
        return found
    if not sys.stdin.isatty():
        raise InputError(f"the key needs a passphrase: set {PASSPHRASE}, or run this in a terminal")
    first = getpass.getpass(f"{prompt}: ")
    if twice and getpass.getpass("once more: ") != first:
        raise InputError("the two passphrases differ")
    return first
