"""Weights that are not there, not whole or of something else: one line with the place, before anything is read."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines import pipeline_utils
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file

from fastgrpo.models.lora import LoRA
from fastgrpo.models.sd3 import StableDiffusion3
from fastgrpo.models.weights import pipeline_directory

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
Damage = Callable[[Path], Any]


def load_model(weights: str | Path) -> StableDiffusion3:
    return StableDiffusion3(weights=str(weights), adaptation=LoRA(rank=2), resolution=32, use_t5=False)


def cut(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-100])


def write(name: str, content: bytes) -> Damage:
    return lambda path: (path / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda path: (path / name).unlink()


def remove_part(name: str) -> Damage:
    return lambda path: shutil.rmtree(path / name)


def rename_a_weight(name: str) -> Damage:
    def damage(path: Path) -> None:
        weights = load_file(path / name)
        first = sorted(weights)[0]
        weights["odd"] = weights.pop(first)
        save_file(weights, path / name, metadata={"format": "pt"})

    return damage


def reshape_a_weight(name: str) -> Damage:
    def damage(path: Path) -> None:
        weights = load_file(path / name)
        first = sorted(weights)[0]
        weights[first] = torch.zeros(7)
        save_file(weights, path / name, metadata={"format": "pt"})

    return damage


@pytest.fixture
def copy(tiny_weights: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_weights, tmp_path / "copy")


# where they are


@pytest.mark.parametrize(
    ("weights", "looked_for"),
    [
        ("/nowhere", "/nowhere"),
        ("~/models/sd35", "{home}/models/sd35"),
        ("./nowhere", "{cwd}/nowhere"),
        ("nowhere", "{cwd}/nowhere"),
        ("owner/name/more", "{cwd}/owner/name/more"),
        ("", "{cwd}"),
        ("pkg://fastgrpo.shapes/nowhere", "shapes/nowhere"),
    ],
)
def test_what_is_no_directory_and_no_id_says_where_it_was_looked_for_and_asks_no_hub(
    weights: str, looked_for: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(StableDiffusion3Pipeline, "download", lambda *_, **__: pytest.fail("asked the hub"))
    places = {"home": tmp_path / "home", "cwd": tmp_path}
    with pytest.raises(ValueError, match=r"model\.weights='.*' is neither a directory here .* nor the id") as raised:
        load_model(weights.format(**places))
    assert f"{looked_for.format(**places)})" in str(raised.value)
    assert "give a directory that exists, or owner/name" in str(raised.value)


def test_a_directory_is_found_from_the_home_directory(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_weights.parent))
    assert pipeline_directory(StableDiffusion3Pipeline, f"~/{tiny_weights.name}") == tiny_weights


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.weights=pkg://nobody/x: there is no package 'nobody'; install it"):
        load_model("pkg://nobody/x")


# the hub


def refusal(kind: type[Exception]) -> Exception:
    # made without the answer of the hub, which each version of its library has in a class of another one
    return kind.__new__(kind, "refused")


def unreachable() -> Exception:
    error = OSError("Cannot load model: see the root cause in the stacktrace above.")
    error.__cause__ = ConnectionError("Name or service not known")
    return error


@pytest.mark.parametrize(
    ("error", "is_offline", "says"),
    [
        (
            refusal(GatedRepoError),
            False,
            " is for who has accepted its licence: do so at https://huggingface.co/owner/name, then log in with "
            "`hf auth login`",
        ),
        (
            refusal(RepositoryNotFoundError),
            False,
            " is not on the hub, or is private: correct the name, or log in with `hf auth login`",
        ),
        (
            unreachable(),
            False,
            " could not be downloaded (ConnectionError: Name or service not known); where the hub can be reached run "
            "`hf download owner/name --local-dir DIRECTORY`, bring the directory here and set model.weights=DIRECTORY",
        ),
        (
            OfflineModeIsEnabled("offline"),
            True,
            " could not be downloaded (it is not in /the/cache, and HF_HUB_OFFLINE=1 forbids to ask the hub); unset "
            "HF_HUB_OFFLINE, or where the hub can be reached run `hf download owner/name --local-dir DIRECTORY`, bring "
            "the directory here and set model.weights=DIRECTORY",
        ),
    ],
    ids=["gated", "unknown", "unreachable", "offline"],
)
def test_what_the_hub_does_not_give_says_why_and_what_to_do(
    error: Exception, is_offline: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repository: str, revision: str | None, variant: str | None) -> str:
        assert (repository, revision, variant) == ("owner/name", None, None)
        raise error

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/the/cache")
    with pytest.raises(ValueError, match="owner/name") as raised:
        load_model("owner/name")
    assert str(raised.value) == f"model.weights=owner/name{says}"


@pytest.mark.parametrize("refusing", ["model_info", "hf_hub_download"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_gated_model_says_what_to_do_wherever_diffusers_meets_the_gate(
    refusing: str, variant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **settings: Any) -> Any:
        # what is here may be read
        if settings.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        raise refusal(GatedRepoError)

    siblings = [SimpleNamespace(rfilename=name) for name in ("model_index.json", TRANSFORMER)]
    # of a gated model the hub shows the names of its files
    monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(pipeline_utils, "hf_hub_download", refuse)
    monkeypatch.setattr(pipeline_utils, refusing, refuse)
    with pytest.raises(ValueError, match="owner/name") as raised:
        StableDiffusion3(weights="owner/name", variant=variant, adaptation=LoRA(rank=2), resolution=32)
    assert str(raised.value) == (
        "model.weights=owner/name is for who has accepted its licence: do so at https://huggingface.co/owner/name, "
        "then log in with `hf auth login`"
    )


def test_a_real_hub_that_is_off_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1 forbids to ask the hub\); unset HF_HUB_OFFLINE") as raised:
        load_model("nobody/has-this")
    assert "\n" not in str(raised.value)
    assert "root cause" not in str(raised.value)


def test_a_revision_of_a_model_is_asked_for(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None, variant: str | None) -> Path:
        asked.append((repository, revision))
        return tiny_weights

    monkeypatch.setattr(StableDiffusion3Pipeline, "download", download)
    assert load_model("owner/name@v1").transformer is not None
    assert asked == [("owner/name", "v1")]


# what is in them


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut(TRANSFORMER), rf"/{TRANSFORMER}, \d+ bytes, is damaged or cut short .*delete it and download it again"),
        (cut("vae/diffusion_pytorch_model.safetensors"), r"/vae/.*, \d+ bytes, is damaged or cut short"),
        (cut("text_encoder_2/model.safetensors"), r"/text_encoder_2/model.safetensors, \d+ bytes, is damaged or cut"),
        (write(TRANSFORMER, b"version https://git-lfs"), rf"/{TRANSFORMER}, 23 bytes, is damaged or cut short"),
        (write(TRANSFORMER, b""), rf"/{TRANSFORMER}, 0 bytes, is damaged or cut short"),
        (remove("tokenizer/tokenizer.json"), r"/tokenizer has 2 words; its files are missing: download it again"),
        (remove("model_index.json"), r"/model_index.json is missing; give a directory that pipeline.save_pretrained"),
        (write("model_index.json", b'{"a'), r"/model_index.json cannot be read .*; give a directory that"),
        (write("model_index.json", b"[]"), r"/model_index.json is not the config of a pipeline"),
        (remove("transformer/config.json"), r"/transformer/config.json is missing; download it again"),
        (write("vae/config.json", b"{"), r"/vae/config.json cannot be read"),
        (remove(TRANSFORMER), r"/transformer has no weights; its files are missing: download it again"),
        (remove("text_encoder/model.safetensors"), r"/text_encoder has no weights; its files are missing"),
        (remove_part("text_encoder_2"), r" has no text_encoder_2; give the directory of a whole pipeline"),
        (remove_part("tokenizer"), r" has no tokenizer; give the directory of a whole pipeline"),
        (remove_part("scheduler"), r" has no scheduler; give the directory of a whole pipeline"),
        (
            reshape_a_weight(TRANSFORMER),
            r"cannot be loaded .*expected shape.*do not belong together: download it again",
        ),
        (rename_a_weight(TRANSFORMER), r"/transformer lacks context_embedder.bias; give the weights of a whole model"),
        (rename_a_weight("vae/diffusion_pytorch_model.safetensors"), r"/vae lacks decoder.conv_in.bias; give the weig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_directory_that_is_not_whole_is_refused_by_its_file(copy: Path, damage: Damage, says: str) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=rf"model\.weights.*{says}") as raised:
        load_model(copy)
    assert str(copy) in str(raised.value)
    assert len(str(raised.value)) < 500


def test_text_encoders_that_are_not_whole_are_refused_when_they_are_wanted(copy: Path) -> None:
    reshape_a_weight("text_encoder/model.safetensors")(copy)
    model = load_model(copy)
    with pytest.raises(ValueError, match=rf"model\.weights: {copy}.*cannot be loaded .*do not belong together"):
        model.encode(["a red circle"])


def test_a_pipeline_without_t5_says_that_t5_can_be_left_out(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion3, "_make_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r" has no text_encoder_3; .* whole pipeline, or set model\.use_t5=false"):
        StableDiffusion3(weights=str(copy), adaptation=LoRA(rank=2), resolution=32, use_t5=True)


def test_a_damaged_t5_is_nothing_to_who_leaves_it_out(copy: Path) -> None:
    (copy / "text_encoder_3").mkdir()
    write("text_encoder_3/model.safetensors", b"version https://git-lfs")(copy)
    assert load_model(copy).transformer is not None
    with pytest.raises(ValueError, match=r"text_encoder_3/model\.safetensors, 23 bytes, is damaged"):
        StableDiffusion3(weights=str(copy), adaptation=LoRA(rank=2), resolution=32, use_t5=True)
