"""Verbs, exit codes, one-line errors."""

import subprocess
import sys

import pytest

from carryall.cli import main as main_module
from carryall.cli.main import VERBS, main


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_a_verb(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"carryall {verb}" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_ase():
    code = (
        "import sys\nfrom carryall.cli.main import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'ase', 'numpy', 'matplotlib', 'tyro', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"carryall: error: unknown verb 'trian', perhaps you meant 'train' (known: {', '.join(VERBS)})\n"
    )


def test_unknown_flag_names_the_nearest(capsys):
    assert main(["md", "--model", "lj-argon", "--temperatur", "10"]) == 2
    error = capsys.readouterr().err
    assert "--temperature" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (RuntimeError("odd\nlines"), 1), (PermissionError(13, "Permission denied", "x"), 2)],
)
def test_exit_codes(error, code, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(main_module, "_dispatch", fail)
    assert main(["train"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert main(["--debug", "train"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_where(capsys):
    assert main(["inspect", "absent.pt2", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
