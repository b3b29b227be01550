"""Weights in more than one precision: what is read is the variant that was asked for, and nothing of another one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from fastgrpo.files import hub
from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.weight_files import variants
from tests.tiny import make_pipeline

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def load_model(path: str | Path, variant: str | None = "fp16", **settings: Any) -> StableDiffusion3:
    defaults: dict[str, Any] = {"adaptation": LoRA(rank=2), "resolution": 32, "use_t5": False}
    return StableDiffusion3(weights=str(path), variant=variant, **defaults | settings)


def save(source: Path, directory: Path, *, max_shard_size: str | None = None) -> Path:
    """The pipeline in ``source`` as the variant fp16, into a directory that may hold other ones."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(source, text_encoder_3=None, tokenizer_3=None)
    for part in PARTS:
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        getattr(pipeline, part).half().save_pretrained(directory / part, variant="fp16", **sizes)
    return directory


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights than the tiny ones."""
    return make_pipeline(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def both(tiny_weights: Path, other: Path, tmp_path: Path) -> Path:
    """The tiny weights, and as a variant other ones."""
    return save(other, shutil.copytree(tiny_weights, tmp_path / "both"))


@pytest.fixture
def alone(both: Path) -> Path:
    """The variant without plain weights."""
    for part in PARTS:
        for path in (both / part).glob("*model.safetensors"):
            path.unlink()
    return both


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", None),
        ("pytorch_model.bin", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
    ],
)
def test_the_variant_of_a_file_is_in_its_name(name: str, variant: str | None) -> None:
    assert variants([name]) == {variant: [name]}


@pytest.mark.parametrize(
    "name",
    ["config.json", "diffusion_pytorch_model.safetensors.index.json", "model.onnx", "my_model.safetensors", "LICENSE"],
)
def test_other_files_are_no_weights(name: str) -> None:
    assert variants([name]) == {}


@pytest.mark.parametrize("max_shard_size", [None, "10KB"], ids=["whole", "split"])
def test_the_weights_are_those_of_the_variant(
    max_shard_size: str | None, both: Path, other: Path, tiny_weights: Path
) -> None:
    if max_shard_size is not None:
        for path in both.glob("*/*fp16*"):
            path.unlink()
        save(other, both, max_shard_size=max_shard_size)
        assert len(list((both / "transformer").glob("*fp16-0*"))) > 1
        assert len(list((both / "text_encoder").glob("*fp16-0*"))) > 1
    model, plain = load_model(both), load_model(both, None)
    for name, weight in load_model(other, None).transformer.state_dict().items():
        if "lora" not in name:
            assert torch.equal(model.transformer.state_dict()[name], weight.half().float())
    texts = ["a red circle"]
    expected = load_model(other, None).encode(texts).embeds_BLC
    assert torch.allclose(model.encode(texts).embeds_BLC, expected, atol=2e-3)
    assert not torch.allclose(plain.encode(texts).embeds_BLC, expected, atol=2e-3)
    assert torch.equal(plain.encode(texts).embeds_BLC, load_model(tiny_weights, None).encode(texts).embeds_BLC)
    decoder = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")["decoder.conv_in.bias"]
    assert torch.equal(model.pipeline.vae.decoder.conv_in.bias, decoder.half().float())
    assert model.fingerprint != plain.fingerprint


def test_conditions_of_a_variant_are_kept_apart(both: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    texts = ["a red circle"]
    plain = load_model(both, None, condition_cache=cache).encode(texts).embeds_BLC
    assert not torch.equal(load_model(both, condition_cache=cache).encode(texts).embeds_BLC, plain)


def test_what_is_damaged_is_found_in_the_variant_and_only_where_it_is_read(both: Path) -> None:
    path = both / "transformer" / "diffusion_pytorch_model.fp16.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert load_model(both, None).transformer is not None
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.fp16\.safetensors, \d+ bytes, is damaged or cut"):
        load_model(both)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_weight_that_the_variant_lacks_is_not_made_up_for_by_another_variant(part: str, both: Path) -> None:
    path = both / part / "diffusion_pytorch_model.fp16.safetensors"
    stored = load_file(path)
    first = sorted(stored)[0]
    del stored[first]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"/{part} lacks {first}; give the weights of a whole model"):
        load_model(both)


def test_a_variant_that_is_alone_must_be_asked_for(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(alone).encode(["a red circle"]).embeds_BLC.isfinite().all()
    monkeypatch.setattr(StableDiffusion3, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"/transformer has no plain weights; set model\.variant=fp16$"):
        load_model(alone, None)
    with pytest.raises(ValueError, match=r"/transformer has no weights of model\.variant=bf16; set .*variant=fp16$"):
        load_model(alone, "bf16")


# the last begins as one that is there, which diffusers takes for it
@pytest.mark.parametrize("variant", ["bf16", "fp1"])
def test_a_variant_that_is_not_there_names_those_that_are(variant: str, both: Path) -> None:
    says = rf"has no weights of model\.variant={variant}; set model\.variant=fp16 or model\.variant=null$"
    with pytest.raises(ValueError, match=says):
        load_model(both, variant)


def test_a_part_without_the_variant_is_read_from_its_plain_weights_and_that_is_said(
    both: Path, tiny_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (both / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    model = load_model(both)
    assert model.fingerprint == load_model(tiny_weights, None).fingerprint
    assert f"{both} has no model.variant=fp16 of ['transformer'], of which the plain weights are read" in caplog.text


def test_random_weights_have_no_variant() -> None:
    with pytest.raises(ValueError, match=r"random reads no files; leave out model\.variant and model\.transformer"):
        load_model("random", architecture=object())


# the hub


def listing(*names: str) -> Callable[..., Any]:
    return lambda repository, revision: SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


def refuses(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_a_variant_is_downloaded(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def download(repository: str, **settings: Any) -> Path:
        asked.append({"repository": repository, **settings})
        return both

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    assert load_model("owner/name@v1").fingerprint == load_model(both).fingerprint
    assert asked == [{"repository": "owner/name", "revision": "v1", "variant": "fp16"}]


@pytest.mark.parametrize(
    ("model_info", "says"),
    [
        (
            listing("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors", "a.txt"),
            "set model.variant=bf16 or model.variant=null",
        ),
        (listing("unet/diffusion_pytorch_model.bf16-00001-of-00002.safetensors"), "set model.variant=bf16"),
        (refuses(OfflineModeIsEnabled("off")), "set model.variant to one that it has"),
    ],
    ids=["both", "split", "offline"],
)
def test_a_variant_that_the_hub_lacks_names_those_that_it_has(
    model_info: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what diffusers says of files without any of the variant
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    monkeypatch.setattr(
        StableDiffusion3Pipeline, "download", lambda *_, **__: variant_compatible_siblings({"a/model.bin"}, "fp16")
    )
    monkeypatch.setattr(hub, "model_info", model_info)
    with pytest.raises(ValueError, match="owner/name") as raised:
        load_model("owner/name")
    assert str(raised.value) == f"model.weights=owner/name has no weights of model.variant=fp16; {says}"


def test_a_variant_that_is_alone_on_the_hub_must_be_asked_for(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    monkeypatch.setattr(StableDiffusion3Pipeline, "download", lambda *_, **__: tmp_path)
    monkeypatch.setattr(hub, "model_info", listing("transformer/diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ValueError, match=r"owner/name has no plain weights; set model\.variant=fp16$"):
        load_model("owner/name", None)
