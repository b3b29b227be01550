"""All cases, by operator."""

from benchmarks.kernels.case import Case, Scale
from benchmarks.kernels.cases import (
    add_noise,
    group_advantage,
    grpo_loss,
    matching_loss,
    ode_step,
    philox_normal,
    preprocess_images,
    refit_moments,
    sample_candidates,
    sde_log_prob,
    sde_step,
)

_MODULES = {
    "philox_normal": philox_normal,
    "sample_candidates": sample_candidates,
    "refit_moments": refit_moments,
    "ode_step": ode_step,
    "sde_step": sde_step,
    "sde_log_prob": sde_log_prob,
    "add_noise": add_noise,
    "matching_loss": matching_loss,
    "grpo_loss": grpo_loss,
    "group_advantage": group_advantage,
    "preprocess_images": preprocess_images,
}
OPS = tuple(_MODULES)


def cases(scale: Scale, ops: tuple[str, ...] = OPS) -> list[Case]:
    return [case for op in ops for case in _MODULES[op].cases(scale)]
