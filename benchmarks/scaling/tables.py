"""The report: bytes and calls as measured beside what was expected, and predictions with all that they assume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.report import table
from benchmarks.scaling.cluster import Cluster
from benchmarks.scaling.efficiency import BFLOAT16, Prediction, Rows, Speed, passes, predict, told
from benchmarks.scaling.measured import Outcome, totals
from benchmarks.scaling.sharded import of_shards
from benchmarks.scaling.workload import Workload
from fastgrpo.distributed.traffic import wire_bytes

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# powers of two do not divide the images of two optimizer steps; these do
_DIVISORS = (144, 288, 576)
IMAGES_PER_GPU = 36
_SHOWN_GPUS = 32
_SHARDS = {"all": "over all GPUs", "node": "within a node"}


@dataclass(frozen=True)
class Predicted:
    """One row: a workload, where its weights are spread, and whether images a GPU or images in all are fixed."""

    workload: str
    shards: str
    scaling: str
    num_gpus: int
    num_images: int
    prediction: Prediction | None = None
    refusal: str = ""


def predictions(workloads: Sequence[Workload], cluster: Cluster, speed: Speed) -> list[Predicted]:
    """All rows of the report."""
    found = []
    for workload in workloads:
        for shards in ("all", "node") if workload.units else ("",):
            for scaling, numbers in (("weak", GPUS), ("strong", sorted({*GPUS, *_DIVISORS}))):
                for num_gpus in numbers:
                    num_images = IMAGES_PER_GPU * num_gpus if scaling == "weak" else workload.num_images
                    row = Predicted(workload.name, shards, scaling, num_gpus, num_images)
                    try:
                        one = predict(workload, num_gpus, num_images, cluster, speed, within_node=shards == "node")
                        found.append(replace(row, prediction=one))
                    except ValueError as error:
                        found.append(replace(row, refusal=str(error)))
    return found


def measured_part(runs: Sequence[Outcome]) -> str:
    """What was told in an iteration of each run."""
    rows = []
    for run in runs:
        both = totals(run.lines, lambda line: line.expected_calls), totals(run.lines, lambda line: line.measured_calls)
        for what, (calls, size) in both[1].items():
            stages = dict.fromkeys(f"{line.stage}, {line.kind}" for line in run.lines if line.what == what)
            wire = sum(line.wire_bytes for line in run.lines if line.what == what)
            expected_calls, expected_size = both[0][what]
            rows.append(
                [
                    run.case,
                    str(run.num_ranks),
                    what,
                    "; ".join(stages),
                    str(expected_calls),
                    str(calls),
                    f"{expected_size:,}",
                    f"{size:,}",
                    f"{wire:,.0f}",
                ]
            )
        if not run.lines:
            rows.append([run.case, str(run.num_ranks), "nothing", "", "0", "0", "0", "0", "0"])
    failed = [f"{run.case} on {run.num_ranks}: {failure}" for run in runs for failure in run.failures]
    agreement = (
        f"{sum(not run.failures for run in runs)} of {len(runs)} runs told, on every rank and in every iteration, to "
        "the byte and the call what was expected."
    )
    largest = max((run.largest for run in runs), default=0)
    header = ["run", "processes", "what", "stage, kind", "calls expected", "measured"]
    header += ["bytes expected", "measured", "on the wire of a rank"]
    return "\n\n".join(
        [
            "## Measured: an iteration on the embedded model",
            f"{agreement}  Expected is what follows from the sizes of weights, the number of samples and of rewards; "
            "measured is what PyTorch's dispatcher was asked for, whoever asked.  The largest exchange that is not of "
            f"weights or their gradients has {largest:,.0f} bytes of a rank, less than one latent: no latent and no "
            "image crossed ranks in an iteration.  Between iterations, evaluations send the images that are shown to "
            "the first rank.  Bytes on the wire are what a ring sends through the busiest rank's link in one "
            "direction.",
            table(header, rows),
            *(["Not as expected:", *(f"- {line}" for line in failed)] if failed else []),
        ]
    )


def predicted_part(workloads: Sequence[Workload], cluster: Cluster, speed: Speed) -> str:
    """Bytes of an iteration at full size, and efficiency."""
    found = predictions(workloads, cluster, speed)
    return "\n\n".join(
        [
            "## Predicted: H100 nodes",
            "No GPU was used.  Times are sums of modelled ones: of compute from counted FLOPs, of exchanges from data "
            "sheets and the constants of NCCL's own tuning model.  That a GPU is slower at small batches is not in "
            "them, nor are evaluations, checkpoints, text encoders and rewards.",
            table(
                ["assumed", "value"], [[name, f"{value:g}"] for name, value in {**vars(cluster), **vars(speed)}.items()]
            ),
            f"### Bytes of an iteration of {workloads[0].num_images} images on {_SHOWN_GPUS} GPUs",
            _bytes_table(workloads, _SHOWN_GPUS),
            "### Efficiency",
            "Even work over the seconds of an iteration.  Weak: "
            f"{IMAGES_PER_GPU} images a GPU; strong: 1152 images in all.  Lost is, as a share of the seconds: "
            "uneven, to the rank with most samples; filled up, in the last of its micro-batches; exchanges, where they "
            "are waited for; slowest, to the slowest of ranks that differ by "
            f"{speed.variation:.0%}.",
            *_findings(found),
            _efficiency_table(found),
        ]
    )


def _findings(found: Sequence[Predicted]) -> list[str]:
    """What the table says, in a sentence a workload."""
    lines = []
    for name, shards in dict.fromkeys((row.workload, row.shards) for row in found):
        made = [row for row in found if (row.workload, row.shards) == (name, shards)]
        weak = {row.num_gpus: row.prediction for row in made if row.scaling == "weak" and row.prediction}
        strong = {row.num_gpus: row.prediction for row in made if row.scaling == "strong" and row.prediction}
        most = weak[max(weak)]
        even = ", ".join(f"{strong[num].efficiency:.0%} on {num}" for num in _DIVISORS if num in strong)
        others = ", ".join(f"{one.efficiency:.0%} on {num}" for num, one in strong.items() if num in (128, 256, 512))
        title = f"{name}, spread {_SHARDS[shards]}" if shards else name
        lines.append(
            f"- {title}: weak, {most.efficiency:.0%} on {most.num_gpus} GPUs, "
            f"{most.exchange_seconds / most.seconds:.1%} lost to exchanges; strong, {even}, which divide the "
            f"images of an optimizer step, but {others}."
        )
    return ["\n".join(lines)]


def _bytes_table(workloads: Sequence[Workload], num_gpus: int) -> str:
    cells = []
    for workload in workloads:
        exchanges = told(workload, num_gpus, workload.num_images)
        if workload.units:
            rows = Rows.of(workload, num_gpus, workload.num_images)
            exchanges += of_shards(workload.units, num_gpus, passes(workload, rows), BFLOAT16)
        for what, stage, kind in dict.fromkeys((one.what, one.stage, one.kind) for one in exchanges):
            alike = [one for one in exchanges if (one.what, one.stage, one.kind) == (what, stage, kind)]
            calls, size = sum(one.calls for one in alike), sum(one.calls * one.payload_bytes for one in alike)
            wire = wire_bytes(kind, size, num_gpus)
            cells.append([workload.name, what, f"{stage}, {kind}", str(calls), f"{size:,}", f"{wire:,.0f}"])
    return table(["workload", "what", "stage, kind", "calls", "bytes", "on the wire of a GPU"], cells)


def _efficiency_table(rows: Sequence[Predicted]) -> str:
    header = ["workload", "weights spread", "scaling", "GPUs", "images", "seconds", "images/s"]
    header += ["uneven", "filled up", "exchanges", "slowest", "efficiency"]
    cells = []
    for row in rows:
        one = row.prediction
        begin = [row.workload, _SHARDS.get(row.shards, "not"), row.scaling, str(row.num_gpus), str(row.num_images)]
        if one is None:
            cells.append([*begin, *[""] * 6, "refused: less than one image a GPU in an optimizer step"])
            continue
        lost = (one.uneven_seconds, one.filled_seconds, one.exchange_seconds, one.slowest_seconds)
        cells.append(
            [
                *begin,
                f"{one.seconds:.3g}",
                f"{one.num_images / one.seconds:.0f}",
                *(f"{part / one.seconds:.1%}" for part in lost),
                f"{one.efficiency:.1%}",
            ]
        )
    return table(header, cells)
