"""What a forked child of test_resume.py runs: a whole training run, in a process that can be killed."""

import sys

from fastgrpo.config import load_config
from fastgrpo.training import train


def run(overrides: list[str], output: str) -> None:
    # into a file, since a killed child must not share the terminal of pytest
    with open(output, "a", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        train(load_config("train", overrides))
