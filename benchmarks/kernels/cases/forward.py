"""What the cases of the forward process share: inputs."""

from collections.abc import Callable

import torch

from benchmarks.kernels.case import Inputs, Size
from benchmarks.kernels.cases.step import SEED, STREAM
from fastgrpo_kernels import PhiloxNoise, philox_normal


def make_forward(size: Size, dtype: torch.dtype) -> Callable[[torch.device, int], Inputs]:
    """Velocities in ``dtype``, a float32 image, and noise, as ids and as the float32 tensor that they stand for."""

    def make(device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (size.samples, *size.shape)
        names = ("v", "v_old", "v_reference")
        inputs: Inputs = {name: torch.randn(shape, generator=generator, device=device, dtype=dtype) for name in names}
        ids_B = torch.arange(size.samples, device=device) + seed * size.samples
        noise = philox_normal(SEED, STREAM, ids_B, ids_B[:, None], size.num_elements // size.samples)
        return inputs | {
            "x_0": torch.randn(shape, generator=generator, device=device),
            "noise": noise.view(shape),
            "philox": PhiloxNoise(SEED, STREAM, ids_B, ids_B),
            "t": torch.linspace(0.95, 0.05, size.samples, device=device),
        }

    return make
