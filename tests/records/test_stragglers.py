"""Which rank is slow: a line an iteration, a warning after three, a table at the end."""

import json
import logging
from pathlib import Path

import pytest

from fastgrpo.records.stragglers import Stragglers

HOSTS = ["a", "a", "b"]
ROWS = [
    ({"rollout": [1.0, 2.0, 1.5], "update": [4.0, 3.0, 3.5]}, [0.0, 0.25, 0.5]),
    ({"rollout": [1.0, 4.0, 1.5], "update": [4.0, 3.0, 3.5]}, [1.0, 0.0, 2.0]),
    ({"rollout": [1.0, 1.5, 2.0], "update": [4.0, 3.0, 3.5], "evaluate": [0.0, 0.0, 6.0]}, [2.0, 2.0, 0.0]),
]


def write(path: Path, first: int = 1) -> Stragglers:
    stragglers = Stragglers(path=path / "ranks.jsonl", hosts=HOSTS)
    for iteration, (seconds, waited_R) in enumerate(ROWS, start=first):
        stragglers.add(iteration, seconds, waited_R)
    return stragglers


def test_a_line_has_the_median_the_slowest_and_every_wait(tmp_path: Path) -> None:
    write(tmp_path)
    line = json.loads((tmp_path / "ranks.jsonl").read_text().splitlines()[1])
    assert line == {
        "iteration": 2,
        "own": {"median": 5.0, "slowest": 7.0, "rank": 1, "host": "a"},
        "stages": {
            "rollout": {"median": 1.5, "slowest": 4.0, "rank": 1, "host": "a"},
            "update": {"median": 3.5, "slowest": 4.0, "rank": 0, "host": "a"},
        },
        "waited": [1.0, 0.0, 2.0],
    }


def test_the_table_tells_who_was_slowest_most_often_and_who_is_waited_for(tmp_path: Path) -> None:
    assert write(tmp_path).table().splitlines() == [
        "seconds an iteration   median  slowest  slowest most often",
        "rollout                  1.50     2.67  rank 1 on a, 2 of 3 times",
        "update                   3.50     4.00  rank 0 on a, 3 of 3 times",
        "evaluate                 0.00     6.00  rank 2 on b, 1 of 1 times",
        "all stages               5.00     7.83  rank 0 on a, 1 of 3 times",
        "waiting for others: 0.83 s an iteration in the median, 1.00 s at most; rank 1 waits least, 0.75 s",
    ]


def test_a_resumed_run_drops_later_lines_and_half_a_line(tmp_path: Path) -> None:
    stragglers = write(tmp_path)
    before = stragglers.path.read_text().splitlines(keepends=True)
    with open(stragglers.path, "a") as file:
        file.write(before[2][:40])
    stragglers.truncate_to(2)
    assert stragglers.path.read_text() == "".join(before[:2])


def test_lines_of_another_number_of_ranks_are_not_in_the_table(tmp_path: Path) -> None:
    path = write(tmp_path).path
    resumed = Stragglers(path=path, hosts=["c", "d"])
    assert resumed.table() == ""
    resumed.add(4, {"rollout": [1.0, 2.0]}, [1.0, 0.0])
    assert resumed.table().splitlines()[1].endswith("1.50     2.00  rank 1 on d, 1 of 1 times")


def warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture, *seconds_of_ranks: list[float]) -> list[str]:
    stragglers = Stragglers(path=tmp_path / "ranks.jsonl", hosts=HOSTS)
    with caplog.at_level(logging.WARNING):
        for iteration, seconds_R in enumerate(seconds_of_ranks, start=1):
            stragglers.add(iteration, {"rollout": seconds_R}, [0.0, 0.0, 0.0])
    return caplog.messages


def test_the_same_slow_rank_in_three_iterations_in_a_row_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = [1.0, 1.0, 1.25]
    assert warnings(tmp_path, caplog, slow, slow, slow, slow) == [
        "rank 2 on b was slowest in the last 3 iterations, in iteration 3 by 25% (1.25 s, median 1.00 s): "
        "the others waited for it"
    ]


@pytest.mark.parametrize(
    "last", [[1.0, 1.0, 1.15], [1.0, 1.25, 1.0], [1.25, 1.25, 1.25]], ids=["less slow", "another", "all"]
)
def test_a_rank_that_is_slow_now_and_then_is_not_warned_of(
    last: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = [1.0, 1.0, 1.25]
    assert warnings(tmp_path, caplog, slow, slow, last, slow, slow) == []
