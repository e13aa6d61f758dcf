"""What a user can mend: an error here is shown as one line, without a traceback, and ends a command with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CarryallError(Exception):
    """Base of every error that carryall raises on purpose; the message says what is wrong, where, and what to do."""


class InputError(CarryallError, ValueError):
    """The input (a file, a structure, a configuration, an argument) cannot be used as it is."""


class MissingDependencyError(CarryallError, ImportError):
    """An optional package or tool is absent; the message names the command that brings it."""


class SemanticsWarning(UserWarning):
    """A model gives other numbers here than in the code that made it; the message says how much, and what changes that."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`, perhaps you meant 'x'` for the known name closest to `name`, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", perhaps you meant {found[0]!r}" if found else ""
