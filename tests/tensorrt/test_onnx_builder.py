"""Engines by ONNX, really built by TensorRT-RTX for SM80 and SM89, without a GPU; and what their ONNX file computes.

An engine can be run on its GPU only.  So its numbers are checked by a second path: onnxruntime on the file that the
engine is built from; and of the engine itself, what it says in plain text of its tensors, and for which GPU it is.
"""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.compile.networks import Eager, as_dtype, cast_pixels, check_drift
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.networks.network_reward import NetworkReward
from fastgrpo.tensorrt.engine import make_logger
from fastgrpo.tensorrt.export import Input, Profile, export, inputs_of, save_onnx
from fastgrpo.tensorrt.onnx_builder import build_plan, parse_onnx
from tests.tensorrt.reward_networks import NETWORKS

trt: Any = pytest.importorskip("tensorrt_rtx", reason="needs pip install 'fastgrpo[tensorrt-rtx]'")
pytest.importorskip("onnxscript", reason="needs pip install 'fastgrpo[tensorrt-rtx]'")
ort: Any = pytest.importorskip("onnxruntime", reason="needs pip install 'fastgrpo[test]'")

PROFILE = Profile(opt_batch=8, max_batch=64)
# onnxruntime against eager float32, as a share of the spread of the golden scores; measured at most 2e-6 and 8e-4
DRIFT = {"float32": 1e-5, "float16": 2e-3}
# the bit of each compute capability in an engine's header, byte 32
SM_BITS = {"SM80": 2, "SM89": 8}
CASES = [(name, precision) for name in NETWORKS for precision in ("float32", "float16")]


class OnnxFile:
    """A network's ONNX file, run by onnxruntime."""

    def __init__(self, network: Any, examples: tuple[Tensor, ...], precision: str, directory: Path) -> None:
        self.dtype = as_dtype(precision)
        program = export(network.copy_to("cpu", self.dtype), cast_pixels(examples, self.dtype), PROFILE.max_batch)
        self.inputs, self.path = inputs_of(program), directory / "network.onnx"
        save_onnx(program, self.path)
        self._session: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._session = self._session or ort.InferenceSession(str(self.path))
        named = zip([part.name for part in self.inputs], cast_pixels(inputs, self.dtype), strict=True)
        return torch.from_numpy(self._session.run(None, {name: part.numpy() for name, part in named})[0])


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, OnnxFile]:
    name, precision = request.param
    make, inputs = NETWORKS[name]
    return name, precision, OnnxFile(make(), inputs(), precision, tmp_path_factory.mktemp(name))


def test_the_onnx_file_scores_as_eager_float32_does(case: tuple[str, str, OnnxFile]) -> None:
    name, precision, file = case
    make, inputs = NETWORKS[name]
    network = make()
    check_drift("onnxruntime", file, file.dtype, network, inputs(), DRIFT)
    for batch in (1, 2, 7, 8, PROFILE.max_batch):
        with torch.no_grad():
            expected_B = network(*inputs(batch))
        # these scores lie within 1 of each other
        torch.testing.assert_close(file(*inputs(batch)), expected_B, atol=DRIFT[precision], rtol=0)


def test_the_network_is_strongly_typed_and_its_batch_open(case: tuple[str, str, OnnxFile]) -> None:
    name, precision, file = case
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network, _parser = parse_onnx(trt, builder, logger, file.path)
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    trunk = {"float32": trt.float32, "float16": trt.float16}[precision]
    rows = {
        "clip": {"pixels_bchw": (trunk, (-1, 3, 32, 32)), "texts_bd": (trt.float32, (-1, 24))},
        "blip": {
            "pixels_bchw": (trunk, (-1, 3, 32, 32)),
            "ids_bl": (trt.int64, (-1, 12)),
            "mask_bl": (trt.int64, (-1, 12)),
        },
        "aesthetic": {"pixels_bchw": (trunk, (-1, 3, 32, 32))},
    }[name]
    found = [network.get_input(i) for i in range(network.num_inputs)]
    assert {part.name: (part.dtype, tuple(part.shape)) for part in found} == rows
    assert network.num_outputs == 1
    assert (network.get_output(0).dtype, tuple(network.get_output(0).shape)) == (trt.float32, (-1,))
    # the products of the trunk are in its type, and only those of a head, at most five, in float32
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    products = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    assert products.count(trunk) >= 16
    assert products.count(trunk) + min(5, products.count(trt.float32)) >= len(products)


