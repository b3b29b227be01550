"""The TensorRT backend: what it builds, keeps, builds again and refuses.  The builder is the test's own, on the CPU."""

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from fastgrpo.compile.networks import DriftError, Eager, cast_pixels
from fastgrpo.composing import compose_config
from fastgrpo.config import load_config
from fastgrpo.pieces import build
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import golden_set
from fastgrpo.tensorrt.backend import TensorRT
from fastgrpo.tensorrt.cache import cache_key
from fastgrpo.tensorrt.export import Profile, export
from fastgrpo.tensorrt.onnx_builder import OnnxBuilder
from tests.tensorrt.reward_networks import NETWORKS, blip, blip_inputs, clip, clip_inputs


@dataclass(frozen=True, kw_only=True)
class ProgramBuilder:
    """The exported program itself as an engine; ``error`` is added to the score of each batch's first image."""

    version: str = "1"
    error: float = field(default=0.0, repr=False)
    built: list[Profile] = field(default_factory=list, repr=False)
    batches: list[int] = field(default_factory=list, repr=False)

    @property
    def versions(self) -> dict[str, str]:
        return {"program": self.version}

    def build(self, program: ExportedProgram, profile: Profile, device: torch.device) -> bytes:
        self.built.append(profile)
        content = io.BytesIO()
        torch.export.save(program, content)
        return content.getvalue()

    def load(self, plan: bytes, names: Sequence[str], device: torch.device) -> Callable[..., Tensor]:
        try:
            network = torch.export.load(io.BytesIO(plan)).module()
        except Exception as error:
            raise ValueError("no program") from error

        def run(*inputs: Tensor) -> Tensor:
            self.batches.append(len(inputs[0]))
            with torch.no_grad():
                return network(*inputs) + self.error * (torch.arange(len(inputs[0])) == 0)

        return run


@pytest.fixture
def backend(tmp_path: Path) -> TensorRT:
    return TensorRT(
        builder=ProgramBuilder(), directory=str(tmp_path / "engines"), precision="float32", max_batch=16, opt_batch=8
    )


def built(backend: TensorRT) -> list[Profile]:
    assert isinstance(backend.builder, ProgramBuilder)
    return backend.builder.built


def batches(backend: TensorRT) -> list[int]:
    assert isinstance(backend.builder, ProgramBuilder)
    return backend.builder.batches


def engines(backend: TensorRT) -> list[Path]:
    return [path for path in backend.cache.directory.iterdir() if path.is_dir()]


def test_any_batch_scores_as_eager_does_in_parts_of_at_most_max_batch(backend: TensorRT) -> None:
    network = blip()
    run = backend(network, blip_inputs())
    for batch in (1, 2, 7, 8, 16, 17, 40):
        seen = len(batches(backend))
        with torch.no_grad():
            torch.testing.assert_close(run(*blip_inputs(batch)), network(*blip_inputs(batch)), atol=1e-6, rtol=0)
        parts = batches(backend)[seen:]
        assert sum(parts) == batch
        assert max(parts) <= 16


def test_a_second_process_finds_the_engine(backend: TensorRT) -> None:
    first = backend(clip(), clip_inputs())
    again = replace(backend, builder=ProgramBuilder())
    second = again(clip(), clip_inputs())
    assert built(backend) == [Profile(opt_batch=8, max_batch=16)]
    assert built(again) == []
    assert torch.equal(first(*clip_inputs(3)), second(*clip_inputs(3)))


