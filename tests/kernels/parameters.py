"""Devices, dtypes and combinations over which the kernel tests run."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest
import torch

# of a public function, which takes the reference on a CPU and the kernel on a GPU
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# of a kernel: Triton's interpreter truncates float32 to bfloat16, a GPU rounds
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# on a CPU the graph is only traced: inductor's C++ compiler takes 20 seconds to begin
BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"
# of opcheck: the last traces forward and backward with symbolic shapes, which takes seconds
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*QUICK_CHECKS, "test_aot_dispatch_dynamic")


def covering(*factors: Sequence[Any], together: int = 2) -> list[Any]:
    """The product of the factors for a GPU; for the interpreter a part that has any so many values ``together``.

    Earlier combinations are preferred, so a size that computes nothing comes last in its factor.
    """
    cases = [_combined(values) for values in product(*factors)]
    here = [case for case in cases if not case.marks]
    missing = {choice for case in here for choice in _choices(case, together)}
    chosen: list[Any] = []
    while missing:
        chosen.append(max(here, key=lambda case: len(missing & _choices(case, together))))
        missing -= _choices(chosen[-1], together)
    return [case if case in chosen else pytest.param(*case.values, marks=pytest.mark.gpu) for case in cases]


def _combined(values: Sequence[Any]) -> Any:
    """One parameter of several, which needs what any of them needs."""
    marks = [mark for value in values for mark in getattr(value, "marks", ())]
    return pytest.param(*(value.values[0] if hasattr(value, "marks") else value for value in values), marks=marks)


def _choices(case: Any, together: int) -> set[Any]:
    return set(combinations(enumerate(map(str, case.values)), together))
