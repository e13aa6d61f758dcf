"""Runs a LAMMPS input that says `pair_style carryall` with the driver, on all ranks of a communicator."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryall.engines.lammps.attach import Attachment, attach
from carryall.engines.lammps.library import mpi, new_lammps
from carryall.engines.lammps.script import PLUGIN, STYLE, Cut, Step, split_script, split_words
from carryall.errors import CarryallError, InputError
from carryall.graph.potential import Potential
from carryall.package.load import load_packed

if TYPE_CHECKING:
    from lammps import lammps

PATIENCE = 2.0
"""Seconds that other ranks leave rank 0 to say what all of them know."""

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

Load = Callable[[str], Potential]


def run_script(
    script: str | Path,
    potential: Potential | str | Path | None = None,
    elements: Sequence[str] | None = None,
    comm: Any = None,
    lammps_args: Sequence[str] = (),
    *,
    load: Load = load_packed,
) -> None:
    """Run a LAMMPS input whose `pair_style carryall FILE` and `pair_coeff * * Cu Au` this process understands; collective.

    `potential` is for a script that names no file (`pair_style carryall` alone, or no such line at all: it is attached before
    the first run); `elements`, the symbol of each atom type, for one that names no elements and has no type labels. `comm` is
    an mpi4py communicator, MPI.COMM_WORLD when None; `lammps_args` are those of LAMMPS' command line. Names of files are opened
    by `load`, on rank 0 first, so that what is compiled is compiled once.

    On one rank errors are raised: InputError for what LAMMPS or the script refuses. On several the first to fail prints its
    error and ends them all with exit code 1. Ctrl-C ends a run after its step, then raises KeyboardInterrupt.
    """
    world = mpi().COMM_WORLD if comm is None else comm
    with _ending_together(world):
        steps = _on_first(world, lambda: _read(Path(script), potential is not None))
        given = load_in_turn(str(potential), load, world) if isinstance(potential, str | Path) else potential
        with _lammps_errors(), _Session(new_lammps(world, _checked(lammps_args)), world, given, elements, load) as session:
            for step in steps:
                session.do(step)


def _read(script: Path, attach_potential: bool) -> list[Step]:
    def read(name: str) -> str | None:
        try:
            return Path(name).read_bytes().decode("utf-8", "surrogateescape")
        except OSError:
            return None

    text = read(str(script))
    if text is None:
        raise InputError(f"{script}: no such file, or it cannot be read")
    return split_script(str(script), text, read, attach=attach_potential)


def _checked(lammps_args: Sequence[str]) -> list[str]:
    """The arguments; InputError for those that would take the script or the ranks out of our hands."""
    for flag in lammps_args:
        if flag in ("-partition", "-p", "-in", "-i", "-mpicolor", "-m", "-reorder", "-ro", "-kokkos", "-k"):
            raise InputError(f"LAMMPS' argument {flag} does not go with the driver; {PLUGIN}")
    return list(lammps_args)


class _Session:
    """A LAMMPS object on its way through a script."""

    def __init__(self, lmp: lammps, comm: Any, potential: Potential | None, elements: Sequence[str] | None, load: Load) -> None:
        self.lmp, self.comm, self.load = lmp, comm, load
        self.given, self.elements = potential, elements
        self.loaded: dict[str, Potential] = {}
        self.chosen: Potential | None = None
        self.attachment: Attachment | None = None

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after the error of one rank, closing would wait for the others
        if kind is None or self.comm.Get_size() == 1:
            self.lmp.close()

    def do(self, step: Step) -> None:
        """Let LAMMPS read a part of the script, or do what the line between two parts says; collective."""
        if not isinstance(step, Cut):
            _read_part(self.lmp, self.comm, step.text)
            return
        try:
            if step.text:  # into LAMMPS' log, which does not see the line
                self.lmp.command("# " + " ".join(step.text.split()))
            self._cut(step)
        except InputError as error:
            raise InputError(f"{step.where}: {error}" if step.text else str(error)) from error

    def _cut(self, cut: Cut) -> None:
        words = split_words(self.lmp.expand(cut.arguments) or "") if cut.arguments else []
        if cut.kind == "style":
            self._detach()
            self.chosen = self._choose(words)
            # so that LAMMPS itself asks for the coefficients when they do not come
            self.lmp.command(f"pair_style zero {self.chosen.spec.cutoff!r} full")
        elif cut.kind == "other style":
            self._detach()
            self.lmp.command(cut.arguments)
        else:
            self._attach(self._elements(words) if cut.kind == "coeff" else self.elements)

    def _attach(self, elements: Sequence[str] | None) -> None:
        potential = self.chosen or self.given
        assert potential is not None
        self._detach()
        self.lmp.command("pair_style none")
        self.attachment = attach(self.lmp, potential, elements)

    def _detach(self) -> None:
        """What a further `pair_style` does to the one before."""
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None

    def _choose(self, words: Sequence[str]) -> Potential:
        if len(words) > 1:
            raise InputError(
                f"`pair_style {STYLE}` takes one file, got {' '.join(words)}: elements go into `pair_coeff * * ...`"
            )
        if self.given is not None:
            if words:
                raise InputError(f"the script names {words[0]} and another potential is given: leave out one of them")
            return self.given
        if not words:
            raise InputError(f"`pair_style {STYLE}` names no file: add one, or give a potential (--model)")
        name = words[0]
        if name not in self.loaded:
            self.loaded[name] = load_in_turn(name, self.load, self.comm)
        return self.loaded[name]

    def _elements(self, words: Sequence[str]) -> Sequence[str] | None:
        if list(words[:2]) != ["*", "*"]:
            raise InputError(
                f"`pair_coeff {' '.join(words)}`: a potential is for all types at once, as in pair_coeff * * Cu Au"
            )
        if "NULL" in words:
            raise InputError("an atom type without element (NULL) belongs to another pair style, which the driver has not")
        if words[2:] and self.elements is not None and list(words[2:]) != list(self.elements):
            raise InputError(f"the script says {' '.join(words[2:])} and the elements given are {' '.join(self.elements)}")
        return list(words[2:]) or self.elements


def load_in_turn(name: str, load: Load, comm: Any) -> Potential:
    """What `load` gives on each rank, rank 0 first: what it compiles into a cache is there for the others; collective."""
    found = _on_first(comm, lambda: load(name), send=False)
    return load(name) if found is None else found


def _on_first(comm: Any, function: Callable[[], Any], *, send: bool = True) -> Any:
    """What the function returns on rank 0, for all ranks or (None elsewhere) for that one; its CarryallError on every rank."""
    found, error = None, None
    if comm.Get_rank() == 0:
        try:
            found = function()
        except CarryallError as raised:
            error = raised
    kind, text, shared = comm.bcast((type(error), str(error), found if send else None) if comm.Get_rank() == 0 else None)
    if error is not None:
        raise error
    if issubclass(kind, CarryallError):
        raise kind(text)
    return shared if send else found


def _read_part(lmp: lammps, comm: Any, text: str) -> None:
    """LAMMPS reads the text on its first rank, from a file: in a string it knows no labels and jumps."""
    if comm.Get_rank():
        lmp.file("part of the script")
        return
    with tempfile.TemporaryDirectory(prefix="carryall-") as folder:
        path = Path(folder) / "part.in"
        # at the end of a file without it, LAMMPS does not take the last line for one
        path.write_bytes((text if text.endswith("\n") else f"{text}\n").encode("utf-8", "surrogateescape"))
        lmp.file(str(path))


@contextmanager
def _lammps_errors() -> Iterator[None]:
    """Errors of LAMMPS, for which it has no class of its own, as InputErrors."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and type(error).__name__ != "MPIAbortException":
            raise
        text = str(error.args[0] if error.args else error).strip()
        if f"'{STYLE}'" in text and "pair style" in text:
            text += f" (it stands where the driver cannot see it, such as in a file that `jump` leads to; {PLUGIN})"
        raise InputError(f"LAMMPS: {text}") from None


@contextmanager
def _ending_together(comm: Any) -> Iterator[None]:
    """What is raised on any of several ranks ends them all; what all ranks know is said by rank 0."""
    try:
        yield
    except BaseException as error:
        if comm.Get_size() == 1 or (isinstance(error, SystemExit) and not error.code):
            raise
        from carryall.exchange.mpi import abort_all

        if comm.Get_rank():
            time.sleep(PATIENCE)
        if isinstance(error, KeyboardInterrupt):
            print("carryall: interrupted", file=sys.stderr, flush=True)
            comm.Abort(INTERRUPTED)
        abort_all(comm, error)
