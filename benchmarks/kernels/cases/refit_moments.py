"""The refit of a search: from ids, beside a refit over candidates that were stored.

The operator moves mean and std alone, 16 bytes an element, whatever K and T are; the others read T stored candidates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.sample_candidates import make_moments
from benchmarks.kernels.cases.step import SD3_512, SD3_1024, SEED, STREAM, label
from fastgrpo_kernels import elite_weights, refit_moments, sample_candidates

_MOMENTUM = 0.1


def cases(scale: Scale) -> list[Case]:
    searches = [(4, 8), (8, 16), (16, 32), (32, 64), (64, 64), (8, 64)]
    return [
        *(_case(scale(Size(48, SD3_512, candidates=K, elites=T))) for T, K in searches),
        _case(scale(Size(8, SD3_1024, candidates=16, elites=4))),
    ]


def _eager(candidates_PKD: Tensor, mean_PD: Tensor, std_PD: Tensor, elites_PT: Tensor) -> Outputs:
    rows_P1 = torch.arange(len(mean_PD), device=mean_PD.device)[:, None]
    refit_std_PD, refit_mean_PD = torch.std_mean(candidates_PKD[rows_P1, elites_PT], dim=1, correction=0)
    return torch.lerp(refit_mean_PD, mean_PD, _MOMENTUM), torch.lerp(refit_std_PD, std_PD, _MOMENTUM)


def _case(size: Size) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        inputs = make_moments(size)(device, seed)
        generator = torch.Generator(device).manual_seed(seed)
        rewards_PK = torch.rand(size.samples, size.candidates, generator=generator, device=device)
        rewards_PT, elites_PT = rewards_PK.topk(size.elites, dim=1)
        stored = sample_candidates(inputs["mean"], inputs["std"], SEED, STREAM, inputs["ids_P"], inputs["ids_K"])
        return inputs | {"stored": stored, "elites": elites_PT, "weights": elite_weights(rewards_PT)}

    def triton(inputs: Inputs) -> Outputs:
        ids = inputs["ids_P"], inputs["elites"], inputs["weights"]
        return refit_moments(inputs["mean"], inputs["std"], SEED, STREAM, *ids, momentum=_MOMENTUM)

    def plain(function: Callable[..., Outputs]) -> Run:
        return lambda inputs: function(*(inputs[name] for name in ("stored", "mean", "std", "elites")))

    return Case(
        op="refit_moments",
        label=f"{label(size, torch.float32)}, T {size.elites}",
        make=make,
        variants={
            "triton": Variant(triton),
            "eager": Variant(plain(_eager)),
            "compile": Variant(plain(compiled(_eager))),
        },
        expected=plain(_eager),
        num_elements=size.num_elements,
        # mean and std, read and written
        read_bytes=size.num_elements * 8,
        written_bytes=size.num_elements * 8,
        limit="drawing",
    )
