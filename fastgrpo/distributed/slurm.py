"""The ranks of a Slurm step: ``srun fastgrpo train`` needs no torchrun in between.

Every task of the step is a rank.  What torch.distributed asks for follows from what Slurm puts into the environment:
    RANK, WORLD_SIZE              task of the step, and number of them
    LOCAL_RANK, LOCAL_WORLD_SIZE  task of its node, and number of them
    MASTER_ADDR                   the node of task 0, first of the step's
    MASTER_PORT                   10000 + (16 job + step) mod 20000: alike on all tasks, and below the ports of clients
Sources: the output environment of Slurm's srun(1), and its step ids in slurm.h.
"""

import os
import re
from collections.abc import Mapping

# ids from here on are not of steps that srun made: the batch script, an interactive shell, what holds a node's limits
_NO_STEP = 0xFFFFFFF0
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


def slurm_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes this task of a step a rank; nothing where there is one task, no step, or another launcher's rank."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_ID") or _NO_STEP) >= _NO_STEP:
        return {}
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return {}
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    num_local = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[int(environment["SLURM_NODEID"])]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(num_local),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(_FIRST_PORT + (16 * job + step) % _NUM_PORTS),
    }


def first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: gpu007 of ``gpu[007-012,31],login1``."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", nodes)
    assert first is not None, f"{nodes!r} is no list of nodes"
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """The number on each node, of a list as Slurm writes it: [8, 8, 4] of ``8(x2),4``."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    assert all(parts), f"{counts!r} is no list of tasks per node"
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
