"""Where reward models' files come from: ids that lead nowhere else, and files that run nothing."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from fastgrpo.compile.networks import Eager
from fastgrpo.rewards.clip_score import clip_score
from fastgrpo.rewards.networks import checkpoints
from fastgrpo.rewards.networks.checkpoints import checkpoint_directory, load_directory, load_tensors
from tests.rewards.fixtures.random_inputs import random_image
from tests.rewards.miniatures import PROMPTS, save_clip, to_images


class RunsCode:
    """What a pickle does when it is loaded: it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


def find(path: str) -> Path:
    return checkpoint_directory(path, ["config.json", "model.pt"], option="reward.path")


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "owner/../../x",
        "owner/..",
        "/etc/nothing",
        "~/nothing/here",
        "owner",
        "owner/name/more",
        "owner/.hidden",
        ".owner/name",
        "owner\\name/x",
        "owner/na me",
        "owner/name\n",
        "ownér/name",
        "",
        "owner/name@",
        "owner/name@../../x",
        "owner/name@a/../b",
        "owner/name@/etc",
        "https://host/owner/name",
    ],
)
def test_a_path_that_is_no_directory_and_no_id_reaches_no_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"(?s)reward.path=.* is neither a directory here \(.*\) nor the id of"):
        find(path)


@pytest.mark.parametrize(
    ("path", "revision"), [("owner/na-me_1.0", None), ("o/n@main", "main"), ("o/n@refs/pr/1", "refs/pr/1")]
)
def test_an_id_downloads_the_named_files_alone(
    path: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        asked.update(repository=repository, **options)
        for name in options["allow_patterns"]:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    found = checkpoint_directory(path, ["config.json", "model.pt"], extra=["merges.txt"], option="reward.path")
    assert found == tmp_path
    assert asked == {
        "repository": path.partition("@")[0],
        "revision": revision,
        "allow_patterns": ["config.json", "model.pt", "merges.txt"],
    }


def test_without_the_hub_the_error_says_what_to_bring_where() -> None:
    message = (
        r"reward.path=nobody/nothing@v1 could not be downloaded .*run `hf download nobody/nothing --revision v1 "
        r"--include config.json --include model.pt --local-dir DIRECTORY`, "
        r"bring the directory here and set reward.path=DIRECTORY"
    )
    with pytest.raises(ValueError, match=message):
        find("nobody/nothing@v1")


def test_what_was_downloaded_before_is_found_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (snapshot / "config.json").touch()
    with pytest.raises(ValueError, match=r"has no model.pt; put the model's there, or give reward.path the directory"):
        find("owner/name")
    (snapshot / "model.pt").touch()
    assert find("owner/name") == snapshot


def test_a_directory_is_found_from_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.pt"):
        (tmp_path / "model" / name).touch()
    assert find("~/model") == tmp_path / "model"


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(save: Any, tmp_path: Path) -> None:
    file, sign = tmp_path / "model.pt", tmp_path / "it ran"
    save({"state_dict": {"weight": torch.ones(1)}, "more": RunsCode(sign)}, file)
    with pytest.raises(ValueError, match=r"model.pt cannot be read as tensors alone .*download it again"):
        load_tensors(file)
    assert not sign.exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"], ids=str)
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt cannot be read as tensors alone"):
        load_tensors(file)


def test_a_checkpoint_cut_short_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"model.pt cannot be read as tensors alone"):
        load_tensors(file)


def test_a_checkpoint_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds a Tensor; a checkpoint is a dict"):
        load_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_new_and_old_torch_are_read(zipped: bool, tmp_path: Path) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_tensors(tmp_path / "model.pt")["weight"], weight)


def test_a_pickle_in_place_of_safetensors_is_refused_and_does_not_run(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").write_bytes(pickle.dumps({"weight": RunsCode(tmp_path / "it ran")}))
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        load_directory(CLIPModel, directory)
    assert not (tmp_path / "it ran").exists()


def test_a_pickle_beside_no_safetensors_is_not_read(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": RunsCode(tmp_path / "it ran")}))
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        clip_score(path=str(directory), backend=Eager())
    assert not (tmp_path / "it ran").exists()


def test_other_weights_than_the_models_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["visual_projection.wait"] = weights.pop("visual_projection.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks visual_projection.weight and has visual_projection.wait that the model does not know"
    ):
        load_directory(CLIPModel, directory)
    weights["visual_projection.weight"] = weights.pop("visual_projection.wait")[:, :4].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors does not fit the model"):
        load_directory(CLIPModel, directory)


def test_a_checkpoint_of_an_old_transformers_scores_the_same(directory: Path) -> None:
    images_BCHW = to_images(random_image(40, 50)[None]).expand(3, -1, -1, -1)
    expected_B = clip_score(path=str(directory), backend=Eager())(images_BCHW, PROMPTS)
    file, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    weights = load_file(file)
    # as openai/clip-vit-large-patch14: a buffer was saved, and the end of a text was known by its highest id
    for tower, length in (("text_model", 24), ("vision_model", 17)):
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(weights, file, metadata={"format": "pt"})
    config["text_config"].update(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 32,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 32,
            }
        )
    )
    assert torch.equal(clip_score(path=str(directory), backend=Eager())(images_BCHW, PROMPTS), expected_B)
