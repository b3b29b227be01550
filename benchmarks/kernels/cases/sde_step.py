"""One stochastic step with its log_prob: the step of a rollout."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.case import Case, Inputs, Outputs, Run, Scale, Size, Variant, compiled
from benchmarks.kernels.cases.step import (
    FLUX_512,
    FLUX_1024,
    GUIDANCE_SCALE,
    NOISE_LEVEL,
    SD3_512,
    SD3_1024,
    SEED,
    STREAM,
    branches,
    coefficients,
    label,
    make_step,
    per_sample,
    plain_log_prob,
    plain_mean,
    velocity,
)
from fastgrpo_kernels import LogProb, sde_step
from fastgrpo_kernels.philox import philox_normal_reference


def cases(scale: Scale) -> list[Case]:
    large = scale(Size(64, SD3_1024))
    return [
        _case(scale(Size(9, SD3_512)), torch.bfloat16, guided=True, drawn=True),
        _case(scale(Size(64, SD3_512)), torch.bfloat16, guided=True, drawn=True),
        _case(large, torch.bfloat16),
        _case(large, torch.bfloat16, guided=True),
        _case(large, torch.bfloat16, drawn=True),
        _case(large, torch.bfloat16, guided=True, drawn=True),
        _case(large, torch.float32),
        _case(large, torch.float32, guided=True, drawn=True),
        _case(large, torch.bfloat16, guided=True, mean=True),
        _case(scale(Size(24, FLUX_512)), torch.bfloat16, drawn=True, log_prob="cps"),
        _case(scale(Size(24, FLUX_1024)), torch.bfloat16, drawn=True, log_prob="cps"),
    ]


def _eager(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, noise: Tensor | None, c_x_B: Tensor, c_v_B: Tensor, std_B: Tensor,
    kind: LogProb, return_mean: bool,
) -> Outputs:  # fmt: skip
    noise = torch.randn_like(x) if noise is None else noise
    mean = plain_mean(x, v, v_uncond, c_x_B, c_v_B)
    x_next = (mean + per_sample(std_B, x) * noise.float()).to(x.dtype)
    log_prob_B = plain_log_prob(x_next.float() - mean, std_B, kind)
    return (x_next, log_prob_B, mean) if return_mean else (x_next, log_prob_B)


def _flow_grpo(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, noise: Tensor | None, t_B: Tensor, t_next_B: Tensor
) -> Outputs:
    """As Flow-GRPO's sampler: all in float32 and from t, the density element by element, before x_next is rounded."""
    dtype, t, dt = x.dtype, per_sample(t_B, x), per_sample(t_next_B - t_B, x)
    v = v if v_uncond is None else v_uncond + GUIDANCE_SCALE * (v - v_uncond)
    x, v = x.float(), v.float()
    s = torch.sqrt(t / (1 - t)) * NOISE_LEVEL
    mean = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    std = s * torch.sqrt(-dt)
    x_next = mean + std * (torch.randn_like(v) if noise is None else noise.float())
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
    return x_next.to(dtype), density.mean(dim=tuple(range(1, density.dim())))


def _case(
    size: Size, dtype: torch.dtype, *, guided: bool = False, drawn: bool = False, mean: bool = False,
    log_prob: LogProb = "gaussian",
) -> Case:  # fmt: skip
    variants, expected = _variants(guided, drawn, mean, log_prob)
    return Case(
        op="sde_step",
        label=label(size, dtype, guided=guided, drawn=drawn, mean=mean, cps=log_prob == "cps"),
        make=make_step(size, dtype),
        variants=variants,
        expected=expected,
        num_elements=size.num_elements,
        # x, v, the unconditional v, noise; x_next and the mean, which is float32
        read_bytes=size.num_elements * dtype.itemsize * (2 + guided + (not drawn)),
        written_bytes=size.num_elements * (dtype.itemsize + 4 * mean),
        limit="drawing" if drawn else "memory",
    )


def _variants(guided: bool, drawn: bool, mean: bool, log_prob: LogProb) -> tuple[dict[str, Variant], Run]:
    def triton(inputs: Inputs) -> Outputs:
        x, v, noise = inputs["x"], velocity(inputs, guided), inputs["philox" if drawn else "noise"]
        step = sde_step(x, v, noise, *coefficients(inputs), log_prob=log_prob, return_mean=mean)
        return tuple(result for result in step if result is not None)

    def plain(function: Callable[..., Outputs]) -> Run:
        def run(inputs: Inputs) -> Outputs:
            noise = None if drawn else inputs["noise"]
            return function(inputs["x"], *branches(inputs, guided), noise, *coefficients(inputs), log_prob, mean)

        return run

    def flow_grpo(inputs: Inputs) -> Outputs:
        noise = None if drawn else inputs["noise"]
        return _flow_grpo(inputs["x"], *branches(inputs, guided), noise, inputs["t"], inputs["t_next"])

    def expected(inputs: Inputs) -> Outputs:
        v, v_uncond = branches(inputs, guided)
        exact = v.float(), None if v_uncond is None else v_uncond.float()
        noise = _philox(inputs) if drawn else inputs["noise"]
        return _eager(inputs["x"], *exact, noise, *coefficients(inputs), log_prob, mean)

    # a guided velocity in the dtype of the model is rounded; Flow-GRPO's log_prob is of x_next before it is rounded
    tolerance = 0.01 if guided else None
    variants = {
        "triton": Variant(triton),
        "eager": Variant(plain(_eager), drawn, tolerance),
        "compile": Variant(plain(compiled(_eager)), drawn, tolerance),
    }
    if log_prob == "gaussian" and not mean:
        variants["flow_grpo"] = Variant(flow_grpo, drawn, tolerance=0.01)
    return variants, expected


def _philox(inputs: Inputs) -> Tensor:
    """The noise that the operator draws, by its reference."""
    ids, x = inputs["philox"], inputs["x"]
    noise = philox_normal_reference(
        SEED, STREAM, ids.prompt_ids_B, ids.sample_ids_B[:, None], x[0].numel(), torch.float32
    )
    return noise.view(x.shape)
