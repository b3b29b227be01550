"""Jobs of a cluster: ranks of a Slurm step, the sbatch examples, and ``fastgrpo submit``, preempted and queued again.

There is no Slurm here: its commands are those of ``fake_slurm.py``, all else is as on a cluster.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import DictConfig, OmegaConf

from fastgrpo.commands.submit import local_environment, run_rank, submit
from fastgrpo.config import load_config
from fastgrpo.distributed.slurm import first_host, slurm_environment, tasks_per_node
from fastgrpo.distributed.world import World
from fastgrpo.health import Preempted, TrainingError
from fastgrpo.trainer import Trainer
from tests.commands import fake_slurm
from tests.ranks import Ranks, free_port, ranks_of_module
from tests.tiny_config import make_config, make_overrides

EXAMPLES = Path(__file__).parents[2] / "configs" / "slurm"
PATIENCE_SECONDS = 240
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[007-008,31]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
}
# drawing them takes longer than training
WITHOUT_CURVES = mock.patch("fastgrpo.records.metrics.draw_curves")

on_ranks = ranks_of_module(joined=False)
needs_submitit = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_submitit_launcher") is None if find_spec("hydra_plugins") else True,
    reason="needs the extra slurm",
)


def test_a_task_of_a_step_is_a_rank() -> None:
    assert slurm_environment(STEP) == {
        "RANK": "17",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu007",
        # 10000 + (16 * 123456 + 2) mod 20000
        "MASTER_PORT": "25298",
    }


@pytest.mark.parametrize(
    "change",
    [
        # below torchrun, in a batch script, in an interactive shell, alone, without Slurm
        {"RANK": "3"},
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": ""},
    ],
)
def test_what_is_no_rank_of_slurm_is_left_alone(change: dict[str, str]) -> None:
    assert slurm_environment(STEP | change) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu[007-012,31],login1", "gpu007"),
        ("gpu[3,7-9]", "gpu3"),
        ("rack[1-2]node[05-06]", "rack1node05"),
        ("rack[2]-gpu4,rack3-gpu1", "rack2-gpu4"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_each_node() -> None:
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("1") == [1]


def test_a_process_that_submitit_starts_on_this_machine_is_a_rank() -> None:
    job = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_JOB_ID": "23456",
    }
    found = local_environment(job)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_PORT"]) == ("1", "2", "13456")
    assert local_environment(job | {"SUBMITIT_LOCAL_NTASKS": "1"}) == {}
    assert local_environment(STEP | {"SUBMITIT_EXECUTOR": "slurm"}) == {}


def job_with_a_free_port() -> int:
    """Of the first step of that job: 10000 + 16 job, and jobs beside it have others."""
    while (port := free_port()) % 16 or port >= 30_000:
        pass
    return (port - 10_000) // 16


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of Slurm's commands: one node of two tasks."""
    directory = tmp_path / "slurm"
    fake_slurm.install(directory, str(job_with_a_free_port()))
    monkeypatch.setenv("PATH", f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_NODES", "1")
    monkeypatch.setenv("FAKE_TASKS", "2")
    return directory


def put_command(cluster: Path, name: str, body: str) -> None:
    path = cluster / name
    path.write_text(f"#!{sys.executable}\nimport json, os, pathlib, signal, sys, time\n{body}\n")
    path.chmod(0o755)


RANK = """
from fastgrpo.distributed.slurm import slurm_environment
home = pathlib.Path(sys.argv[0]).parent
found = slurm_environment()
attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
(home / f"attempt_{attempt}_rank_{found['RANK']}.json").write_text(json.dumps([found, sys.argv[1:]]))
"""


def test_the_sbatch_example_saves_when_it_is_warned_and_queues_again(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NODES", "2")
    body = """
if attempt == "0":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (home / f"ready_{found['RANK']}").touch()
    time.sleep(60)
"""
    put_command(cluster, "fastgrpo", RANK + body)
    subprocess.run(["sbatch", str(EXAMPLES / "train.sbatch"), "name=a b", "seed=1"], check=True)
    deadline = time.monotonic() + 30
    while len(list(cluster.glob("ready_*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    fake_slurm.warn(cluster)
    assert fake_slurm.wait(cluster, 30) == 0
    for attempt in (0, 1):
        ranks = [json.loads((cluster / f"attempt_{attempt}_rank_{rank}.json").read_text()) for rank in range(4)]
        assert [found["LOCAL_RANK"] for found, _ in ranks] == ["0", "1", "0", "1"]
        assert {(found["WORLD_SIZE"], found["MASTER_ADDR"]) for found, _ in ranks} == {("4", "localhost")}
        assert len({found["MASTER_PORT"] for found, _ in ranks}) == 1
        assert all(words == ["train", "name=a b", "seed=1"] for _, words in ranks)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_sbatch_example_does_not_queue_again_unless_it_was_warned(cluster: Path, code: int) -> None:
    # 75 without a warning: scancel
    put_command(cluster, "fastgrpo", f"sys.exit({code})")
    subprocess.run(["sbatch", str(EXAMPLES / "train.sbatch")], check=True)
    assert fake_slurm.wait(cluster, 30) == code
    assert not (cluster / "attempt_1.log").exists()


def test_the_torchrun_example_starts_an_agent_on_each_node_that_meets_the_others(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TASKS", "1")
    monkeypatch.setenv("FAKE_NODES", "2")
    put_command(cluster, "torchrun", "home = pathlib.Path(sys.argv[0]).parent\nprint(json.dumps(sys.argv[1:]))")
    subprocess.run(["sbatch", str(EXAMPLES / "train_torchrun.sbatch"), "name=a b"], check=True)
    assert fake_slurm.wait(cluster, 30) == 0
    agents = [json.loads(line) for line in (cluster / "attempt_0.log").read_text().splitlines()]
    assert agents[0] == agents[1]
    port = 20_000 + int(fake_slurm.job_of(cluster))
    options = {"--nnodes=2", "--nproc-per-node=2", "--max-restarts=3", f"--rdzv-endpoint=localhost:{port}"}
    assert options < set(agents[0])
    assert agents[0][-4:] == ["-m", "fastgrpo.cli", "train", "name=a b"]


def job_overrides(tmp_path: Path, weights: Path, *overrides: str) -> list[str]:
    jobs = [f"job.folder={tmp_path / 'jobs'}", "job.tasks_per_node=2", "job.gpus_per_node=0", "job.cpus_per_task=1"]
    return make_overrides(weights, tmp_path / "run", *jobs, "job.timeout_min=20", *overrides)


ASKED = {"--signal=USR1@600", "--requeue", "--job-name=flow_grpo"}


def asked(cluster: Path) -> set[str]:
    """Of these, what the script asks Slurm for."""
    lines = (cluster / "script").read_text().splitlines()
    return {line.removeprefix("#SBATCH ") for line in lines} & ASKED


def iterations(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()] if path.exists() else []


def run_as_submitit_starts_it(world: World, config: DictConfig, job: int) -> None:
    """As a process of a job on this machine."""
    os.environ |= {"SUBMITIT_LOCAL_GLOBALID": os.environ.pop("RANK"), "SUBMITIT_LOCAL_NTASKS": "2"}
    os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": str(job)}
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    with WITHOUT_CURVES:
        run_rank(config)


def test_processes_that_submitit_starts_train_as_ranks(tiny_weights: Path, tmp_path: Path, on_ranks: Ranks) -> None:
    config = make_config(tiny_weights, tmp_path / "run")
    on_ranks(2, run_as_submitit_starts_it, config, free_port() - 10_000)
    assert iterations(tmp_path / "run") == [0, 1, 2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()]
    assert [len(row["waited"]) for row in rows] == [2, 2]


def run_as_slurm_starts_it(world: World, config: DictConfig, job: int, attempt: int) -> tuple[str, int]:
    """As a task of a step, which the first attempt warns in its second iteration; how it ends and how often queued."""
    rank = os.environ.pop("RANK")
    os.environ |= STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"}
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_RESTART_COUNT": str(attempt)}
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    queued: list[int] = []
    step = Trainer.step

    def step_and_be_warned(trainer: Trainer) -> dict[str, float]:
        if attempt == 0 and trainer.iteration == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(trainer)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: queued.append(number))
    try:
        with mock.patch.object(Trainer, "step", step_and_be_warned), WITHOUT_CURVES:
            run_rank(config)
    except Preempted as error:
        return str(error), len(queued)
    finally:
        signal.signal(signal.SIGUSR1, before)
    return "done", len(queued)


def test_ranks_that_slurm_warns_save_and_ask_to_be_queued_and_then_go_on_by_themselves(
    tiny_weights: Path, tmp_path: Path, on_ranks: Ranks
) -> None:
    config, job = make_config(tiny_weights, tmp_path / "run", "train.iterations=4"), job_with_a_free_port()
    first = on_ranks(2, run_as_slurm_starts_it, config, job, 0)
    said = f"stopped by signal {int(signal.SIGUSR1)} after iteration 2, which is saved; go on with resume=true"
    assert first == [(said, 1)] * 2
    assert on_ranks(2, run_as_slurm_starts_it, config, job, 1) == [("done", 0)] * 2
    assert iterations(tmp_path / "run") == [0, 1, 2, 3, 4]


@needs_submitit
def test_what_slurm_gets_asks_for_a_warning_and_to_be_queued_again(
    tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "pathlib.Path(sys.argv[0]).with_name('script').write_text(open(sys.argv[-1]).read())\nsys.exit(1)"
    put_command(cluster, "sbatch", body)
    with pytest.raises(TrainingError, match="the job failed"):
        submit(load_config("submit", job_overrides(tmp_path, tmp_path / "weights")))
    assert asked(cluster) == ASKED


@pytest.mark.slow
@needs_submitit
def test_a_submitted_job_trains_on_two_ranks_of_this_machine(tiny_weights: Path, tmp_path: Path) -> None:
    overrides = job_overrides(tmp_path, tiny_weights, "job.launcher=submitit_local")
    assert submit(load_config("submit", overrides)) == tmp_path / "run"
    assert iterations(tmp_path / "run") == [0, 1, 2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "ranks.jsonl").read_text().splitlines()]
    assert [len(row["waited"]) for row in rows] == [2, 2]


@pytest.mark.slow
@needs_submitit
def test_a_job_that_slurm_warns_saves_queues_again_and_ends_as_one_run(
    tiny_weights: Path, tmp_path: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = job_overrides(tmp_path, tiny_weights, "train.iterations=20", "evaluate.every=20", "checkpoint.every=20")

    def warn_in_the_middle() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(iterations(tmp_path / "run")) < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        fake_slurm.warn(cluster)

    warner = threading.Thread(target=warn_in_the_middle)
    warner.start()
    assert submit(load_config("submit", overrides)) == tmp_path / "run"
    warner.join()
    assert fake_slurm.wait(cluster, 30) == 0
    assert (cluster / "attempt_1.log").exists()
    assert iterations(tmp_path / "run") == list(range(21))
    assert asked(cluster) == ASKED


@pytest.mark.parametrize(("stopped_by", "num_queued"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_only_slurms_warning_queues_a_job_again(
    stopped_by: signal.Signals, num_queued: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``scancel`` sends SIGTERM."""

    def stopped(config: DictConfig) -> None:
        raise Preempted(stopped_by, 7)

    monkeypatch.setattr("fastgrpo.commands.submit.train", stopped)
    queued: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: queued.append(number))
    try:
        with pytest.raises(Preempted, match=f"stopped by signal {int(stopped_by)} after iteration 7, which is saved"):
            run_rank(OmegaConf.create())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(queued) == num_queued


@pytest.mark.slow
@needs_submitit
def test_a_submitted_run_that_fails_says_what_its_first_rank_said(tiny_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    overrides = job_overrides(tmp_path, tiny_weights, "job.launcher=submitit_local", "job.tasks_per_node=1")
    with pytest.raises(ValueError, match="resume=true"):
        submit(load_config("submit", overrides))


def test_an_unknown_launcher_is_refused(tmp_path: Path) -> None:
    config = load_config("submit", job_overrides(tmp_path, tmp_path / "weights", "job.launcher=pbs"))
    with pytest.raises(ValueError, match="submitit_slurm, submitit_local, got 'pbs'"):
        submit(config)


def test_submit_without_its_extra_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher", None)
    config = load_config("submit", job_overrides(tmp_path, tmp_path / "weights"))
    with pytest.raises(ValueError, match=r"fastgrpo\[slurm\]"):
        submit(config)
