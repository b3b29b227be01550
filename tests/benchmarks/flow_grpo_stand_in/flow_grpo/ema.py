"""A moving average of weights that is slower to move the longer it has lasted."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMAModuleWrapper:
    """Moves every ``update_step_interval`` optimizer steps."""

    def __init__(
        self, parameters: Sequence[Tensor], decay: float, update_step_interval: int, device: torch.device
    ) -> None:
        self.ema_parameters = [p.detach().clone().to(device) for p in parameters]
        self.decay, self.interval = decay, update_step_interval

    @torch.no_grad()
    def step(self, parameters: Sequence[Tensor], optimization_step: int) -> None:
        if (optimization_step + 1) % self.interval == 0:
            kept = min(self.decay, (1 + optimization_step) / (10 + optimization_step))
            for average, parameter in zip(self.ema_parameters, parameters, strict=True):
                average.lerp_(parameter, 1 - kept)
