"""A training run as a job of a cluster, by Hydra's submitit launcher.

The checked config is written beside the job's script; submitit starts one process a rank, which trains by it.  Minutes
before the job's time is over each rank gets SIGUSR1: the run saves after its iteration and stops, and the first rank
lets submitit queue the same job again, which goes on from there.
Sources: hydra-submitit-launcher 1.2, submitit 1.5 (job_environment.py).
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from fastgrpo.health import Preempted, TrainingError
from fastgrpo.parts import RunParts
from fastgrpo.training import train

_LAUNCHERS = ("submitit_slurm", "submitit_local")
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


def submit(config: DictConfig) -> Path:
    """Submit a checked ``submit`` config and wait for its end; returns the run directory.

    Raises what the run raised on its first rank, and TrainingError for a job that ended without an answer.
    """
    if config.job.launcher not in _LAUNCHERS:
        raise ValueError(f"job.launcher must be one of {', '.join(_LAUNCHERS)}, got {config.job.launcher!r}")
    # what can be known to fail is not worth a place in the queue
    RunParts.read(config)
    # read when submitit is imported, here and in the job
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"
    try:
        import hydra_plugins.hydra_submitit_launcher  # noqa: F401
        from submitit.core.utils import FailedSubmissionError, UncompletedJobError
    except ModuleNotFoundError as error:
        raise ValueError("submit needs submitit; install it with pip install 'fastgrpo[slurm]'") from error
    folder = Path(config.job.folder).absolute() / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.masked_copy(config, [str(key) for key in config if key != "job"]), folder / "config.yaml")
    print(f"what rank R of job J prints is in {folder}/J/J_R_log.out and .err", flush=True)
    run = hydra.main(version_base="1.3", config_path=str(folder), config_name="config")(run_rank)
    try:
        with _as_command_line("--multirun", *_settings(config, folder)):
            run()
    except (UncompletedJobError, FailedSubmissionError) as error:
        raise TrainingError(f"the job failed, see {folder}: {error}") from error
    return Path(config.output)


def run_rank(config: DictConfig) -> None:
    """What each process of the job does."""
    os.environ.update(local_environment())
    before = signal.getsignal(signal.SIGUSR1)
    try:
        train(config)
    except Preempted as error:
        # any other is a user's, who wants the job to end
        if error.signal_number == signal.SIGUSR1:
            # what submitit did with the signal before the run took it: queue the job again, and leave
            assert signal.getsignal(signal.SIGUSR1) is before
            signal.raise_signal(signal.SIGUSR1)
        raise


def local_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes a process that submitit started on this machine, without Slurm, a rank; nothing where it is alone."""
    if environment.get("SUBMITIT_EXECUTOR") != "local" or environment["SUBMITIT_LOCAL_NTASKS"] == "1":
        return {}
    size, rank = environment["SUBMITIT_LOCAL_NTASKS"], environment["SUBMITIT_LOCAL_GLOBALID"]
    # the job is named by the process that controls it
    port = _FIRST_PORT + int(environment["SUBMITIT_LOCAL_JOB_ID"]) % _NUM_PORTS
    return {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _settings(config: DictConfig, folder: Path) -> list[str]:
    """Overrides of Hydra's own config."""
    job = config.job
    launcher: dict[str, Any] = {
        key: job[key] for key in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min")
    }
    launcher["name"] = config.name
    if job.launcher == "submitit_slurm":
        slurm: Any = OmegaConf.to_container(job.slurm)
        launcher |= {key: value for key, value in slurm.items() if value is not None}
    # queued again also after a node failed, and where Slurm takes nodes for other jobs
    requeue = ["+hydra.launcher.additional_parameters.requeue=true"] if job.launcher == "submitit_slurm" else []
    return [
        f"hydra/launcher={job.launcher}",
        "hydra/hydra_logging=none",
        "hydra/job_logging=none",
        "hydra.output_subdir=null",
        f"hydra.sweep.dir={json.dumps(str(folder))}",
        f"hydra.launcher.submitit_folder={json.dumps(str(folder / '%j'))}",
        *requeue,
        *(f"hydra.launcher.{key}={json.dumps(value)}" for key, value in launcher.items()),
    ]


@contextmanager
def _as_command_line(*words: str) -> Iterator[None]:
    """Inside, Hydra reads ``words``, and raises what goes wrong instead of printing it and leaving."""
    before, is_full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [before[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = before
        if is_full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = is_full
