"""A launch that is tried again knows the run that it began; no other launch does."""

import os
import subprocess
from pathlib import Path

import pytest

from fastgrpo.distributed.launch import is_restarted, launch_names, mark_launch, process_name
from fastgrpo.distributed.world import World
from tests.ranks import Ranks, ranks_of_module

on_ranks = ranks_of_module()

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT")


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_a_run_begun_by_hand_is_never_gone_on_with(tmp_path: Path) -> None:
    assert launch_names() == []
    mark_launch(tmp_path, World())
    assert not is_restarted(tmp_path, World())


def ask_as_rank_of_another_agent(world: World, directory: Path) -> bool:
    # the process of the tests is its parent, as another agent would be
    os.environ |= {"TORCHELASTIC_RUN_ID": "night", "TORCHELASTIC_RESTART_COUNT": "1"}
    return is_restarted(directory, world)


def test_torchruns_next_attempt_goes_on_and_another_torchrun_of_the_same_id_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ranks: Ranks
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night")
    assert not is_restarted(tmp_path, World())
    mark_launch(tmp_path, World())
    assert is_restarted(tmp_path, World())
    assert on_ranks(1, ask_as_rank_of_another_agent, tmp_path) == [False]


def test_a_requeued_slurm_job_goes_on_and_a_second_command_of_the_job_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    mark_launch(tmp_path, World())
    assert not is_restarted(tmp_path, World())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_restarted(tmp_path, World())
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert not is_restarted(tmp_path, World())


def test_a_launch_that_takes_a_run_over_owns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job in ("17", "18"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        mark_launch(tmp_path, World())
    assert is_restarted(tmp_path, World())
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert not is_restarted(tmp_path, World())


def begin_and_return_on_another_node(world: World, directory: Path) -> tuple[bool, bool]:
    # each rank stands for a node: these have the first attempt, then the second one, in which one node is new
    os.environ["SLURM_JOB_ID"] = f"agent {world.rank}"
    mark_launch(directory, world)
    os.environ |= {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": f"agent {2 * world.rank}"}
    returned = is_restarted(directory, world)
    os.environ["SLURM_JOB_ID"] = f"agent {2 + world.rank}"
    return returned, is_restarted(directory, world)


def test_one_of_the_former_agents_is_enough_and_all_ranks_agree(tmp_path: Path, on_ranks: Ranks) -> None:
    assert on_ranks(2, begin_and_return_on_another_node, tmp_path) == [(True, False)] * 2


def test_processes_have_names_of_their_own_until_they_are_gone() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        name = process_name(process.pid)
        assert name == process_name(process.pid)
        assert name.split()[1] == str(process.pid)
        assert len(name.split()) == 3
        process.kill()
        # before it is buried as well
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_name(process.pid) != name
    assert process_name(process.pid) != name
