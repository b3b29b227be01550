"""The learning rate of each iteration: a rise from almost nothing, a plateau, and a fall before the end.

    warm-up     peak * (i + 1) / warmup_iterations                          the first warmup_iterations
    plateau     peak
    decay       from peak, in equal steps, to peak * decay_to in the last   the last decay_iterations

So the plateau of a run that is made longer is that of the shorter one.  Letter: i iterations done.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """``num_iterations`` is where the run ends; a run that its minutes end earlier does not see the decay."""

    peak: float
    num_iterations: int
    warmup_iterations: int = 0
    decay_iterations: int = 0
    decay_to: float = 0.1

    def __call__(self, iteration: int) -> float:
        """That of the iteration after ``iteration`` of them."""
        rise = min(1.0, (iteration + 1) / self.warmup_iterations) if self.warmup_iterations else 1.0
        left = self.num_iterations - 1 - iteration
        fallen = min(1.0, max(0.0, 1 - left / self.decay_iterations)) if self.decay_iterations else 0.0
        return self.peak * rise * (1 - (1 - self.decay_to) * fallen)

    def set(self, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        """Give it to all weights."""
        for group in optimizer.param_groups:
            group["lr"] = self(iteration)