@pytest.mark.parametrize("sm", SM_BITS)
def test_an_engine_is_built_for_a_gpu_that_is_not_here(case: tuple[str, str, OnnxFile], sm: str) -> None:
    _, _, file = case
    plan = build_plan(trt, file.path, file.inputs, PROFILE, (sm,))
    described = tensors_in(plan)
    kinds = {torch.float32: "float", torch.float16: "half", torch.int64: "int64"}
    for part in file.inputs:
        assert described[part.name] == (kinds[part.dtype], " ".join(map(str, part.row)))
    (output,) = described.keys() - {part.name for part in file.inputs}
    assert described[output] == ("float", "")
    for part in file.inputs:
        # the profile: the smallest, the best and the largest shape as 64-bit numbers, close together
        shapes = [re.escape(struct.pack(f"<{len(shape)}q", *shape)) for shape in PROFILE.shapes(part.row)]
        assert re.search(b".{0,64}".join(shapes), plan, re.DOTALL)
    version = tuple(int(number) for number in trt.__version__.split("."))
    # where TensorRT-RTX 1.7 writes its own version, and the GPUs that the engine is for
    if version[:2] == (1, 7):
        assert tuple(plan[24:28]) == version
        assert plan[32] == SM_BITS[sm]


def tensors_in(plan: bytes) -> dict[str, tuple[str, str]]:
    """{name: (type, sizes behind the batch)} of the engine's inputs and outputs, from the text inside it."""
    text = plan.decode("latin-1")
    names = re.search(r'inputs=\{ ([^}]*"[^{}]*(?:\{[^}]*\}[^}]*)*) \}.*?outputs=\{ ([^}]*) \}', text, re.DOTALL)
    assert names, "the engine does not describe its tensors in text"
    wanted = {name.removesuffix(".1") for name in re.findall(r'"([^"]*)"', names[1] + names[2]) if "{" not in name}
    found = {}
    for dims, name, kind in re.findall(
        r'tensor=\{ [^}]*dims=\{ ([^}]*) \}[^}]*name="([^"]*)\.1".*?type=(\w+) \}', text
    ):
        if name in wanted:
            # the batch is a variable, in quotes
            batch, _, row = dims.partition(" ")
            assert batch.startswith('"'), f"the batch of {name} is {batch}"
            found[name] = (kind, row)
    return found


def test_a_network_that_tensorrt_cannot_parse_is_refused_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "network.onnx").write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match=rf"TensorRT {trt.__version__} cannot parse the network: "):
        build_plan(trt, tmp_path / "network.onnx", (), PROFILE, ("SM80",))


def test_a_profile_that_does_not_fit_is_refused_in_its_words(tmp_path: Path) -> None:
    make, inputs = NETWORKS["clip"]
    file = OnnxFile(make(), inputs(), "float16", tmp_path)
    wrong = [Input(part.name, part.dtype, (*part.row[:-1], part.row[-1] + 1)) for part in file.inputs]
    with pytest.raises(ValueError, match=r"TensorRT cannot build the engine: .*profile"):
        build_plan(trt, file.path, wrong, PROFILE, ("SM80",))


@pytest.mark.parametrize("precision", DRIFT)
def test_the_shipped_scorer_becomes_an_engine_too(tmp_path: Path, precision: str) -> None:
    reward = clip_score(path="shapes", backend=Eager())
    golden = golden_inputs(reward)
    file = OnnxFile(reward.network, golden, precision, tmp_path)
    check_drift("onnxruntime", file, file.dtype, reward.network, golden, DRIFT)
    assert {name for name, _ in tensors_in(build_plan(trt, file.path, file.inputs, PROFILE, ("SM80",))).items()} > {
        part.name for part in file.inputs
    }


def golden_inputs(reward: NetworkReward) -> tuple[Tensor, ...]:
    golden = golden_set()
    rows = reward.encode(golden.prompts, torch.device("cpu"))
    return (reward.preprocess(golden.images_BCHW), *(part.clone() for part in rows))
