"""What a reward is: a function of images and their prompts, one number an image; more is better.

A reward may say more about itself by attributes:
    in_thread   True if it computes on the CPU or waits for another machine: it is then called from threads, with images
                on the CPU, while the GPU goes on.  Default False: it computes where the images are.
    golden_set  the pairs it is tried on before a run: a name in golden_set/, default ``scenes``, a ``GoldenSet``, or
                ``none`` for a judge that knows certain prompts only
    check_prompt  a method that raises ValueError for a prompt it cannot judge: all prompts are checked before a run
    greet       a method without arguments that raises RewardError where nobody is there to answer: tried before a run
    golden_tolerance  how far their scores may lie from recorded ones, as a share of the spread; default 0.02
"""

from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Any function or object that is called like this; it needs no base class."""

    def __call__(self, images_BCHW: Tensor, prompts: list[str], /) -> Tensor:
        """Rewards [B] of float32 images in [0, 1], one prompt an image; a list or array of B numbers will do."""
        ...


class RewardError(ValueError):
    """A reward that failed, or whose answer cannot be trained on.  Nobody asks again after it."""


class RewardUnavailable(RewardError):
    """A reward that cannot answer now and may later: raised by a reward, it is asked again (``Scoring``)."""
