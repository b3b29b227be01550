"""What this machine is, and what it lacks: ``environment.json`` and ``.md``.  Runs without torch, to say so."""

import json
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.first_contact.steps import STEPS
from benchmarks.first_contact.wheels import unfit

_NAMED = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "numpy")


def main() -> None:
    directory = Path(os.environ["BENCHMARK_RESULTS"])
    found = _gpu() | _host()
    _write(directory, found)
    lines = [f"- {name}: {value}" for name, value in found.items() if name != "versions"]
    (directory / "environment.md").write_text("\n".join([*lines, *_consequences(found)]) + "\n", encoding="utf-8")
    print((directory / "environment.md").read_text(encoding="utf-8"), flush=True)
    # it may hang where a driver does
    found["nvidia_smi"] = _said("nvidia-smi")
    _write(directory, found)
    print(found["nvidia_smi"])


def _write(directory: Path, found: dict[str, Any]) -> None:
    (directory / "environment.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _gpu() -> dict[str, Any]:
    """``gpu`` is its name, or null and ``no_gpu`` the reason."""
    try:
        import torch
    except ImportError as error:
        return {"gpu": None, "no_gpu": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return {"gpu": None, "no_gpu": f"torch {torch.__version__}, built for {built}, sees no GPU"}
    about = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": about.name,
        "no_gpu": None,
        "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": about.multi_processor_count,
        "gpu_bytes": total,
        "gpu_bytes_free": free,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _host() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "cpu": f"{cores} cores of {_processor()}",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_bytes_free": shutil.disk_usage(os.environ["BENCHMARK_RESULTS"]).free,
        "system": platform.platform(),
        "c_compiler": next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None),
        "python_h": str(header) if header.is_file() else None,
        "nvcc": shutil.which("nvcc"),
        "unfit": unfit(sorted({name for step in STEPS for name in step.needs} | {"torch"})),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _NAMED},
    }


def _consequences(found: dict[str, Any]) -> list[str]:
    """What follows from what is missing."""
    lines = []
    if found["gpu"] and not (found["c_compiler"] and found["python_h"]):
        lines.append(
            "- Triton builds its launcher with a C compiler and Python.h at the first launch, and one of them is "
            "missing: no kernel of ours, and nothing that torch.compile made, runs here. Install gcc and python3-dev."
        )
    if found["unfit"]:
        lines.append("- Steps that need a package that is missing are not begun; other versions are tried as they are.")
    return lines


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _said(command: str) -> str:
    try:
        return subprocess.run([command], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {error}"


if __name__ == "__main__":
    main()
