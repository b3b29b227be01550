"""Start noise: standard normals by their indices, beside those of torch's generator, which know none."""

import math

import torch

from benchmarks.kernels.case import Case, Inputs, Outputs, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, SEED, STREAM, label
from fastgrpo_kernels import philox_normal
from fastgrpo_kernels.philox import philox_normal_reference


def cases(scale: Scale) -> list[Case]:
    return [
        _case(scale(Size(48, SD3_512, candidates=24)), torch.bfloat16),
        _case(scale(Size(48, SD3_512, candidates=24)), torch.float32),
        _case(scale(Size(8, SD3_1024, candidates=8)), torch.float32),
    ]


def _eager(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Outputs:
    return (torch.randn(shape, dtype=dtype, device=device),)


def _case(size: Size, dtype: torch.dtype) -> Case:
    D = math.prod(size.shape)
    shape = (size.samples, size.candidates, D)

    def make(device: torch.device, seed: int) -> Inputs:
        # other prompts for another seed
        ids_P = torch.arange(size.samples, device=device) + seed * size.samples
        return {"ids_P": ids_P, "ids_K": torch.arange(size.candidates, device=device)}

    def triton(inputs: Inputs) -> Outputs:
        return (philox_normal(SEED, STREAM, inputs["ids_P"], inputs["ids_K"], D, dtype),)

    def expected(inputs: Inputs) -> Outputs:
        ids_PK = inputs["ids_K"].expand(size.samples, -1)
        return (philox_normal_reference(SEED, STREAM, inputs["ids_P"], ids_PK, D, dtype),)

    compiled_eager = compiled(_eager)
    return Case(
        op="philox_normal",
        label=label(size, dtype),
        make=make,
        variants={
            "triton": Variant(triton),
            "eager": Variant(lambda inputs: _eager(shape, dtype, inputs["ids_P"].device), own_noise=True),
            "compile": Variant(lambda inputs: compiled_eager(shape, dtype, inputs["ids_P"].device), own_noise=True),
        },
        expected=expected,
        num_elements=math.prod(shape),
        read_bytes=0,
        written_bytes=math.prod(shape) * dtype.itemsize,
        limit="drawing",
    )
