"""`carryall lammps`: inputs as they are written, errors as one line; its examples and its page run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import refused

from carryall import pack
from carryall.cli import lammps as verb
from carryall.cli.main import main
from carryall.models import SuttonChen

pytestmark = pytest.mark.skipif(
    not (find_spec("lammps") and find_spec("mpi4py")), reason="LAMMPS is not installed: pip install 'carryall[lammps]'"
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "lammps"
PAGE = (ROOT / "docs" / "lammps.md").read_text()

SYSTEM = """units metal
lattice fcc 3.9
region all block 0 2 0 2 0 2
create_box 1 all
create_atoms 1 region all
mass 1 63.546
displace_atoms all random 0.1 0.1 0.1 7
"""
POTENTIAL = "pair_style carryall copper.json\npair_coeff * * Cu\n"
ENERGY = 'print "ENERGY $(pe:%.15g) END"\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a potential."""
    (tmp_path / "copper.json").write_text(json.dumps(SuttonChen(("Cu", "Au"), cutoff=4.0).to_dict()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def metals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed potential."""
    return pack(SuttonChen(("Cu", "Au"), cutoff=4.0), tmp_path_factory.mktemp("metals") / "metals.pte", check=False)


def write(text: str, name: str = "in.lmp") -> str:
    Path(name).write_text(text)
    return name


def run(*arguments: str) -> str:
    """LAMMPS' log."""
    assert main(["lammps", *arguments, "--quiet", "--log", "out.log"]) == 0
    return Path("out.log").read_text()


def energies(log: str) -> list[float]:
    return [float(one) for one in re.findall(r"^ENERGY (\S+) END", log, re.MULTILINE)]


def test_loops_conditions_and_included_files_run_as_in_lammps(here):
    write(f"{SYSTEM}include potential.in\n", "start.in")
    write(POTENTIAL.replace("copper.json", "${name}.json"), "potential.in")
    loop = (
        "variable i loop 3\nlabel again\n"
        'if "${i} == 2" then &\n  "jump SELF skip"\nrun 0 post no # as a comment, "with a quote\n'
        f'print """SAYS\nstep $i"""\n{ENERGY}label skip\nnext i\njump SELF again\n'
    )
    log = run(write(f"include start.in\n{loop}clear\n{SYSTEM}{POTENTIAL}run 0\n{ENERGY}"), "--var", "name", "copper")
    assert len(energies(log)) == 3
    assert len(set(energies(log))) == 1
    assert re.findall(r"^step (\d)", log, re.MULTILINE) == ["1", "3"]


def test_a_script_without_potential_gets_the_one_of_the_command(here, capfd):
    expected = energies(run(write(f"{SYSTEM}{POTENTIAL}run 2\n{ENERGY}")))
    assert energies(run(write(f"{SYSTEM}run 2\n{ENERGY}"), "--model", "copper.json", "--elements", "Cu")) == expected
    labelled = f"{SYSTEM}labelmap atom 1 Cu\n"
    assert energies(run(write(f"{labelled}run 2\n{ENERGY}"), "--model", "copper.json")) == expected
    bare = POTENTIAL.replace(" copper.json", "")
    assert energies(run(write(f"{SYSTEM}{bare}run 2\n{ENERGY}"), "--model", "copper.json")) == expected
    again = f"{labelled}{POTENTIAL.replace(' Cu', '')}run 2\n{ENERGY}"
    assert energies(run(write(again))) == expected
    assert "ranks" in capfd.readouterr().out


def test_another_pair_style_takes_the_place_of_the_potential_and_back(here):
    other = "pair_style lj/cut 4.0\npair_coeff * * 0.4 2.3\n"
    log = run(write(f"{SYSTEM}{other}{POTENTIAL}run 0\n{ENERGY}{other}run 0\n{ENERGY}{POTENTIAL}run 0\n{ENERGY}"))
    first, second, third = energies(log)
    assert first == third
    assert second == energies(run(write(f"{SYSTEM}{other}pair_style none\n{other}{POTENTIAL}{other}run 0\n{ENERGY}")))[0]
    assert abs(first - second) > 1


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        (f"{SYSTEM}{POTENTIAL}run 0\n", ["--model", "copper.json"], "in.lmp, line 8: the script names copper.json and another"),
        (f"{SYSTEM}run 0\n", [], "in.lmp has no line `pair_style carryall FILE`"),
        (f"{SYSTEM}pair_style carryall\npair_coeff * * Cu\n", [], "line 8: `pair_style carryall` names no file"),
        (f"{SYSTEM}pair_style carryall a.pte Cu\npair_coeff * *\n", [], "line 8: `pair_style carryall` takes one file"),
        (f"{SYSTEM}{POTENTIAL.replace('* *', '1 1')}", [], "line 9: `pair_coeff 1 1 Cu`: a potential is for all types at once"),
        (f"{SYSTEM}{POTENTIAL.replace('Cu', 'NULL')}", [], "line 9: an atom type without element (NULL)"),
        (f"{SYSTEM}{POTENTIAL}", ["--elements", "Au"], "line 9: the script says Cu and the elements given are Au"),
        (f"{SYSTEM}{POTENTIAL.replace('Cu', 'Ag')}", [], "line 9: the potential does not know 'Ag'"),
        (f"{SYSTEM}{POTENTIAL}rnu 0\n", [], "LAMMPS: ERROR: Unknown command: rnu 0"),
        (f"{POTENTIAL}", [], "line 2: LAMMPS has no box yet"),
        (f"{SYSTEM}variable s string carryall\npair_style $s x\n{POTENTIAL}", [], "where the driver cannot see it"),
        (f"{SYSTEM}{POTENTIAL}run 0\n", ["--var", "x"], "--var takes a name and at least one value"),
        (f"{SYSTEM}{POTENTIAL}run 0\n", ["--engine", "plugin", "--model", "m.pt2"], "--var model FILE in place of --model"),
        (f"{SYSTEM}units lj\n", ["--model", "copper.json"], "none of the commands that need a potential"),
        (f"{SYSTEM}{POTENTIAL.replace('copper', 'absent')}", [], "line 8: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, capfd, text, arguments, expected):
    assert main(["lammps", write(text), *arguments]) == 2
    error = capfd.readouterr().err
    assert expected in error, error
    assert [line.startswith("carryall: error: ") for line in error.splitlines()] == [True]


def test_an_absent_script(here, capsys):
    assert "absent.in: no such file" in refused(["lammps", "absent.in"], capsys)


def test_lammps_arguments_that_the_driver_cannot_take(here):
    from carryall.engines.lammps.run import run_script
    from carryall.errors import InputError

    with pytest.raises(InputError, match="-partition does not go with the driver"):
        run_script(write(f"{SYSTEM}{POTENTIAL}"), lammps_args=["-partition", "2x1"])


class Became(Exception):
    """In place of another program."""


def test_the_plugin_runs_in_lammps_own_program(here, monkeypatch):
    def execve(program, arguments, environment):
        raise Became(program, arguments, environment["LAMMPS_PLUGIN_PATH"])

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(verb, "build_command", lambda check: [sys.executable, "-c", "print('/some/where/carryallplugin.so')"])
    with pytest.raises(Became) as became:
        verb.run([write("run 0\n"), "--engine", "plugin", "--var", "x", "1", "2", "--log", "my.log"])
    program, arguments, folder = became.value.args
    assert program == arguments[0] == sys.executable
    assert arguments[3:] == ["-in", "in.lmp", "-var", "x", "1", "2", "-log", "my.log"]
    assert folder == "/some/where"


def test_a_plugin_that_is_not_built_is_an_error_that_says_so(here, monkeypatch, capsys):
    fails = "import sys; sys.exit('no build fits: carryall build-lammps')"
    monkeypatch.setattr(verb, "build_command", lambda check: [sys.executable, "-c", fails])
    assert "no build fits" in refused(["lammps", write("run 0\n"), "--engine", "plugin"], capsys)


def start(*arguments: str, ranks: int = 1, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the page, on so many ranks."""
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks > 1 else []
    command = [*mpirun, sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_two_ranks_say_what_one_says(here):
    Path("two").mkdir()
    for ranks, folder in ((1, here), (2, here / "two")):
        arguments = ["-m", "carryall", "lammps", str(EXAMPLES / "copper_nvt.in"), "--var", "steps", "20", "--var", "cells", "3"]
        done = start(*arguments, ranks=ranks, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(re.findall(r"^script  ", done.stdout, re.MULTILINE)) == 1
        assert re.search(rf"^ranks +{ranks} *$", done.stdout, re.MULTILINE)
    found = [re.findall(r"energy per atom: (\S+) eV", Path(one, "log.lammps").read_text())[-1] for one in (".", "two")]
    assert found[0] == found[1]


def test_examples_run(here, metals, capfd):
    Path("metals.pte").write_bytes(metals.read_bytes())
    arguments = [str(EXAMPLES / "alloy_npt.in"), "--var", "model", "metals.pte", "--var", "steps", "10"]
    log = run(*arguments)
    assert 13 < float(re.findall(r"^volume per atom: (\S+) ", log, re.MULTILINE)[-1]) < 16
    assert Path("alloy.data").exists()
    code = compile((EXAMPLES / "attach.py").read_text(), "attach.py", "exec")
    exec(code, {"__name__": "__main__"})
    assert "1 rank(s), 52 evaluations" in capfd.readouterr().out


def test_the_page_runs(here, metals):
    Path("metals.pte").write_bytes(metals.read_bytes())
    inputs = re.findall(r"```lammps\n(.*?)```", PAGE, re.DOTALL)
    scripts = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(inputs) == 2
    assert len(scripts) == 2
    for text in inputs:
        log = run(write(text), *(["--model", "metals.pte", "--elements", "Cu"] if "pair_style" not in text else []))
        assert "Loop time" in log
    for text in scripts:
        exec(compile(text, "lammps.md", "exec"), {})
