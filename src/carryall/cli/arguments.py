"""From flags to a frozen configuration, by its types and docstrings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def parse(config: type[Config], verb: str, argv: Sequence[str], default: Config | None = None) -> Config:
    """Flags as a `config`; unknown ones end the program with exit code 2 and the nearest known flag."""
    prog = f"carryall {verb}"
    if default is None:
        return tyro.cli(config, args=list(argv), prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    return tyro.cli(config, args=list(argv), prog=prog, default=default)
