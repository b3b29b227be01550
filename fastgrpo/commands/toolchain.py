"""What Triton needs beside a GPU: it compiles a launcher in C for each kind of kernel, at the first launch."""

import os
import shutil
import sysconfig
from pathlib import Path

_COMPILERS = ("gcc", "clang")


def c_compiler() -> str | None:
    """The compiler that Triton takes: that of CC, else the first of gcc and clang; None where there is none."""
    if chosen := os.environ.get("CC"):
        # nothing stands in for it; Triton takes all of it for a program's name, so arguments are none
        return shutil.which(chosen)
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def python_header() -> Path | None:
    """Python.h of this interpreter, None where it is not installed."""
    # Debian's own scheme has another directory, which Triton does not look into
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    path = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    return path if path.is_file() else None


def what_triton_needs() -> dict[str, tuple[str | None, str]]:
    """By name: where each thing is, or None, and how to come by it."""
    version = sysconfig.get_python_version()
    header = python_header()
    return {
        "C compiler": (c_compiler(), "apt install gcc, or set CC to one"),
        "Python.h": (
            str(header) if header else None,
            f"apt install python{version}-dev, or take a Python that brings it",
        ),
    }
