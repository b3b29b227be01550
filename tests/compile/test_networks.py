"""Backends of reward networks: one compilation for every batch size, and no code that scores otherwise than eager."""

import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastgrpo.compile.networks import TOLERANCES, Auto, DriftError, Eager, Inductor, check_drift
from fastgrpo.composing import compose_config
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import golden_set
from tests.tensorrt.reward_networks import NETWORKS, blip, blip_inputs, clip, clip_inputs

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile for the CPU needs g++, which is not installed"
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "blip"])
def test_inductor_scores_as_eager_does_for_any_batch_and_compiles_once(name: str) -> None:
    make, inputs = NETWORKS[name]
    network = make()
    torch._dynamo.reset()
    counters.clear()
    run = Inductor(precision="float32")(network, inputs())
    for batch in (1, 2, 7, 8, 9, 64, 100):
        with torch.no_grad():
            expected_B = network(*inputs(batch))
        torch.testing.assert_close(run(*inputs(batch)), expected_B, atol=1e-5, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@needs_compiler
def test_inductor_computes_the_trunk_in_its_precision_and_scores_in_float32() -> None:
    network = clip()
    run = Inductor(precision="bfloat16")(network, clip_inputs())
    pixels_BCHW, texts_BD = clip_inputs(5)
    with torch.no_grad():
        rounded_B = network.copy_to("cpu", torch.bfloat16)(pixels_BCHW.bfloat16(), texts_BD)
        exact_B = network(pixels_BCHW, texts_BD)
    score_B = run(pixels_BCHW.bfloat16(), texts_BD)
    assert score_B.dtype == torch.float32
    # close to eager bfloat16, whose own error is far above float32's rounding
    assert (score_B - rounded_B).abs().max() < 0.02
    assert (score_B - exact_B).abs().max() > 1e-5


@needs_compiler
@pytest.mark.slow
def test_the_shipped_scorer_runs_on_inductor() -> None:
    golden = golden_set()
    eager_B = clip_score(path="shapes", backend=Eager())(golden.images_BCHW, golden.prompts)
    inductor = clip_score(path="shapes", backend=Inductor(precision="float32"))
    torch.testing.assert_close(inductor(golden.images_BCHW, golden.prompts), eager_B, atol=1e-5, rtol=0)
    one = inductor(golden.images_BCHW[3:4], golden.prompts[3:4])
    torch.testing.assert_close(one, eager_B[3:4], atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Off:
    """The network with an error of ``by`` on the score of image 2."""

    network: torch.nn.Module
    by: float

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs) + self.by * (torch.arange(len(inputs[0])) == 2)


def test_drift_is_the_largest_error_over_the_spread_of_the_golden_scores() -> None:
    network = blip()
    with torch.no_grad():
        eager_B = network(*blip_inputs())
    spread = (eager_B.max() - eager_B.min()).item()
    tolerances = {"float32": 0.02}
    assert check_drift("it", network, torch.float32, network, blip_inputs(), tolerances) == 0
    drift = check_drift("it", Off(network, 0.01 * spread), torch.float32, network, blip_inputs(), tolerances)
    assert drift == pytest.approx(0.01, abs=1e-5)
    with pytest.raises(DriftError) as error:
        check_drift("the engine", Off(network, 0.05 * spread), torch.float32, network, blip_inputs(), tolerances)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("the engine drifts by 5.00% of the spread of eager's float32 scores, more than 2.00%")
    # a line an image: which, eager's score, the other's
    row, eager, other = lines[2 + 2].split()
    assert (row, float(eager)) == ("2", pytest.approx(eager_B[2].item(), rel=1e-5))
    assert float(other) - float(eager) == pytest.approx(0.05 * spread, rel=1e-3)
    assert "reward_backend=eager" in lines[-1]


def test_the_remedy_for_a_drifting_float16_is_a_wider_type() -> None:
    network = clip()
    half = network.copy_to("cpu", torch.float16)
    with pytest.raises(DriftError, match=r"use reward_backend.precision=bfloat16 or float32"):
        check_drift("it", Off(half, 1.0), torch.float16, network, clip_inputs(), {"float16": 0.01})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *_: torch.zeros(8, 1), r"answered torch.float32 \[8, 1\] for 8 images, eager float32 \[8\]"),
        (lambda *_: torch.zeros(8, dtype=torch.float16), r"answered torch.float16 \[8\]"),
        (lambda *_: torch.full((8,), torch.nan), r"drifts by nan%"),
        (lambda *_: torch.full((8,), torch.inf), r"drifts by inf%"),
    ],
    ids=["shape", "dtype", "nan", "inf"],
)
def test_an_answer_that_is_no_score_is_refused(answer, message: str) -> None:
    with pytest.raises(DriftError, match=message):
        check_drift("it", answer, torch.float32, clip(), clip_inputs(), {"float32": 0.1})


def test_equal_golden_scores_cannot_vouch_for_anything() -> None:
    network = blip()
    torch.nn.init.zeros_(network.get_parameter("head.layers.7.weight"))
    with pytest.raises(DriftError, match="cannot be compared"):
        check_drift("it", network, torch.float32, network, blip_inputs(), {"float32": 0.1})


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_auto_is_eager_float32_on_a_cpu_and_inductor_in_its_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    network, auto = clip(), Auto(precision="bfloat16")
    assert (auto.dtype_on(CPU), auto.dtype_on(CUDA)) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        expected_B = network(*clip_inputs())
        assert torch.equal(auto(network, clip_inputs())(*clip_inputs()), expected_B)
    compiled: list[Any] = []
    monkeypatch.setattr(Inductor, "__call__", lambda *asked: compiled.append(asked))
    on_gpu: Any = (SimpleNamespace(device=CUDA),)
    auto(network, on_gpu)
    assert compiled == [(auto, network, on_gpu)]


@pytest.mark.parametrize("command", ["train", "doctor", "evaluate", "sample", "serve-reward"])
def test_rewards_are_compiled_on_a_gpu_unless_told_otherwise(command: str) -> None:
    config = compose_config(command)
    assert config.reward_backend._target_ == "fastgrpo.compile.networks.Auto"
    assert config.reward_backend.precision == "float16"


@pytest.mark.parametrize("option", ["auto", "inductor", "tensorrt"])
def test_the_configs_accept_what_the_code_does(option: str) -> None:
    assert compose_config("train", [f"reward_backend={option}"]).reward_backend.tolerances == TOLERANCES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "int8"}, "precision must be float32, bfloat16 or float16, got 'int8'"),
        ({"mode": "reduce-overhead"}, "reward_backend.mode must be default or max-autotune-no-cudagraphs"),
        ({"tolerances": {"float32": 0.1}}, "reward_backend.tolerances.float16 is None"),
        ({"tolerances": {"float16": 0.0}}, "reward_backend.tolerances.float16 is 0.0"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inductor(**fields)
