"""What launched this process, and whether it did so before: a job that is started again goes on by itself.

A launch has one name a launcher.  torchrun: the process of the agent, which outlives the ranks it starts; on several
nodes one agent that was there before is enough, since a node may have been replaced.  Slurm: the job, which keeps its
number when it is requeued.  The names stand in the run directory.  A second launch finds other names there than its
own, so it never goes on with a run that it did not begin, however often its launcher starts it.
"""

import json
import os
import socket
from pathlib import Path

from fastgrpo.distributed.world import World

FILE = ".launch.json"


def is_restarted(directory: Path, world: World) -> bool:
    """Whether an earlier attempt of this launch wrote the run in ``directory``; all ranks call it, one answer."""
    names = _everyones(_names_of_former_attempts(), world)
    path = directory / FILE
    return world.on_first(lambda: path.exists() and not names.isdisjoint(json.loads(path.read_text())), "launch")


def mark_launch(directory: Path, world: World) -> None:
    """Say in ``directory`` that this launch writes the run there, before anything else does; all ranks call it.

    Where a user started it by hand there is nothing to say, and what an earlier launch said is gone.
    """
    names = _everyones(launch_names(), world)

    def write() -> None:
        if not names:
            (directory / FILE).unlink(missing_ok=True)
            return
        temporary = directory / f"{FILE}.temporary"
        temporary.write_text(json.dumps(sorted(names)) + "\n", encoding="utf-8")
        os.replace(temporary, directory / FILE)

    world.on_first(write, "launch")


def launch_names() -> list[str]:
    """Of whatever launched this process; none where a user did, by hand."""
    names = []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # the run id is what the user wrote, perhaps twice, or "none": the agent, which is this process's parent, is one
        names.append(f"torchrun {process_name(os.getppid())}")
    if os.environ.get("SUBMITIT_EXECUTOR") == "local":
        # as torchrun's agent: the process that starts the ranks of a job, and starts them again
        names.append(f"submitit {process_name(os.getppid())}")
    if job := os.environ.get("SLURM_JOB_ID"):
        names.append(f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {job}")
    return names


def _names_of_former_attempts() -> list[str]:
    # an agent starts ranks again only after a failure, or when nodes come and go, which no count tells; the script of a
    # Slurm job may run many commands, so there the count is asked
    is_requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return [name for name in launch_names() if is_requeued or not name.startswith("slurm ")]


def _everyones(names: list[str], world: World) -> set[str]:
    return {name for names in world.everyones(names, "launch") for name in names}


def process_name(pid: int) -> str:
    """Host, number and time of start, in ticks since the host's, of a living process: no two processes share it.

    A process that is gone, or killed and not yet buried, has no time of start; nor has any on a system without /proc.
    """
    try:
        # the second field is the command in brackets, and may hold blanks and brackets
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        fields = []
    start = fields[19] if fields and fields[0] not in "ZX" else ""
    return f"{socket.gethostname()} {pid} {start}".strip()


def machine_name() -> str:
    """Equal for processes that see each other in /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"process {os.getpid()}"