def test_the_key_is_the_same_in_another_process(backend: TensorRT) -> None:
    code = (
        "import sys, torch; from tests.tensorrt.test_backend import key_of, ProgramBuilder, TensorRT;"
        "print(key_of(TensorRT(builder=ProgramBuilder(), directory=sys.argv[1], precision='float32', max_batch=16,"
        "opt_batch=8)))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, backend.directory]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert answer.stdout.strip() == key_of(backend)


def key_of(backend: TensorRT, network=None, inputs=None) -> str:
    network, inputs = network or clip(), inputs or clip_inputs()
    program = export(
        network.copy_to("cpu", backend.dtype), (inputs[0].to(backend.dtype), *inputs[1:]), backend.max_batch
    )
    return cache_key(backend.facts(network.fingerprint, program, torch.device("cpu")))


def other_weights(backend: TensorRT) -> tuple:
    network = clip()
    with torch.no_grad():
        next(network.parameters()).flatten()[0] += 1e-3
    return backend, network, clip_inputs()


def other_graph(backend: TensorRT) -> tuple:
    class Doubled(type(clip())):  # type: ignore[misc]
        def forward(self, pixels_BCHW: Tensor, texts_BD: Tensor) -> Tensor:
            return 2 * super().forward(pixels_BCHW, texts_BD)

    # what a new version of this package does: the same class name and weights, another computation
    Doubled.__qualname__ = type(clip()).__qualname__
    network = clip()
    network.__class__ = Doubled
    assert network.fingerprint == clip().fingerprint
    return backend, network, clip_inputs()


def other_shape(backend: TensorRT) -> tuple:
    inputs = blip_inputs()
    return backend, blip(), (inputs[0], inputs[1][:, :8], inputs[2][:, :8])


CHANGES: dict[str, Callable[[TensorRT], tuple]] = {
    "weights": other_weights,
    "graph": other_graph,
    "precision": lambda backend: (replace(backend, precision="bfloat16"), clip(), clip_inputs()),
    "max_batch": lambda backend: (replace(backend, max_batch=32), clip(), clip_inputs()),
    "opt_batch": lambda backend: (replace(backend, opt_batch=16), clip(), clip_inputs()),
    "version": lambda backend: (replace(backend, builder=ProgramBuilder(version="2")), clip(), clip_inputs()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_is_built_again_when_what_it_depends_on_changes(backend: TensorRT, change: str) -> None:
    backend(clip(), clip_inputs())
    changed, network, inputs = CHANGES[change](backend)
    before = len(built(changed))
    run = changed(network, inputs)
    assert len(built(changed)) == before + 1
    assert len(engines(backend)) == 2
    with torch.no_grad():
        expected_B = network(*inputs)
    score_B = run(inputs[0].to(changed.dtype), *inputs[1:])
    torch.testing.assert_close(score_B, expected_B, atol=1e-6 if changed.precision == "float32" else 0.02, rtol=0)


def test_the_shape_and_type_of_every_input_is_part_of_the_key(backend: TensorRT) -> None:
    _, network, shorter = other_shape(backend)
    tokens_as_int32 = (blip_inputs()[0], blip_inputs()[1].int(), blip_inputs()[2])
    keys = {key_of(backend, network, inputs) for inputs in (blip_inputs(), shorter, tokens_as_int32)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "fact", ["weights", "graph", "inputs", "precision", "profile", "builder", "device", "versions"]
)
def test_the_key_is_made_of_these_facts_and_no_others(backend: TensorRT, fact: str) -> None:
    network = clip()
    program = export(network.copy_to("cpu", torch.float32), clip_inputs(), 16)
    facts = backend.facts(network.fingerprint, program, torch.device("cpu"))
    assert len(facts) == 8
    assert cache_key({**facts, fact: "other"}) != cache_key(facts)
    assert facts["versions"] == {"torch": torch.__version__, "program": "1"}


def test_a_damaged_engine_is_built_again(backend: TensorRT) -> None:
    backend(clip(), clip_inputs())
    (engine,) = engines(backend)
    plan = (engine / "engine.plan").read_bytes()
    (engine / "engine.plan").write_bytes(plan[:-7] + b"garbage")
    backend(clip(), clip_inputs())
    assert len(built(backend)) == 2
    assert (engine / "engine.plan").read_bytes() != plan[:-7] + b"garbage"


def test_an_engine_that_no_longer_loads_is_built_again(backend: TensorRT) -> None:
    backend(clip(), clip_inputs())
    # whole, by its manifest, but nothing that the builder knows
    backend.cache.write(key_of(backend), b"of another world", {})
    backend(clip(), clip_inputs())
    assert len(built(backend)) == 2
    backend(clip(), clip_inputs())
    assert len(built(backend)) == 2


def test_an_engine_that_drifts_is_refused_and_not_kept(backend: TensorRT) -> None:
    wrong = replace(backend, builder=ProgramBuilder(error=0.1))
    with pytest.raises(DriftError, match=r"the TensorRT engine \(float32\) drifts by .*\nimage +eager +compiled\n"):
        wrong(clip(), clip_inputs())
    assert engines(backend) == []
    # a tolerance above it is the user's way to accept it: 0.1 is 15% of this network's spread
    run = replace(wrong, tolerances={"float32": 0.2})(clip(), clip_inputs())
    with torch.no_grad():
        off_B = run(*clip_inputs()) - clip()(*clip_inputs())
    torch.testing.assert_close(off_B, torch.tensor([0.1] + [0.0] * 7), atol=1e-5, rtol=0)


def test_an_engine_from_disk_that_drifts_is_refused_and_removed(backend: TensorRT) -> None:
    backend(clip(), clip_inputs())
    with pytest.raises(DriftError, match="drifts by"):
        replace(backend, builder=ProgramBuilder(error=0.1))(clip(), clip_inputs())
    assert engines(backend) == []


def test_nothing_is_kept_of_an_engine_that_answers_nan(backend: TensorRT) -> None:
    with pytest.raises(DriftError, match="nan"):
        replace(backend, builder=ProgramBuilder(error=torch.nan))(clip(), clip_inputs())
    assert engines(backend) == []


def test_the_shipped_scorer_runs_on_it(backend: TensorRT) -> None:
    golden = golden_set()
    eager_B = clip_score(path="shapes", backend=Eager())(golden.images_BCHW, golden.prompts)
    half = clip_score(path="shapes", backend=replace(backend, precision="float16"))
    # float16 measured: 2e-4 of a spread of .84
    torch.testing.assert_close(half(golden.images_BCHW, golden.prompts), eager_B, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "int8"}, "precision must be float32, bfloat16 or float16, got 'int8'"),
        ({"opt_batch": 32}, "opt_batch must lie in 1 to max_batch and max_batch be at least 2, got 32 and 16"),
        ({"opt_batch": 1, "max_batch": 1}, "max_batch be at least 2, got 1 and 1"),
        ({"tolerances": {}}, "reward_backend.tolerances.float32 is None"),
        ({"directory": "/proc/engines"}, "/proc/engines cannot be made"),
    ],
    ids=str,
)
def test_bad_fields_are_refused_at_construction(backend: TensorRT, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(backend, **fields)


def test_the_config_keeps_engines_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (
        compose_config("train", ["reward_backend=tensorrt"]).reward_backend.directory == f"{tmp_path}/fastgrpo/engines"
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compose_config("train", ["reward_backend=tensorrt"]).reward_backend.directory == "~/.cache/fastgrpo/engines"


def test_the_config_becomes_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config("train", ["reward_backend=tensorrt", "reward_backend.max_batch=96"]).reward_backend
    config.builder = {"_target_": "tests.tensorrt.test_backend.ProgramBuilder", "version": "3"}
    backend = build(config)
    assert backend == TensorRT(
        builder=backend.builder,
        directory=f"{tmp_path}/fastgrpo/engines",
        precision="float16",
        max_batch=96,
        opt_batch=64,
    )
    assert backend.builder.versions == {"program": "3"}


@pytest.mark.parametrize(
    ("builder", "extra"), [("torch_tensorrt", "tensorrt"), ("onnx", "tensorrt"), ("onnx_rtx", "tensorrt-rtx")]
)
def test_a_missing_package_is_named_with_its_extra_at_construction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builder: str, extra: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # what the import system answers with where a package is not installed
    for name in ("torch_tensorrt", "tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    config = load_config("train", ["reward_backend=tensorrt", f"reward_backend/builder={builder}"]).reward_backend
    with pytest.raises(ValueError, match=rf"cannot be imported .* pip install 'fastgrpo\[{extra}\]'"):
        build(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named_at_construction() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs pip install 'fastgrpo[tensorrt-rtx]'")
    with pytest.raises(ValueError, match=r"runs on NVIDIA GPUs, and torch sees none; use reward_backend=inductor"):
        OnnxBuilder(library="tensorrt_rtx")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("builder", ["torch_tensorrt", "onnx", "onnx_rtx"])
def test_on_a_gpu_engines_score_as_eager_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, builder: str, name: str, precision: str
) -> None:
    package = {"torch_tensorrt": "torch_tensorrt", "onnx": "tensorrt", "onnx_rtx": "tensorrt_rtx"}[builder]
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    overrides = [
        "reward_backend=tensorrt",
        f"reward_backend/builder={builder}",
        f"reward_backend.precision={precision}",
    ]
    backend = build(load_config("train", overrides).reward_backend)
    make, inputs = NETWORKS[name]
    network = make()
    run = backend(network, tuple(part.cuda() for part in inputs()))
    exact = network.copy_to("cuda", torch.float32)
    # the default stream, on which TensorRT may not work, and one of the caller's own
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        for batch in (1, 2, 7, 64, 65):
            on_gpu = tuple(part.cuda() for part in inputs(batch))
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream), torch.no_grad():
                score_B = run(*cast_pixels(on_gpu, backend.dtype))
                difference = (score_B - exact(*on_gpu)).abs().max().item()
            # these scores lie within 1 of each other
            assert difference < {"float32": 1e-3, "float16": 5e-3, "bfloat16": 5e-2}[precision]
    again = build(load_config("train", overrides).reward_backend)
    assert [path for path in again.cache.directory.iterdir() if path.is_dir()]
    loaded = again(network, tuple(part.cuda() for part in inputs()))
    torch.testing.assert_close(loaded(*cast_pixels(on_gpu, backend.dtype)), score_B)
