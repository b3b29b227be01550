"""A run of a measurement in a process of its own, on one thread, which leaves its result in a file."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run_apart(name: str, command: Sequence[str], result: Path) -> None:
    """RuntimeError, naming the log beside ``result``, where the command fails."""
    print(f"{name} ...", flush=True)
    # before torch is imported: a thread more would be counted, and make both slower
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = result.with_suffix(".log")
    with open(log, "w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed; see {log}")
