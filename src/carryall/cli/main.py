"""`carryall VERB ...`: finds the verb, runs it, and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import carryall
from carryall.errors import CarryallError, InputError, nearest

VERBS = {
    "demo": "the main job on built-in data: train, pack, verify, relax and MD, report",
    "train": "train a potential from a YAML file; resumes by itself",
    "pack": "checkpoint or source file to a portable .pt2 or .pte",
    "inspect": "spec, sizes, provenance, hashes; runs nothing from the file",
    "rebuild": "a packed file again from the source inside it; runs nothing from the file",
    "convert": "DeePMD model files to carryall's and back",
    "sign": "sign a packed file, or make a key pair",
    "eval": "errors against labels, parity plot",
    "relax": "batched relaxation of any number of files",
    "md": "batched molecular dynamics: NVE, NVT, NPT, NPH",
    "pipeline": "relax, md and analysis over a folder of structures, from a YAML file; one process or torchrun",
    "status": "how far a run of pipeline or relax is",
    "lammps": "run a LAMMPS input with a potential, on one rank or under mpirun",
    "build-lammps": "compile the LAMMPS pair style against the installed wheel",
    "verify": "the same numbers from every engine on this machine, as a table",
}
"""Verb and what it does, in the order of the road; `carryall.cli.VERB`, with _ for -, has `run(argv)`."""

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
EXAMPLES = """examples:
  carryall demo                                   train, pack, run and report, from nothing, in minutes
  carryall md --model water                       MD with the shipped potential
  carryall train config.yaml --n-steps 20000      any key of the file is a flag too
  carryall pack training/best.pt model.pt2
  carryall relax *.cif --model model.pt2 -o out/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted, 1 for a bug of carryall."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [one for one in arguments if one != "--debug"]
    try:
        return _dispatch(arguments)
    except SystemExit as leave:  # the flag parser has printed its own help or error
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say(f"interrupted{_resume_hint(arguments)}")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CarryallError, OSError) as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {_one_line(error)}")
        return USER_ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(f"internal error: {type(error).__name__}: {_one_line(error)} (--debug shows where; please report it)")
        return BUG


def _dispatch(arguments: list[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    if verb in ("-V", "--version", "version"):
        print(f"carryall {carryall.__version__}")
        return 0
    if verb not in VERBS:
        raise InputError(f"unknown verb {verb!r}{nearest(verb, VERBS)} (known: {', '.join(VERBS)})")
    code: int = import_module(f"carryall.cli.{verb.replace('-', '_')}").run(rest)
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"usage: carryall VERB [options]   (carryall {carryall.__version__})", "", "verbs:"]
    lines += [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join([*lines, "", EXAMPLES, "carryall VERB --help shows the options of a verb; --debug shows tracebacks."])


def _resume_hint(arguments: list[str]) -> str:
    if arguments[:1] in (["train"], ["demo"]):
        return ": the same command goes on from the last checkpoint"
    return ": add --resume to go on from the last checkpoint" if arguments[:1] in (["md"], ["relax"], ["pipeline"]) else ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, CarryallError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _say(message: str) -> None:
    print(f"carryall: {message}", file=sys.stderr)
