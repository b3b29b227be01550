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
        return cls(
            tuple(tuple(row for share in shares for row in piece(share, rank, num_ranks)) for rank in range(num_ranks))
        )

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


def piece(rows: Sequence[int], rank: int, num_ranks: int) -> Sequence[int]:
    """A rank's part of some rows: neighbours, as many as any other rank has or one less."""
    return rows[rank * len(rows) // num_ranks : (rank + 1) * len(rows) // num_ranks]
