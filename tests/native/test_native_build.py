"""Compiling on first use: once, whole or not at all, and never in the way of those who have no compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from carryall.native import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CARRYALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CARRYALL_NATIVE", raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources that compile in no time and have every function, none of which does anything."""
    path = tmp_path / "small.cpp"
    names = [*build.SIGNATURES, "carryall_abi"]
    bodies = "".join(f'extern "C" long {name}() {{ return {build.ABI}; }}\n' for name in names)
    path.write_text(bodies)
    monkeypatch.setattr(build, "sources", lambda: [path])
    return path


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


@needs_compiler
def test_compiled_once_and_then_found(small: Path, own_cache: Path) -> None:
    assert isinstance(build.library.__wrapped__(), ctypes.CDLL)
    (made,) = libraries(own_cache)
    before = made.stat().st_mtime_ns
    assert isinstance(build.library.__wrapped__(), ctypes.CDLL)
    assert made.stat().st_mtime_ns == before
    small.write_text(small.read_text() + "// another version\n")
    build.library.__wrapped__()
    assert len(libraries(own_cache)) == 2
    assert {path.suffix for path in own_cache.iterdir()} <= {".so", ".lock"}


@needs_compiler
def test_a_broken_file_in_the_cache_is_made_again(small: Path, own_cache: Path) -> None:
    compiler = build.find_compiler()
    assert compiler is not None
    target = build.built(compiler)
    target.unlink()
    target.write_bytes(b"no library")
    assert build.built(compiler) == target
    assert build.load(target).carryall_abi() == build.ABI


@needs_compiler
@pytest.mark.parametrize("fault", ["another ABI", "a missing function", "no C++"])
def test_what_cannot_be_used_is_said_and_not_kept(
    fault: str, small: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = small.read_text()
    broken = {
        "another ABI": text.replace(f"return {build.ABI};", "return 0;"),
        "a missing function": text.replace("carryall_lists_new", "carryall_lists_knew"),
        "no C++": text + "int main(",
    }
    small.write_text(broken[fault])
    with caplog.at_level(logging.WARNING):
        assert build.library.__wrapped__() is None
    assert len(caplog.records) == 1
    assert "native code is not used" in caplog.text
    assert {"another ABI": "ABI 0", "a missing function": "carryall_lists_new", "no C++": "error"}[fault] in caplog.text
    assert not libraries(own_cache)


@needs_compiler
def test_a_compiler_that_does_not_know_this_processor(
    small: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    picky = tmp_path / "picky"
    picky.write_text(f'#!/bin/sh\ncase "$*" in *-march=native*) exit 1;; esac\nexec {build.find_compiler()} "$@"\n')
    picky.chmod(picky.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(picky))
    assert build.find_compiler() == str(picky)
    assert isinstance(build.library.__wrapped__(), ctypes.CDLL)


def test_no_compiler_is_no_error(own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.library.__wrapped__() is None
    assert not caplog.records
    assert not own_cache.exists()


def test_switched_off(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("CARRYALL_NATIVE", "0")
    assert build.library.__wrapped__() is None
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CARRYALL_CACHE", str(blocked))
    assert build.library.__wrapped__() is None
    assert build.find_compiler() is None or "native code is not used" in caplog.text


def test_importing_compiles_nothing(own_cache: Path) -> None:
    code = "import carryall.graph, carryall.dynamics, carryall.models"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    assert not own_cache.exists()


def test_sources_are_part_of_the_package() -> None:
    names = {path.name for path in build.sources()}
    assert {"common.h", "lists.cpp", "search.cpp", "lennard_jones.cpp", "philox.cpp"} <= names
    abi = next(path for path in build.sources() if path.name == "lists.cpp").read_text()
    assert f"carryall_abi() {{ return {build.ABI}; }}" in abi
