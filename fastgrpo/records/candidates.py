"""What a search saw: a line of ``search.jsonl`` for the first iteration after each evaluation.

    {"iteration": 21, "scores": "estimates",
     "groups": [{"prompt": "...", "rounds": [[...], ...], "chosen": [...], "rewards": [...]}, ...]}

``rounds`` are the scores of a group's candidates, a list a round; ``chosen`` the estimates of the noises that its
images were made from, null where none was scored; ``rewards`` the images' own.  Where groups are made again ``scores``
is "images", and the rounds are the rewards of the images of each attempt.
Letters: P prompts, G samples of a prompt, K candidates.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.types import Scored

_MOST_GROUPS = 4
_MOST_CANDIDATES = 64


def search_row(
    iteration: int,
    texts: Sequence[str],
    scored: Sequence[Scored],
    estimates_PG: Tensor | None,
    rewards_PG: Tensor,
) -> dict[str, Any] | None:
    """The line of an iteration, of the first few groups that were searched; None where nothing was scored."""
    places = sorted({place for one in scored for place in one.places})[:_MOST_GROUPS]
    if not places:
        return None
    groups = []
    for place in places:
        rounds = [one.scores_PK[one.places.index(place)] for one in scored if place in one.places]
        groups.append(
            {
                "prompt": texts[place],
                "rounds": [_numbers(scores_K[:_MOST_CANDIDATES]) for scores_K in rounds],
                "chosen": None if estimates_PG is None else _numbers(estimates_PG[place]),
                "rewards": _numbers(rewards_PG[place]),
            }
        )
    return {"iteration": iteration, "scores": "images" if scored[0].is_of_images else "estimates", "groups": groups}


def _numbers(values: Tensor) -> list[float | None]:
    """Six digits of each, None for one that is not finite."""
    numbers = values.detach().to("cpu", torch.float64).tolist()
    return [float(f"{number:.6g}") if math.isfinite(number) else None for number in numbers]
