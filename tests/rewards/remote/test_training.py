"""Training while its reward server dies: the run waits and ends as an undisturbed one, or stops where it can go on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_proxy import Fault, FaultProxy, garbage, partial
from fastgrpo import cli
from fastgrpo.records.json_lines import read_rows
from tests.rewards.remote.scripted import free_port, redness, served
from tests.tiny_config import make_overrides

NUM_ITERATIONS = 4
SETTINGS = (
    "reward=http",
    "reward.terms.http.name=red",
    "reward.terms.http.batch=2",
    f"train.iterations={NUM_ITERATIONS}",
    "train.learning_rate=1e-2",
    "evaluate.every=2",
    # only a failing reward makes one before the end
    "checkpoint.every=100",
)


class Server:
    """The real server in a thread, behind a proxy; it can be killed and started again."""

    def __init__(self) -> None:
        self._port, self._running = free_port(), ExitStack()
        self.proxy = FaultProxy(self._port)
        self.start()

    def start(self) -> None:
        self._running.enter_context(served({"red": redness}, port=self._port))

    def kill(self) -> None:
        self._running.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()
    server.proxy.close()


def run(server: Server, weights: Path, output: Path, *words: str) -> int:
    """The exit code of ``fastgrpo train``."""
    endpoints = f"reward.terms.http.endpoints=[{server.proxy.url}]"
    return cli.main(["train", *make_overrides(weights, output, *SETTINGS, endpoints, *words)])


def result(output: Path) -> dict[str, Any]:
    """Everything that was measured but time and memory, and everything that was learned."""
    varying = ("seconds", "images_per_second", "peak_bytes")
    rows = read_rows(output / "metrics.jsonl")
    metrics = [{key: value for key, value in row.items() if not key.startswith(varying)} for row in rows]
    assert [row["iteration"] for row in metrics] == list(range(NUM_ITERATIONS + 1))
    step = output / f"checkpoints/step_{NUM_ITERATIONS:06d}"
    return {"metrics": metrics, "weights": (step / "weights.safetensors").read_bytes()}


@pytest.fixture(scope="module")
def undisturbed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    server, output = Server(), tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(server, tiny_weights, output) == 0
    server.kill()
    server.proxy.close()
    return result(output)


def after_iteration(iteration: int, output: Path, fault: Fault, times: int) -> Callable[[], Fault | None]:
    """``fault`` for so many requests, once that iteration is written."""
    left = iter([fault] * times)

    def plan() -> Fault | None:
        rows = read_rows(output / "metrics.jsonl")
        return next(left, None) if rows and rows[-1]["iteration"] >= iteration else None

    return plan


def test_a_run_whose_server_is_killed_and_restarted_ends_as_an_undisturbed_one(
    server: Server, undisturbed: dict[str, Any], tiny_weights: Path, tmp_path: Path
) -> None:
    def kill(forward: object) -> None:
        server.kill()
        threading.Timer(0.3, server.start).start()

    server.proxy.plan = after_iteration(1, tmp_path / "run", kill, times=1)
    assert run(server, tiny_weights, tmp_path / "run") == 0
    assert server.proxy.faults == 1
    assert result(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("fault", [garbage, pytest.param(partial, marks=pytest.mark.slow)])
def test_a_run_that_is_answered_nonsense_for_a_while_ends_as_an_undisturbed_one(
    fault: Callable[[], Fault], server: Server, undisturbed: dict[str, Any], tiny_weights: Path, tmp_path: Path
) -> None:
    server.proxy.plan = after_iteration(1, tmp_path / "run", fault(), times=9)
    assert run(server, tiny_weights, tmp_path / "run") == 0
    assert server.proxy.faults == 9
    assert result(tmp_path / "run") == undisturbed


def test_a_run_whose_server_stays_dead_stops_saved_and_resumes_to_the_same_end(
    server: Server,
    undisturbed: dict[str, Any],
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    server.proxy.plan = after_iteration(1, output, lambda forward: server.kill(), times=1)
    assert run(server, tiny_weights, output, "reward.terms.http.patience_seconds=0.3") == cli.FAILED
    said = capsys.readouterr().err
    assert "reward 'red' at" in said
    assert "no answer after" in said
    done = read_rows(output / "metrics.jsonl")[-1]["iteration"]
    assert 1 <= done < NUM_ITERATIONS
    assert f"iteration {done} is saved, go on with resume=true" in said
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    server.start()
    assert run(server, tiny_weights, output, "resume=true") == 0
    assert result(output) == undisturbed


def test_a_run_whose_server_refuses_it_stops_before_it_trains(
    server: Server, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, tiny_weights, tmp_path / "run", "reward.terms.http.name=blue") == cli.FAILED
    assert "status 404" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_rows(tmp_path / "run" / "metrics.jsonl")
