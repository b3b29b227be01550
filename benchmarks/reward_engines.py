"""What reward networks become: ONNX files, and real TensorRT-RTX engines for GPUs that need not be here.

    python -m benchmarks.reward_engines             the shipped scorer and networks in miniature, a result in results/
    python -m benchmarks.reward_engines --full      and the official sizes, of random weights, in float16
    python -m benchmarks.reward_engines --check     prints, and writes nothing

drift: of the ONNX file, run by onnxruntime on the CPU, from eager float32 on the golden images, as a share of the
spread of their scores.  On a machine with a GPU engines are built for it as well, and timed against eager.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import cuda_clock
from benchmarks.report import table, write_report
from benchmarks.rewards.networks import ARCHITECTURES
from fastgrpo.compile.networks import Eager, as_dtype, cast_pixels, check_drift
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.tensorrt.backend import TensorRT
from fastgrpo.tensorrt.export import Input, Profile, export, inputs_of, save_onnx
from fastgrpo.tensorrt.onnx_builder import OnnxBuilder, build_plan
from fastgrpo.tensorrt.torch_builder import TorchTensorRTBuilder

PROFILE = Profile(opt_batch=64, max_batch=64)
# compute capabilities that TensorRT-RTX builds for and H100 machines' neighbours have: A100, and L4, L40 and RTX 40
TARGETS = ("SM80", "SM89")
# one of each architecture: the others are CLIPs too
REWARDS = ("clip_score", "image_reward")
PRECISIONS = ("float32", "float16", "bfloat16")
_BATCHES = (1, 2, 7)
# weights above which a CPU takes minutes for 8 images in float16
_LARGE = 100_000_000
_ANY_DRIFT = dict.fromkeys(PRECISIONS, float("inf"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network in one precision."""

    network: str
    weights: int
    precision: str
    onnx_bytes: int
    export_seconds: float
    engine_bytes: dict[str, int]
    build_seconds: dict[str, float]
    # None where onnxruntime has no such kernels on a CPU
    drift: float | None
    # None for a network that is large
    eager_drift: float | None
    spread: float


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="official sizes as well: minutes, and 10 GB of memory")
    parser.add_argument("--check", action="store_true", help="write no result")
    arguments = parser.parse_args(arguments_of_shell)
    cases: list[tuple[str, Callable[[], NetworkReward], Sequence[str]]] = [
        ("shapes scorer", partial(clip_score, path="shapes", backend=Eager()), PRECISIONS),
        *((f"{ARCHITECTURES[name].name} in miniature", partial(_random, name, True), PRECISIONS) for name in REWARDS),
    ]
    if arguments.full:
        cases += [(ARCHITECTURES[name].name, partial(_random, name, False), ("float16",)) for name in REWARDS]
    rows, speeds = [], []
    for name, make, precisions in cases:
        reward = make()
        for precision in precisions:
            rows.append(_measure(name, reward, precision))
            print(rows[-1], flush=True)
        speeds += _speeds(name, reward)
        del reward
        gc.collect()
    print(_engine_table(rows), _speed_text(speeds), sep="\n\n")
    if not arguments.check:
        data: dict[str, Any] = {"targets": TARGETS, "profile": asdict(PROFILE), "packages": _packages()}
        data |= {"rows": [asdict(row) for row in rows], "speeds": speeds}
        body = "\n\n".join([_legend(), _engine_table(rows), _speed_text(speeds)])
        print(write_report("reward_engines", title="Reward networks as TensorRT engines", body=body, data=data))


def _random(name: str, miniature: bool) -> NetworkReward:
    architecture = ARCHITECTURES[name]
    return architecture.reward(architecture.network(miniature), Eager(), miniature)


def _golden(reward: NetworkReward, device: torch.device) -> tuple[Tensor, ...]:
    golden = golden_set()
    rows = reward.encode(golden.prompts, device)
    return (reward.preprocess(golden.images_BCHW.to(device)), *(row.clone() for row in rows))


def _measure(name: str, reward: NetworkReward, precision: str) -> Row:
    """Export, build for every target, and score with onnxruntime and with eager in that precision."""
    import tensorrt_rtx

    network, dtype, golden = reward.network, as_dtype(precision), _golden(reward, torch.device("cpu"))
    cast = network.copy_to("cpu", dtype)
    weights = sum(weight.numel() for weight in network.parameters())
    eager_drift = None if weights > _LARGE else check_drift("eager", cast, dtype, network, golden, _ANY_DRIFT)
    scores_B = network(*golden)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "network.onnx"
        start = time.perf_counter()
        program = export(cast, cast_pixels(golden, dtype), PROFILE.max_batch)
        inputs = inputs_of(program)
        save_onnx(program, path)
        export_seconds = time.perf_counter() - start
        del program, cast
        gc.collect()
        onnx_bytes = sum(file.stat().st_size for file in Path(directory).iterdir())
        engine_bytes, build_seconds = {}, {}
        for target in TARGETS:
            start = time.perf_counter()
            engine_bytes[target] = len(build_plan(tensorrt_rtx, path, inputs, PROFILE, (target,)))
            build_seconds[target] = time.perf_counter() - start
        drift = None
        if precision != "bfloat16":
            run = _OnnxRuntime(path, inputs)
            drift = check_drift("onnxruntime", run, dtype, network, golden, _ANY_DRIFT)
            _check_batches(
                run, scores_B, cast_pixels(golden, dtype), drift, _BATCHES[: 2 if weights > _LARGE else None]
            )
    return Row(
        network=name,
        weights=weights,
        precision=precision,
        onnx_bytes=onnx_bytes,
        export_seconds=export_seconds,
        engine_bytes=engine_bytes,
        build_seconds=build_seconds,
        drift=drift,
        eager_drift=eager_drift,
        spread=(scores_B.max() - scores_B.min()).item(),
    )


