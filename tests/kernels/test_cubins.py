"""Every kernel compiles on a machine that has no GPU, and what is wrong with a compiled one is told.

`python -m benchmarks.kernels.cubins`, a step of CI, compiles every case, for A100 and B200 too, and disassembles it.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.kernels import cubins
from benchmarks.kernels.case import miniature
from benchmarks.kernels.cases import cases
from benchmarks.kernels.cubins import Compiled, problems
from benchmarks.kernels.sass import Accesses

# the first case of an operator launches all its kernels
PROGRAM = """
import torch
from benchmarks.kernels.case import compiled_size
from benchmarks.kernels.cases import OPS, cases
from benchmarks.kernels.compile_only import compile_only, launched_kernels

torch.set_grad_enabled(False)
with compile_only(90) as launches:
    for op in OPS:
        case = cases(compiled_size, (op,))[0]
        case.variants["triton"].run(case.make(torch.device("cpu"), 0))
assert {launch.kernel for launch in launches} == launched_kernels(), launches
assert all(launch.compiled.asm["cubin"].startswith(b"\\x7fELF") for launch in launches)
"""


def test_every_kernel_compiles_for_an_h100() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root, command = Path(__file__).parents[2], [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "launched_kernels", lambda: {"_ode_step_kernel"})


def compiled(architecture: int, **wrong: Any) -> Compiled:
    """Two programs of 128 threads, each of which loads 2 x 16 bytes and stores 8."""
    right: dict[str, Any] = {"num_spills": 0, "stack_bytes": 0, "is_counted": True, "num_threads": 128}
    right |= {"loads": Accesses({16: 2}), "stores": Accesses({8: 1})}
    case = replace(cases(miniature, ("ode_step",))[0], label="small", read_bytes=8192, written_bytes=2048)
    sass: Any = SimpleNamespace(**{**right, **wrong})
    return Compiled(architecture, case, "_ode_step_kernel", 2, sass)


@pytest.mark.usefixtures("_one_kernel")
def test_kernels_that_move_what_they_must_have_no_problem() -> None:
    assert problems([compiled(architecture) for architecture in (90, 80, 100)]) == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"num_spills": 1}, "_ode_step_kernel spills registers on sm_80 in small"),
        ({"stack_bytes": 8}, "_ode_step_kernel spills registers on sm_80 in small"),
        ({"is_counted": False}, "ode_step small: a loop on sm_80 hides how many bytes it moves"),
        (
            {"loads": Accesses({16: 2, 4: 1})},
            "ode_step small reads 9216 and writes 2048 bytes on sm_80, and must read 8192 and write 2048",
        ),
        (
            {"stores": Accesses({4: 1})},
            "ode_step small reads 8192 and writes 1024 bytes on sm_80, and must read 8192 and write 2048",
        ),
    ],
    ids=["spill", "stack", "loop", "loads", "stores"],
)
@pytest.mark.usefixtures("_one_kernel")
def test_a_kernel_that_is_wrong_is_told(wrong: dict[str, Any], problem: str) -> None:
    assert problems([compiled(90), compiled(80, **wrong), compiled(100)]) == [problem]


@pytest.mark.usefixtures("_one_kernel")
def test_a_kernel_that_no_case_compiles_is_told() -> None:
    missing = "_ode_step_kernel is launched and no case compiles it for sm_100"
    assert problems([compiled(90), compiled(80)]) == [missing]
