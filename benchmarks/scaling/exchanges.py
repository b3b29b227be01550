"""What the ranks must tell each other in one iteration, from first principles: sizes of weights, rows and columns.

    search        a score of each candidate, once a round                     W (most + 1) x 4 bytes
    rewards       R rewards of each sample                                    W (most + 1) R x 4
    gradients     of adapters: every number, once an optimizer step           numbers x 4
                  of weights that are spread over ranks: ``sharded.py``
    statistics    4 sums and with a reference 1 more, the largest deviation,  W (5 + steps) x 8
                  a norm of each optimizer step                               W (6 + steps) x 8
    seconds       of each stage and waited in it, all, and a stop signal      W x 12 x 8

most is the number of rows of the rank that has most, and W the number of ranks.  Each rank adds a row that says whether
its others are to be believed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrpo.distributed.spread import Spread
from fastgrpo.profiling.timing import NO_STAGE
from fastgrpo.trainer import STAGES

FLOAT32, FLOAT64 = 4, 8
_STATISTICS = 5

Shares = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Exchange:
    """``calls`` collectives of one kind and payload in an iteration, for one purpose."""

    what: str
    stage: str
    kind: str
    payload_bytes: int
    calls: int = 1


def rows_gathered(what: str, stage: str, spread: Spread, num_columns: int) -> Exchange:
    """``World.gather`` of float32 rows [B, C]."""
    return Exchange(what, stage, "all_gather", len(spread.rows) * (spread.most + 1) * num_columns * FLOAT32)


def always(
    num_ranks: int, shares: Shares, num_rewards: int, searches: Sequence[int] = (), *, has_reference: bool
) -> list[Exchange]:
    """What every training on steps tells; ``searches`` are the candidates, of all prompts, of each round."""
    rewards = rows_gathered("rewards", "reward", Spread.of_shares(shares, num_ranks), num_rewards)
    return [
        *(rows_gathered("scores", "search", Spread.evenly(num, num_ranks), 1) for num in searches),
        rewards,
        Exchange(
            "statistics", "update", "all_gather", num_ranks * (_STATISTICS + has_reference + len(shares)) * FLOAT64
        ),
        Exchange("seconds", NO_STAGE, "all_gather", num_ranks * (2 * len(STAGES) + 2) * FLOAT64),
    ]


def of_adapters(num_weights: int, shares: Shares) -> list[Exchange]:
    """One sum of the gradient of all adapters, which every rank has whole, an optimizer step."""
    return [Exchange("gradients", "update", "all_reduce", num_weights * FLOAT32, len(shares))]


def shares_of(num_samples: int, optimizer_steps: int) -> Shares:
    """The samples of each optimizer step; which ones they are does not matter for how many."""
    return [range(step, num_samples, optimizer_steps) for step in range(optimizer_steps)]