class _OnnxRuntime:
    """The ONNX file on the CPU."""

    def __init__(self, path: Path, inputs: Sequence[Input]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(path), options)
        self._names = [part.name for part in inputs]

    def __call__(self, *inputs: Tensor) -> Tensor:
        named = {name: part.numpy() for name, part in zip(self._names, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, named)[0])


def _check_batches(
    run: _OnnxRuntime, scores_B: Tensor, golden: tuple[Tensor, ...], drift: float, batches: Sequence[int]
) -> None:
    """ValueError if the scores of other batches than the one that was traced are worse than its own."""
    spread = (scores_B.max() - scores_B.min()).item()
    for batch in batches:
        rows = torch.arange(batch) % len(scores_B)
        error = (run(*(part[rows] for part in golden)) - scores_B[rows]).abs().max().item() / spread
        # float32 sums in another order
        if not error <= 1.5 * drift + 1e-4:
            raise ValueError(
                f"a batch of {batch} is off by {error:.2%} of the spread, the golden images by {drift:.2%}"
            )


def _speeds(name: str, reward: NetworkReward) -> list[dict[str, Any]]:
    """Milliseconds of 64 images, eager float16 and each engine that can be built for the GPU of this machine."""
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", 0)
    golden = _golden(reward, device)
    images = tuple(part.repeat(8, *(1,) * (part.dim() - 1)) for part in cast_pixels(golden, torch.float16))
    speeds = []
    with TemporaryDirectory() as directory:
        ways: dict[str, Callable[[], Any]] = {"eager": lambda: Eager(precision="float16")}
        for way, package, builder in (
            ("torch_tensorrt", "torch_tensorrt", TorchTensorRTBuilder),
            ("onnx, tensorrt", "tensorrt", partial(OnnxBuilder, library="tensorrt")),
            ("onnx, tensorrt_rtx", "tensorrt_rtx", partial(OnnxBuilder, library="tensorrt_rtx")),
        ):
            if find_spec(package) is not None:
                ways[way] = partial(_engine_backend, builder, f"{directory}/engines")
        runs = {way: make()(reward.network, golden) for way, make in ways.items()}
        for run in (*runs.values(), *runs.values()):
            run(*images)
        seconds: dict[str, list[float]] = {way: [] for way in runs}
        for _ in range(20):
            for way, run in runs.items():
                seconds[way].append(cuda_clock(partial(run, *images)))
    median = {way: statistics.median(times) for way, times in seconds.items()}
    for way, times in seconds.items():
        speeds.append(
            {"network": name, "way": way, "seconds": times, "times_eager": median["eager"] / statistics.median(times)}
        )
    return speeds


def _engine_backend(builder: Callable[[], Any], directory: str) -> TensorRT:
    # random weights score all images much alike, which makes any drift a large share
    return TensorRT(builder=builder(), directory=directory, precision="float16", tolerances=_ANY_DRIFT)


def _packages() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript
    import tensorrt_rtx

    return {module.__name__: module.__version__ for module in (tensorrt_rtx, onnx, onnxscript, onnxruntime)}


def _legend() -> str:
    packages = ", ".join(f"{name} {version}" for name, version in _packages().items())
    return (
        f"Engines of {packages}, for batches of 1 to {PROFILE.max_batch}, built without a GPU of that kind.  Drift: "
        "the largest error on the 8 golden images, as a share of the spread of their scores in eager float32; of the "
        "ONNX file by onnxruntime on a CPU, and of eager PyTorch in that precision.  Official sizes and miniatures "
        "have random weights, whose scores of different images are much alike: the same error is a larger share."
    )


def _engine_table(rows: list[Row]) -> str:
    header = ["network", "weights", "precision", "ONNX", *(f"engine, {target}" for target in TARGETS)]
    header += [*(f"s, {target}" for target in TARGETS), "spread", "drift, ONNX", "drift, eager"]
    lines = []
    for row in rows:
        line = [row.network, f"{row.weights / 1e6:.3g} M", row.precision, _megabytes(row.onnx_bytes)]
        line += [_megabytes(row.engine_bytes[target]) for target in TARGETS]
        line += [f"{row.build_seconds[target]:.1f}" for target in TARGETS]
        line += [
            f"{row.spread:.2g}",
            "" if row.drift is None else f"{row.drift:.1e}",
            "" if row.eager_drift is None else f"{row.eager_drift:.1e}",
        ]
        lines.append(line)
    return table(header, lines)


def _speed_text(speeds: list[dict[str, Any]]) -> str:
    if not torch.cuda.is_available():
        return "Speed of engines: not measured, torch sees no GPU."
    lines = [
        [row["network"], row["way"], f"{statistics.median(row['seconds']) * 1e3:.2f}", f"{row['times_eager']:.2f}"]
        for row in speeds
    ]
    return table(["network", "way, float16", "ms for 64 images", "times eager"], lines)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    with torch.no_grad():
        main()
