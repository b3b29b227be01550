"""The candidates of a search round: K draws from each prompt's N(mean, std^2), and perturbations of given latents."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, SEED, STREAM, label
from fastgrpo_kernels import sample_candidates
from fastgrpo_kernels.sample_candidates import sample_candidates_reference


def cases(scale: Scale) -> list[Case]:
    return [
        _case(scale(Size(48, SD3_512, candidates=8)), torch.bfloat16),
        _case(scale(Size(48, SD3_512, candidates=8)), torch.float32),
        _case(scale(Size(8, SD3_512, candidates=64)), torch.float32),
        _case(scale(Size(8, SD3_1024, candidates=64)), torch.bfloat16),
        _case(scale(Size(48, SD3_512, candidates=8)), torch.bfloat16, perturbed=True),
    ]


def make_moments(size: Size, *, perturbed: bool = False) -> Callable[[torch.device, int], Inputs]:
    """float32 mean and std [P, D], or std [P] for a perturbation, and ids."""

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        mean_PD, std_PD = (
            torch.rand(size.samples, math.prod(size.shape), generator=generator, device=device) for _ in range(2)
        )
        ids_P = torch.arange(size.samples, device=device) + seed * size.samples
        return {
            "mean": mean_PD,
            "std": std_PD[:, 0].contiguous() if perturbed else std_PD,
            "ids_P": ids_P,
            "ids_K": torch.arange(size.candidates, device=device),
        }

    return make


def _eager(mean_PD: Tensor, std_PD: Tensor, num_candidates: int, dtype: torch.dtype) -> Tensor:
    P, D = mean_PD.shape
    noise_PKD = torch.randn(P, num_candidates, D, dtype=dtype, device=mean_PD.device)
    # in place where the result has that dtype: no second copy of the candidates
    return noise_PKD.mul_(std_PD[:, None]).add_(mean_PD[:, None])


def _case(size: Size, dtype: torch.dtype, *, perturbed: bool = False) -> Case:
    def triton(inputs: Inputs) -> Outputs:
        ids_P, ids_K = inputs["ids_P"], inputs["ids_K"]
        return (sample_candidates(inputs["mean"], inputs["std"], SEED, STREAM, ids_P, ids_K, dtype=dtype),)

    def moments(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs["mean"], inputs["std"][:, None] if perturbed else inputs["std"]

    def plain(function: Callable[..., Tensor]) -> Run:
        return lambda inputs: (function(*moments(inputs), size.candidates, dtype),)

    def expected(inputs: Inputs) -> Outputs:
        ids_PK = inputs["ids_K"].expand(size.samples, -1)
        return (sample_candidates_reference(*moments(inputs), SEED, STREAM, inputs["ids_P"], ids_PK, dtype),)

    return Case(
        op="sample_candidates",
        label=label(size, dtype, perturbed=perturbed),
        make=make_moments(size, perturbed=perturbed),
        variants={
            "triton": Variant(triton),
            "eager": Variant(plain(_eager), own_noise=True),
            "compile": Variant(plain(compiled(_eager)), own_noise=True),
        },
        expected=expected,
        num_elements=size.num_elements * size.candidates,
        # mean and std; the candidates
        read_bytes=size.num_elements * 4 * (1 if perturbed else 2),
        written_bytes=size.num_elements * size.candidates * dtype.itemsize,
        limit="drawing",
    )
