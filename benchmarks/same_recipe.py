"""Is a run the same on 1, 2 and 4 processes, and when it is resumed on another number of them?

    python -m benchmarks.same_recipe

Each run is ``fastgrpo train`` on the embedded model under torchrun, 3 prompts x 5 samples an iteration, which neither 2
nor 4 divides.  Every line of metrics.jsonl, timings and memory aside, and the trained weights are compared with those
of the run on one process.  Only the order of sums differs, so that a metric may differ by rounding of its own size, and
a weight by rounding of the way that weights went (``rounding.py``).  Exits with 1 where that is not so.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.report import table, write_report
from benchmarks.rounding import ALLOWED, WEIGHTS, Run, beyond_rounding, differences
from fastgrpo.assembly import build_trainer
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.config import load_config
from fastgrpo.records.json_lines import read_rows

SETTINGS = (
    "train.prompts_per_iteration=3",
    "train.group_size=5",
    "evaluate.images_per_prompt=1",
    "checkpoint.every=5",
    # also where a leg ends, which evaluates
    "evaluate.every=5",
    "runtime.threads=1",
    "runtime.micro_batch=4",
    "runtime.device=cpu",
    # a leg that ends earlier is otherwise to fall earlier
    "train.decay_share=0",
)
FLOAT64 = ("model.dtype=float64", "model.decode_dtype=float64")
# the verifier of the shapes counts pixels, which in float32 are one more or less by rounding
SMOOTH = ("reward=custom", "reward.path=benchmarks.same_recipe.contrast")
LORA = ("algorithm=flow_grpo", "train.optimizer_steps=2")
SEARCH = ("algorithm=smart_grpo", "algorithm.noise.candidates=6", "algorithm.noise.elites=3")
# the reference, shares of the samples, and rollouts of an old policy that is saved too
IMAGES = (
    "algorithm=nft",
    "algorithm.objective.kl_coef=0.1",
    "train.updates=3",
    "train.optimizer_steps=2",
    "train.old_policy_growth=0.05",
)
FULL = ("algorithm=flow_grpo", "adaptation=full", "train.learning_rate=1e-5")


@dataclass(frozen=True)
class Case:
    """Runs with the same ``overrides``: each a sequence of (ranks, iterations to end at), resumed from its second.

    dtype: whose rounding is allowed, a key of ``ALLOWED``.
    """

    name: str
    overrides: tuple[str, ...]
    dtype: str = "float64"
    runs: tuple[tuple[tuple[int, int], ...], ...] = (((2, 20),), ((4, 20),))

    @property
    def iterations(self) -> int:
        return self.runs[0][-1][1]


LATENTS_ROUND = "float64, images"
RESUMED = (((4, 5), (1, 10), (2, 15), (4, 20)),)
SHORT = (((2, 5),), ((4, 5),))
CASES = (
    Case("LoRA, Flow-GRPO, 2 optimizer steps", (*LORA, *FLOAT64)),
    Case("LoRA, Smart-GRPO", (*SEARCH, *FLOAT64)),
    Case("full fine-tuning, gathered for the rollout", (*FULL, *FLOAT64)),
    Case("full fine-tuning, sharded in the rollout", (*FULL, "adaptation.rollout_weights=sharded", *FLOAT64)),
    Case("LoRA, NFT, 3 updates of 2 optimizer steps", (*IMAGES, *FLOAT64), LATENTS_ROUND),
    Case("LoRA, NFT, saved on 4 and resumed on 1, 2 and 4", (*IMAGES, *FLOAT64), LATENTS_ROUND, runs=RESUMED),
    Case("full fine-tuning, NFT", (*IMAGES, *FULL[1:], *FLOAT64)),
    Case("LoRA, saved on 4 and resumed on 1, 2 and 4", (*LORA, *FLOAT64), runs=RESUMED),
    Case("full fine-tuning, saved on 4 and resumed on 1, 2 and 4", (*FULL, *FLOAT64), runs=RESUMED),
    Case("LoRA, Smart-GRPO, float32", (*SEARCH, *SMOOTH), "float32", SHORT),
    Case("full fine-tuning, float32", (*FULL, *SMOOTH), "float32", SHORT),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    rows, data, ok = [], [], True
    for case in CASES:
        if arguments.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            alone = train(Path(directory) / "alone", case.overrides, ((1, case.iterations),))
            for number, legs in enumerate(case.runs):
                found = differences(alone, train(Path(directory) / str(number), case.overrides, legs))
                beyond = beyond_rounding(found, case.dtype)
                ok &= not beyond
                rows.append(_row(case, legs, found, beyond))
                data.append({"case": case.name, "legs": legs, "differences": found, "overrides": case.overrides})
                print(*rows[-1], sep=" | ", flush=True)
    header = ["run", "processes", "iterations", "metrics", "in", "allowed", "weights", "allowed", "beyond"]
    body = (
        f"{table(header, rows)}\n\nThe largest difference to the run on one process: of any number in metrics.jsonl "
        "but timings and memory, relative to its largest value in the run (loss and rank correlations, whose terms "
        "cancel, to 1); of any tensor of trained weights, root mean square, relative to the root mean square way that "
        "all weights went."
    )
    write_report("same_recipe", title="The same run on several processes", body=body, data={"runs": data})
    sys.exit(not ok)


def _row(case: Case, legs: Sequence[tuple[int, int]], found: Mapping[str, float], beyond: Iterable[str]) -> list[str]:
    metric = max((key for key in found if key != WEIGHTS), key=found.__getitem__)
    allowed = ALLOWED[case.dtype]
    return [
        case.name,
        ", then ".join(str(ranks) for ranks, _ in legs),
        str(case.iterations),
        f"{found[metric]:.1e}",
        metric if found[metric] else "none",
        f"{allowed.metrics:g}",
        f"{found[WEIGHTS]:.1e}",
        f"{allowed.weights:g}",
        ", ".join(beyond) or "none",
    ]


def train(output: Path, overrides: Sequence[str], legs: Sequence[tuple[int, int]]) -> Run:
    """A run that is stopped after each of its legs and resumed on another number of processes."""
    settings = [*SETTINGS, *overrides]
    for number, (ranks, iterations) in enumerate(legs):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        python = [sys.executable] if ranks == 1 else command
        leg = [f"output={output}", f"train.iterations={iterations}", f"resume={'true' if number else 'false'}"]
        subprocess.run([*python, "-m", "fastgrpo", "train", *settings, *leg], check=True, stdout=subprocess.DEVNULL)
    fresh = build_trainer(load_config("train", [*settings, f"output={output}_fresh"]))
    checkpoints = Checkpoint(output / "checkpoints", every=1, keep=1)
    ended = checkpoints.load(output / f"checkpoints/step_{legs[-1][1]:06d}").weights
    began = {name: weight.detach() for name, weight in fresh.model.trainable.items()}
    return Run(rows=read_rows(output / "metrics.jsonl"), began=began, ended=ended)


def contrast(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward that follows the last bit of an image, where bytes of a JPEG and counts of pixels jump."""
    return images_BCHW.std(dim=(1, 2, 3))


if __name__ == "__main__":
    main()
