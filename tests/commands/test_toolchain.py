"""What Triton needs to launch a kernel is found where it looks for it, and its lack is told with a remedy."""

import inspect
import shutil
import sysconfig
from pathlib import Path

import pytest
from triton.runtime import build

from fastgrpo.commands.doctor import _backends
from fastgrpo.commands.toolchain import c_compiler, python_header, what_triton_needs


def program(directory: Path, name: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_gcc_is_taken_before_clang_and_what_cc_names_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert c_compiler() is None
    clang = program(tmp_path, "clang")
    assert c_compiler() == str(clang)
    gcc = program(tmp_path, "gcc")
    assert c_compiler() == str(gcc)
    own = program(tmp_path, "mycc")
    monkeypatch.setenv("CC", "mycc")
    assert c_compiler() == str(own)
    # Triton neither takes arguments nor falls back to another one
    monkeypatch.setenv("CC", "mycc -O1")
    assert c_compiler() is None


def test_the_header_is_looked_for_where_triton_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda *, scheme: {"include": str(tmp_path)})
    assert python_header() is None
    (tmp_path / "Python.h").touch()
    assert python_header() == tmp_path / "Python.h"


def test_triton_still_looks_so() -> None:
    """Its own words, which are not an interface: should they change, so has what the doctor tells."""
    source = inspect.getsource(build)
    assert 'os.environ.get("CC")' in source
    assert 'shutil.which("gcc")' in source
    assert '["include"]' in source


def test_the_doctor_says_where_both_are_or_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *, scheme: {"include": str(tmp_path)})
    version = sysconfig.get_python_version()
    cells = dict(zip(*(column._cells for column in _backends().columns[:2]), strict=True))
    assert cells["C compiler"] == "no: apt install gcc, or set CC to one"
    assert cells["Python.h"] == f"no: apt install python{version}-dev, or take a Python that brings it"
    gcc = program(tmp_path, "gcc")
    assert what_triton_needs()["C compiler"][0] == str(gcc) == shutil.which("gcc")
