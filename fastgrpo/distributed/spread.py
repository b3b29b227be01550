"""Which rank has which rows of a table that all ranks know the length of: samples, candidates, evaluation images.

Every row has one rank, whatever the number of rows: nothing is dropped, repeated or resized to divide evenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Spread:
    """``rows[r]`` are the rows of rank r, in the order in which it holds them; together all rows, each once."""

    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert sorted(self.order) == list(range(self.total)), f"rows are missing or repeated in {self.rows}"

    @classmethod
    def evenly(cls, total: int, num_ranks: int) -> "Spread":
        """Neighbouring rows together; sizes differ by at most one."""
        return cls.of_shares([range(total)], num_ranks)

    @classmethod
    def of_shares(cls, shares: Sequence[Sequence[int]], num_ranks: int) -> "Spread":
        """Each share evenly, so that no rank waits in any of them; a rank holds its rows of the first share first."""
        return cls(tuple(tuple(row for part in own for row in part) for own in pieces(shares, num_ranks)))

    @property
    def total(self) -> int:
        return sum(map(len, self.rows))

    @property
    def most(self) -> int:
        """Rows of the rank that has most."""
        return max(map(len, self.rows))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The rows of all ranks, rank by rank."""
        return tuple(row for rows in self.rows for row in rows)


def pieces(shares: Sequence[Sequence[int]], num_ranks: int) -> list[list[Sequence[int]]]:
    """Each rank's part of each share: neighbours, of a share and of all together as many as others have or one less.

    Ranks take turns in having one more: those of a share come after those of the shares before it.
    """
    by_rank: list[list[Sequence[int]]] = [[] for _ in range(num_ranks)]
    turn = 0
    for share in shares:
        each, longer = divmod(len(share), num_ranks)
        end = 0
        for rank, own in enumerate(by_rank):
            first, end = end, end + each + ((rank - turn) % num_ranks < longer)
            own.append(share[first:end])
        turn += longer
    return by_rank
