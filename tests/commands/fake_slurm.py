"""Slurm's commands in miniature, for one job at a time on this machine: sbatch, srun, scontrol, sacct.

    install(directory, job)   writes them there; with it first in PATH a script or submitit believes in a cluster
    warn(directory)           what --signal asks for, sent as it says: to the script alone (B:) or to the tasks
    wait(directory)           until the job is over; its exit code

Ports follow from the number of the job, so clusters of tests that run beside each other need other ones.
The tasks of a step run on localhost: ``FAKE_NODES`` nodes with ``FAKE_TASKS`` tasks each.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol", "sacct")


def install(directory: Path, job: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "job").write_text(job)
    for command in COMMANDS:
        path = directory / command
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {command} {directory} "$@"\n')
        path.chmod(0o755)


def warn(directory: Path) -> None:
    script = (directory / "script").read_text()
    found = re.search(r"^#SBATCH --signal=(B:)?(\w+)@\d+$", script, re.MULTILINE)
    assert found is not None
    number = signal.Signals[f"SIG{found[2]}"]
    files = [directory / "script.pid"] if found[1] else list(directory.glob("task_*.pid"))
    for file in files:
        os.kill(int(file.read_text()), number)


def wait(directory: Path, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while not (directory / "exit_code").exists():
        assert time.monotonic() < deadline, "the job is not over: " + logs(directory)
        time.sleep(0.05)
    return int((directory / "exit_code").read_text())


def job_of(directory: Path) -> str:
    return (directory / "job").read_text()


def logs(directory: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(directory.glob("*.log")))


def sbatch(directory: Path, *words: str) -> int:
    """Copies the script and leaves a controller that runs it, again for each requeue."""
    shutil.copy(words[0], directory / "script")
    (directory / "exit_code").unlink(missing_ok=True)
    arguments = [sys.executable, __file__, "controller", str(directory), *words[1:]]
    with (directory / "controller.log").open("w") as log:
        subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    print(f"Submitted batch job {job_of(directory)}")
    return 0


def controller(directory: Path, *arguments: str) -> int:
    num_nodes, num_tasks = int(os.environ["FAKE_NODES"]), int(os.environ["FAKE_TASKS"])
    environment = os.environ | {
        "SLURM_JOB_ID": job_of(directory),
        "SLURM_JOB_NUM_NODES": str(num_nodes),
        "SLURM_NNODES": str(num_nodes),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": str(num_nodes * num_tasks),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_GPUS_ON_NODE": "2",
        # of the script, which is no step that srun made
        "SLURM_STEP_ID": str(0xFFFFFFFB),
    }
    attempt = 0
    while True:
        with (directory / f"attempt_{attempt}.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", str(directory / "script"), *arguments], env=environment, stdout=log, stderr=log
            )
            (directory / "script.pid").write_text(str(process.pid))
            code = process.wait()
        if not (directory / "requeued").exists():
            break
        (directory / "requeued").unlink()
        attempt += 1
        environment["SLURM_RESTART_COUNT"] = str(attempt)
    (directory / "exit_code.new").write_text(str(code))
    (directory / "exit_code.new").rename(directory / "exit_code")
    return 0


def srun(directory: Path, *words: str) -> int:
    """Starts the tasks, passes signals on to them, and leaves with the highest of their exit codes."""
    num_nodes, num_tasks = int(os.environ["FAKE_NODES"]), int(os.environ["FAKE_TASKS"])
    patterns, command = _options(list(words))
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(num_nodes * num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{num_tasks}(x{num_nodes})",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks: list[subprocess.Popen[bytes]] = []

    def named(rank: int) -> list[str]:
        return [pattern.replace("%j", job_of(directory)).replace("%t", str(rank)) for pattern in patterns]

    def pass_on(number: int, _: object) -> None:
        for task in tasks:
            task.send_signal(number)

    for rank in range(num_nodes * num_tasks):
        own = {
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(rank // num_tasks),
            "SLURM_LOCALID": str(rank % num_tasks),
        }
        # left open: a task writes as long as it lives
        out, err = (os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND) if name else None for name in named(rank))
        tasks.append(subprocess.Popen(command, env=os.environ | step | own, stdout=out, stderr=err))
        (directory / f"task_{rank}.pid").write_text(str(tasks[-1].pid))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, pass_on)
    return max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks])


def _options(words: list[str]) -> tuple[tuple[str, str], list[str]]:
    """Files of --output and --error, and the command."""
    files = {"--output": "", "--error": ""}
    while words[0].startswith("-"):
        name, _, value = words.pop(0).partition("=")
        if name in files:
            files[name] = value or words.pop(0)
    return (files["--output"], files["--error"]), words


def scontrol(directory: Path, *words: str) -> int:
    if words[0] == "requeue":
        assert words[1] == job_of(directory)
        (directory / "requeued").touch()
    else:
        assert words[:2] == ("show", "hostnames"), words
        print("localhost")
    return 0


def sacct(directory: Path, *words: str) -> int:
    state = "COMPLETED" if (directory / "exit_code").exists() else "RUNNING"
    print(f"JobID|State|NodeList\n{job_of(directory)}|{state}|localhost")
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:]))
