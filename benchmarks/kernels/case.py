"""A case: inputs, variants that compute the same from them, one baseline, and the bytes that must move.

The bytes are from first principles: each input is read once and each output written once.  What is one number a sample
(coefficients, ids, log_prob) is not counted.  Letters: B samples or P prompts, D elements of one, K candidates, T
elites.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

BASELINE = "eager"
# relative and absolute; plain PyTorch rounds in another order, so these are wider than in the operators' own tests
TOLERANCES = {torch.float32: (1e-4, 2e-5), torch.bfloat16: (2**-7, 2**-7)}
# statistics of fewer values say nothing
_MIN_VALUES = 100


@dataclass(frozen=True)
class Size:
    """B samples (or P prompts) of shape [...]; of a search also K candidates, T of them elites."""

    samples: int
    shape: tuple[int, ...]
    candidates: int = 1
    elites: int = 1

    @property
    def num_elements(self) -> int:
        return self.samples * math.prod(self.shape)

    def __str__(self) -> str:
        search = f", K {self.candidates}" if self.candidates > 1 else ""
        return f"[{', '.join(map(str, (self.samples, *self.shape)))}]{search}"


# the size at which a case is made, of its full size
Scale = Callable[[Size], Size]


def full(size: Size) -> Size:
    return size


def miniature(size: Size) -> Size:
    """A size for a CPU: every dimension is small, none is one."""
    samples = min(size.samples, 3 if size.shape else 96)
    return Size(samples, tuple(min(n, 24) for n in size.shape), min(size.candidates, 6), min(size.elites, 4))


def compiled_size(size: Size) -> Size:
    """A size for compilation only: the kernels are those of the full size, the inputs fit anywhere."""
    samples = min(size.samples, 2) if size.shape else size.samples
    return replace(size, samples=samples, candidates=max(size.elites, min(size.candidates, 8)))


@dataclass(frozen=True)
class Variant:
    """One implementation."""

    run: Run
    # it draws noise from a generator of its own, so only the moments of its result can be compared
    own_noise: bool = False
    # of the largest value, instead of that of the dtype
    tolerance: float | None = None
    # it waits for the GPU, so no CUDA graph can hold it
    waits: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """``make(device, seed)`` gives inputs, of which every variant but those of own noise computes ``expected``."""

    op: str
    label: str
    make: Callable[[torch.device, int], Inputs]
    variants: dict[str, Variant]
    expected: Run
    num_elements: int
    read_bytes: int
    written_bytes: int
    # what stands between the operator and the speed of memory
    limit: Literal["memory", "drawing", "launch"] = "memory"
    # whether each byte is touched by one program only, so that a kernel's accesses add up to the bytes above
    streams: bool = True

    @property
    def num_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as a user would; on a CPU the graph is only traced, which needs no C++ compiler."""
    return torch.compile(function, dynamic=False, backend="inductor" if torch.cuda.is_available() else "aot_eager")


def check(case: Case, inputs: Inputs) -> None:
    """Raise AssertionError unless all variants agree with what is expected, and that has the bytes that are counted."""
    expected = case.expected(inputs)
    written_bytes = sum(value.nbytes for value in expected if value.dim() > 1)
    assert not case.streams or written_bytes == case.written_bytes, f"results have {written_bytes} bytes"
    for name, variant in case.variants.items():
        results = variant.run(inputs)
        assert len(results) == len(expected), f"{name} has {len(results)} results, {len(expected)} are expected"
        for index, (result, value) in enumerate(zip(results, expected, strict=True)):
            what = f"result {index} of {name}"
            if variant.own_noise:
                _check_moments(result, value, what)
            else:
                _check_values(result, value, variant.tolerance, what)


def _check_values(result: Tensor, value: Tensor, tolerance: float | None, what: str) -> None:
    rtol, atol = TOLERANCES[value.dtype] if tolerance is None else (0.0, tolerance * value.abs().max().item())
    torch.testing.assert_close(result, value, rtol=rtol, atol=atol, msg=lambda message: f"{what}: {message}")


def _check_moments(result: Tensor, value: Tensor, what: str) -> None:
    """Mean and standard deviation, within six standard errors of two independent draws."""
    assert result.shape == value.shape, f"{what} is {tuple(result.shape)}, expected {tuple(value.shape)}"
    assert result.dtype == value.dtype, f"{what} is {result.dtype}, expected {value.dtype}"
    if value.numel() < _MIN_VALUES:
        return
    error = 6 / math.sqrt(value.numel())
    difference = result.float() - value.float()
    assert difference.mean().abs() <= error * difference.std(), f"{what} has another mean"
    assert (result.float().std() / value.float().std() - 1).abs() <= error, f"{what} has another spread"
