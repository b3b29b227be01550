"""What the memory plan predicts of a run at full size, and what its allocator then gives out.

    python -m benchmarks.memory_plan                         all cases, compiled and not, a result in results/
    python -m benchmarks.memory_plan nft flux --compile eager    some of them
    python -m benchmarks.memory_plan --check                 prints, and writes nothing
    python -m benchmarks.memory_plan --counted               the device is a stand-in that computes nothing

Each case is a run of two iterations with random weights, whose batches are planned from the device's memory.
planned: the largest peak that the plan expects of any stage.  allocated: torch.cuda.max_memory_allocated over both
iterations.  Evaluation, checkpoints and text encoders are not in it.  Needs a CUDA device, or a stand-in for one.

The result is written after each case.  One that raises has the reason in its row, and the exit code is then 1.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.report import table, write_report
from fastgrpo.assembly import build_trainer
from fastgrpo.config import load_config
from fastgrpo.memory.plan import KEYS, SHARE

ITERATIONS = 2
_SD35 = ("experiment=flow_grpo_sd35",)
# 8 prompts x 8 samples, two optimizer steps; FLUX 4 x 24, of a whole iteration's 48 prompts
CASES: dict[str, tuple[str, ...]] = {
    "guidance_kl": _SD35,
    "guidance": (*_SD35, "algorithm.objective.kl_coef=0"),
    "kl": (*_SD35, "model.guidance_scale=1"),
    "plain": (*_SD35, "algorithm.objective.kl_coef=0", "model.guidance_scale=1"),
    "reweight": (*_SD35, "algorithm.objective.kl_coef=0", "train.gradients=reweight"),
    "nft": ("experiment=nft_sd35",),
    "checkpointing": (*_SD35, "runtime.checkpointing=true"),
    "flux": ("experiment=flow_grpo_flux", "train.prompts_per_iteration=4"),
    "full": (*_SD35, "adaptation=full", "algorithm.objective.kl_coef=0", "adaptation.keep_reference=false"),
}
COMPILE = ("eager", "blocks", "graphs")
_PROMPTS = [f"picture {number} of a lighthouse" for number in range(96)]
_LEFT = 2**28


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case; sizes in bytes, ``stages`` by config key."""

    case: str
    compile: str
    batches: dict[str, int]
    stages: dict[str, int]
    planned: int
    allocated: int
    reserved: int
    memory: int
    checkpointing: bool

    @property
    def error(self) -> float:
        """Of the plan, as a share of what was allocated."""
        return self.planned / self.allocated - 1


@dataclass(frozen=True)
class Failure:
    """A case that raised."""

    case: str
    compile: str
    reason: str


def main(arguments_of_shell: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all without")
    parser.add_argument("--compile", nargs="+", choices=COMPILE, default=["eager", "blocks"])
    parser.add_argument("--counted", action="store_true", help="say that the device computes nothing")
    parser.add_argument("--check", action="store_true", help="write no result")
    arguments = parser.parse_args(arguments_of_shell)
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"unknown case {', '.join(sorted(unknown))}; the cases are {', '.join(CASES)}")
    rows: list[Row] = []
    failures: list[Failure] = []
    for case in arguments.cases or CASES:
        for compile in arguments.compile:
            # whatever it is that a case cannot do, the others are asked
            try:
                row = measure(case, compile)
            except Exception as error:
                failures.append(Failure(case, compile, f"{type(error).__name__}: {error}"))
                print(f"{case} {compile}: {failures[-1].reason}", flush=True)
            else:
                rows.append(row)
                print(f"{case} {compile}: planned {_gib(row.planned)}, allocated {_gib(row.allocated)}", flush=True)
            if not arguments.check:
                path = _write(rows, failures, counted=arguments.counted)
    print(_body(rows, failures, counted=arguments.counted))
    if not arguments.check:
        print(path)
    return int(bool(failures))


def _write(rows: Sequence[Row], failures: Sequence[Failure], *, counted: bool) -> Path:
    """The result as far as it has come."""
    data = {
        "rows": [asdict(row) | {"error": row.error} for row in rows],
        "failures": [asdict(failure) for failure in failures],
    }
    title = "What the memory plan predicts, and what a run allocates"
    body = _body(rows, failures, counted=counted)
    return write_report("memory_plan", title=title, body=body, data=data, counted=counted)


def _body(rows: Sequence[Row], failures: Sequence[Failure], *, counted: bool) -> str:
    legend = [_legend(rows[0].memory, counted=counted)] if rows else []
    return "\n\n".join([*legend, _table(rows, failures)])


def measure(case: str, compile: str) -> Row:
    """Plan and run one case."""
    _clear()
    with TemporaryDirectory() as directory:
        path = Path(directory)
        for name in ("train", "held_out"):
            (path / f"{name}.txt").write_text("\n".join(f"{name}: {prompt}" for prompt in _PROMPTS))
        overrides = (
            f"output={path / 'run'}",
            f"prompts.path={path / 'train.txt'}",
            f"prompts.held_out={path / 'held_out.txt'}",
            "runtime.device=cuda",
            "runtime.micro_batch=0",
            "model.weights=random",
            # on the host: no network of a reward takes memory that would not be there in another run
            "reward=jpeg_compressibility",
            "reward.golden=false",
            f"compile={compile}",
        )
        trainer = build_trainer(load_config("train", [*CASES[case], *overrides]))
        plan = trainer.plan
        assert plan is not None, "sizes of 0 are planned"
        torch.cuda.reset_peak_memory_stats()
        for _ in range(ITERATIONS):
            trainer.step()
        torch.cuda.synchronize()
        return Row(
            case=case,
            compile=compile,
            batches={choice.key: choice.batch for choice in plan.choices.values()},
            stages={choice.key: choice.peak_bytes for choice in plan.choices.values()},
            planned=plan.peak_bytes,
            allocated=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            memory=plan.memory,
            checkpointing=plan.checkpointing,
        )


def _clear() -> None:
    """RuntimeError where something of an earlier case is left that would be taken for the next one's."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if (left := torch.cuda.memory_allocated()) > _LEFT:
        raise RuntimeError(f"{_gib(left)} are left of the case before; run this one alone")


def _legend(memory: int, *, counted: bool) -> str:
    how = (
        "Counted, not measured: the device is a stand-in, whose allocator is PyTorch's own, and which computes nothing."
        if counted
        else "Measured."
    )
    return (
        f"{how}  Runs at full size on {_gib(memory)}, {SHARE:.0%} of it to be planned, random weights at 512x512, two "
        "iterations each.  `planned` is the largest peak that the plan expects of any stage, `allocated` "
        "torch.cuda.max_memory_allocated over both iterations, `reserved` what the allocator kept, `error` that of the "
        "plan.  Batches are of training, sampling and decoding."
    )


def _table(rows: Sequence[Row], failures: Sequence[Failure]) -> str:
    header = ["case", "compile", "checkpointing", "batches", "planned", "allocated", "error", "reserved"]
    keys = ("training", "sampling", "decoding")
    return table(
        header,
        [
            [
                row.case,
                row.compile,
                "on" if row.checkpointing else "off",
                ", ".join(str(row.batches[KEYS[key]]) for key in keys),
                _gib(row.planned),
                _gib(row.allocated),
                f"{row.error:+.1%}",
                _gib(row.reserved),
            ]
            for row in rows
        ]
        + [[one.case, one.compile, *[""] * (len(header) - 3), _line(one.reason)] for one in failures],
    )


def _line(reason: str) -> str:
    """The first, as a cell."""
    return next(iter(reason.splitlines()), "").replace("|", "/")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
