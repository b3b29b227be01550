"""Iterations of ``fastgrpo train`` as it is, without evaluation or checkpoint: seconds of each stage, images, memory.

    python -m benchmarks.first_contact.iteration nft experiment=nft_sd35 model.weights=random ...

The first iteration compiles and is shown apart.  With --profile the fourth is traced, by runtime.profile.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import table, write_report
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.shapes.captions import training_captions

_ITERATIONS = 4
_STAGES = ("iteration", "encode", "search", "rollout", "reward", "update")
_COLUMNS = ("images_per_second", *(f"seconds/{stage}" for stage in _STAGES), "peak_bytes", "compilations")


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        run, prompts = Path(scratch) / "run", Path(scratch) / "prompts.txt"
        prompts.write_text("".join(f"{caption}\n" for caption in training_captions()), encoding="utf-8")
        trainer = build_trainer(load_config("train", [*overrides(arguments, prompts), f"output={run}"]))
        rows = []
        for _ in range(_ITERATIONS):
            rows.append(trainer.profile(trainer.step))
            print({name: rows[-1].get(name) for name in _COLUMNS}, flush=True)
        told = _keep_profile(run / "profile")
    # of a profile only the third is undisturbed
    timed = rows[2:3] if arguments.profile else rows[1:]
    medians = {name: statistics.median(row[name] for row in timed) for name in _COLUMNS}
    cells = [[name, f"{medians[name]:.4g}", f"{rows[0][name]:.4g}"] for name in _COLUMNS]
    body = "\n\n".join([table(["", f"median of {len(timed)}", "first, which compiles"], cells), told]).strip()
    theme = "first_contact.iteration"
    title = f"{arguments.name}: iterations on random weights" if torch.cuda.is_available() else arguments.name
    print(write_report(theme, title=title, body=body, data={"name": arguments.name, "iterations": rows}))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*", help="of the config")
    return parser.parse_intermixed_args(words)


def overrides(arguments: argparse.Namespace, prompts: Path) -> list[str]:
    """Of the config."""
    return [
        *arguments.overrides,
        f"prompts.path={prompts}",
        f"prompts.held_out={prompts}",
        f"train.iterations={_ITERATIONS}",
        f"runtime.profile={str(arguments.profile).lower()}",
    ]


def _keep_profile(directory: Path) -> str:
    """Its page; the trace goes beside the results."""
    if not directory.exists():
        return ""
    shutil.copy(directory / "trace.json.gz", os.environ["BENCHMARK_RESULTS"])
    return (directory / "table.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
