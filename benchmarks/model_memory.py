"""What each model needs of a GPU's memory by the plan that a run makes, counted at full size without a GPU.

    python -m benchmarks.model_memory                       all models, sizes of memory and resolutions: a result
    python -m benchmarks.model_memory z_image --check       one model; prints, and writes nothing

A case is NFT without guidance with the model's adapters, 8 prompts x 8 samples, prompts as long as the model reads,
no rewards.  Its micro-batch is how many samples are trained at once; where not one fits, the case says so.
The result is written after each case.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.report import table, write_report
from fastgrpo.commands.memory import counted_plan, parse_bytes
from fastgrpo.config import load_config
from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.plan import TRAINING

MODELS = (
    "sd35_medium",
    "sd35_large",
    "flux_dev",
    "z_image",
    "qwen_image",
    "qwen_image_21",
    "flux2_klein",
)
MEMORY = ("24GiB", "80GB", "141GB")
# all sizes of memory at the first, the middle one at the second
RESOLUTIONS = (512, 1024)


@dataclass(frozen=True, kw_only=True)
class Case:
    """micro_batch is 0 where not one sample fits; peak is in bytes, of a training pass."""

    model: str
    resolution: int
    memory: str
    micro_batch: int
    checkpointing: bool
    peak: int

    @property
    def cell(self) -> str:
        if self.micro_batch == 0:
            return "does not fit"
        return f"{self.micro_batch}" + " with checkpointing" * self.checkpointing


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all without")
    parser.add_argument("--check", action="store_true", help="write no result")
    arguments = parser.parse_args(arguments_of_shell)
    torch.set_num_threads(1)
    cases: list[Case] = []
    for model in arguments.models or MODELS:
        for resolution in RESOLUTIONS:
            for memory in MEMORY if resolution == RESOLUTIONS[0] else MEMORY[1:2]:
                cases.append(count(model, resolution, memory))
                print(f"{model} {resolution} {memory}: {cases[-1].cell}", flush=True)
                if not arguments.check:
                    path = _write(cases)
    print(_table(cases))
    if not arguments.check:
        print(path)


def count(model: str, resolution: int, memory: str) -> Case:
    """Plan one case."""
    overrides = [f"model={model}", "model.weights=random", f"model.resolution={resolution}", "model.guidance_scale=1"]
    config = load_config("doctor", [*overrides, "algorithm=nft", "num_prompts=8", "group_size=8"])
    try:
        plan = counted_plan(config, parse_bytes(memory))
    except DoesNotFit:
        return Case(model=model, resolution=resolution, memory=memory, micro_batch=0, checkpointing=True, peak=0)
    training = plan.choices[TRAINING]
    return Case(
        model=model,
        resolution=resolution,
        memory=memory,
        micro_batch=min(training.fitting, training.total),
        checkpointing=plan.checkpointing,
        peak=training.peak_bytes,
    )


def _write(cases: Sequence[Case]) -> Path:
    title = "What each model needs of a GPU's memory"
    data = {"cases": [asdict(case) for case in cases]}
    return write_report("model_memory", title=title, body=_table(cases), data=data, counted=True)


def _table(cases: Sequence[Case]) -> str:
    columns = [(RESOLUTIONS[0], memory) for memory in MEMORY] + [(RESOLUTIONS[1], MEMORY[1])]
    found = {(case.model, case.resolution, case.memory): case.cell for case in cases}
    header = ["micro-batch that fits", *(f"{memory} at {side}x{side}" for side, memory in columns)]
    models = dict.fromkeys(case.model for case in cases)
    return table(header, [[f"`{model}`", *(found.get((model, *column), "") for column in columns)] for model in models])


if __name__ == "__main__":
    main()
