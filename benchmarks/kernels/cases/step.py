"""What the cases of a step share: inputs under Flow-GRPO's dynamics, and its formulas as plain PyTorch."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernels.case import Inputs, Outputs, Run, Size
from fastgrpo_kernels import GuidedVelocity, LogProb, PhiloxNoise

SD3_512 = (16, 64, 64)
SD3_1024 = (16, 128, 128)
# packed latents of images of 512 x 512 and of 1024 x 1024
FLUX_512 = (1024, 64)
FLUX_1024 = (4096, 64)

NOISE_LEVEL = 0.7
GUIDANCE_SCALE = 4.5
SEED, STREAM = 42, 1000
_DT = -0.05


def make_step(size: Size, dtype: torch.dtype) -> Callable[[torch.device, int], Inputs]:
    """Latents, both branches of the velocities, and the coefficients of samples at many t; arXiv:2505.05470."""

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (size.samples, *size.shape)
        names = ("x", "v", "v_uncond", "noise", "v_reference", "v_reference_uncond")
        inputs: Inputs = {name: torch.randn(shape, generator=generator, device=device, dtype=dtype) for name in names}
        t_B = torch.linspace(0.95, 0.3, size.samples, device=device)
        s_B = NOISE_LEVEL * (t_B / (1 - t_B)).sqrt()
        ids_B = torch.arange(size.samples, device=device)
        return inputs | {
            "t": t_B,
            "t_next": t_B + _DT,
            "c_x": 1 + s_B.square() * _DT / (2 * t_B),
            "c_v": (1 + s_B.square() * (1 - t_B) / (2 * t_B)) * _DT,
            "std": s_B * math.sqrt(-_DT),
            "kl_weight": 0.5 / s_B.square(),
            "philox": PhiloxNoise(SEED, STREAM, ids_B, ids_B),
        }

    return make


def velocity(inputs: Inputs, guided: bool, name: str = "v") -> Tensor | GuidedVelocity:
    return GuidedVelocity(inputs[name], inputs[f"{name}_uncond"], GUIDANCE_SCALE) if guided else inputs[name]


def branches(inputs: Inputs, guided: bool, name: str = "v") -> tuple[Tensor, Tensor | None]:
    return inputs[name], inputs[f"{name}_uncond"] if guided else None


def coefficients(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["c_x"], inputs["c_v"], inputs["std"]


def plain_velocity(v: Tensor, v_uncond: Tensor | None) -> Tensor:
    """Guidance in the dtype of the model: the fewest bytes, in one kernel."""
    return v if v_uncond is None else torch.lerp(v_uncond, v, GUIDANCE_SCALE)


def plain_mean(x: Tensor, v: Tensor, v_uncond: Tensor | None, c_x_B: Tensor, c_v_B: Tensor) -> Tensor:
    return per_sample(c_x_B, x) * x.float() + per_sample(c_v_B, x) * plain_velocity(v, v_uncond).float()


def plain_log_prob(difference: Tensor, std_B: Tensor, kind: LogProb) -> Tensor:
    mean_square_B = difference.square().flatten(1).mean(dim=1)
    if kind == "cps":
        return -mean_square_B
    return -mean_square_B / (2 * std_B.square()) - std_B.log() - 0.5 * math.log(2 * math.pi)


def with_gradient(forward: Run, sum_weights: Sequence[float]) -> Run:
    """The forward's results, means over elements, and through autograd the gradient to v of their weighted sums."""

    def run(inputs: Inputs) -> Outputs:
        v = inputs["v"].detach().requires_grad_()
        with torch.enable_grad():
            results = forward({**inputs, "v": v})
        pairs = [(result, one) for result, one in zip(results, sum_weights, strict=False) if result.requires_grad]
        weights = [torch.full_like(result, one * v[0].numel()) for result, one in pairs]
        grad = torch.autograd.grad([result for result, _ in pairs], v, weights)
        return *(result.detach() for result in results), *grad

    return run


def per_sample(value_B: Tensor, x: Tensor) -> Tensor:
    return value_B.view(-1, *[1] * (x.dim() - 1))


def label(size: Size, dtype: torch.dtype, **options: bool) -> str:
    words = [str(size), str(dtype).removeprefix("torch."), *(name for name, used in options.items() if used)]
    return " ".join(words)
