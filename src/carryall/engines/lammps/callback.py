"""What LAMMPS calls in each step, and how a fault in it ends the run: never one more step with forces that are not right.

An exception that leaves a ctypes callback is only printed. Here the callback notes it and, on one rank, a C++ frame throws
what LAMMPS itself throws, so that the command ends as by any error of LAMMPS. Several ranks are ended together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from carryall.engines.lammps.atoms import fill_with_nan
from carryall.engines.lammps.capi import LammpsFunctions
from carryall.engines.lammps.step import Evaluator
from carryall.errors import CarryallError
from carryall.native import library

_THROWING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 3)
_PLAIN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 3)


class _Caller(ctypes.Structure):
    """`CarryallCaller` of native/lammps_edges.cpp."""

    _fields_ = (("call", _THROWING), ("message", ctypes.c_char_p))


class Callback:
    """Runs an evaluator inside fix external; has to live as long as LAMMPS may call it."""

    def __init__(self, evaluator: Evaluator, functions: LammpsFunctions, abort: Callable[[BaseException], Any] | None) -> None:
        """`abort` ends all ranks; None where there is only one."""
        self.failure: BaseException | None = None
        """What went wrong in a step that has not been raised yet."""
        self._evaluator, self._functions, self._abort = evaluator, functions, abort
        native = library()
        if native is None:
            self._plain = _PLAIN(self._without_native)
            # LAMMPS refuses a null pointer for the argument, which is not used
            self.address = self.argument = _address(self._plain)
        else:
            self._caller = _Caller(_THROWING(self._call), b"")
            self.address, self.argument = _address(native.carryall_lammps_callback), ctypes.addressof(self._caller)

    def _call(self, step: int, n_local: int, ids: int, x: int, forces: int) -> int:
        try:
            self._evaluator.evaluate(step, n_local, ids, x, forces)
        except BaseException as error:
            self.failure = in_step(error, step)
            if self._abort is not None:
                self._abort(self.failure)
            self._caller.message = f"{type(self.failure).__name__}: {self.failure}".encode()
            return 1
        return 0

    def _without_native(self, argument: int, step: int, n_local: int, ids: int, x: int, forces: int) -> None:
        """Nothing can be thrown: the run ends after this step, whose forces are no numbers; later ones evaluate nothing."""
        try:
            if self.failure is not None:
                raise self.failure
            self._evaluator.evaluate(step, n_local, ids, x, forces)
        except BaseException as error:
            if self.failure is None:
                self.failure = in_step(error, step)
            if self._abort is not None:
                self._abort(self.failure)
            fill_with_nan(n_local, forces)
            self._functions.stop()


def in_step(error: BaseException, step: int) -> BaseException:
    """The error with the step in its message."""
    if isinstance(error, CarryallError):
        return type(error)(f"step {step}: {error}").with_traceback(error.__traceback__)
    error.add_note(f"in the forces of step {step}")
    return error


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found
