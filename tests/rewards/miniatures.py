"""Reward models in miniature: directories in the official layouts, of random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.rewards.fixtures.random_inputs import random_image, random_weights

FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = ["a red circle", "a blue square", "a red circle of blue"]
_LETTERS = sorted(set("".join(PROMPTS).replace(" ", "")))


def recorded(name: str) -> dict[str, Any]:
    """A fixture: what a model's own package answered."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


def recorded_images(record: dict[str, Any]) -> list[torch.Tensor]:
    return [to_images(random_image(*size)[None]) for size in record["sizes"]]


def to_images(pixels_BHWC: Any) -> torch.Tensor:
    """Bytes [B, H, W, 3] to images [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 255


def save_clip(directory: Path) -> Path:
    """A CLIP as transformers saves it: two layers, a vocabulary of single letters, a scale of 20."""
    tokens = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    end = tokenizer.eos_token_id
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokens), "max_position_embeddings": 24, "eos_token_id": end, "bos_token_id": end - 1}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**shared, **text, "pad_token_id": end},
            vision_config={**shared, "image_size": 32, "patch_size": 8},
            projection_dim=12,
            logit_scale_init_value=torch.tensor(20.0).log().item(),
            # transformers' own is so small that every image scores alike
            initializer_factor=3.0,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


def save_aesthetic_head(directory: Path, width: int = 12) -> Path:
    """The aesthetic predictor's MLP over embeddings of this width, in the official names."""
    sizes = [(0, 1024, width), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)]
    shapes: dict[str, list[int]] = {f"layers.{i}.weight": [out, wide] for i, out, wide in sizes}
    shapes |= {f"layers.{i}.bias": [out] for i, out, _ in sizes}
    torch.save(_as_tensors(shapes), directory / "aesthetic-model.pth")
    return directory


def save_hps(directory: Path) -> Path:
    """The ViT-H-14 in miniature of fixtures/hps.json in open_clip's layout, and its tokenizer in transformers'."""
    record = recorded("hps")
    torch.save({"epoch": 1, "state_dict": _as_tensors(record["shapes"])}, directory / "HPS_v2.1_compressed.pt")
    letters = _byte_letters()
    merges = [tuple(merge.split()) for merge in record["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges).save_pretrained(directory)
    return directory


def save_image_reward(directory: Path) -> Path:
    """The BLIP in miniature of fixtures/image_reward.json, as ImageReward-v1.0 is saved."""
    record = recorded("image_reward")
    weights = _as_tensors(record["shapes"])
    num_positions = record["shapes"]["blip.text_encoder.embeddings.position_embeddings.weight"][0]
    # a buffer that older versions of transformers saved
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(num_positions)[None]
    torch.save(weights, directory / "ImageReward.pt")
    (directory / "vocab.txt").write_text("\n".join(record["vocabulary"]) + "\n")
    return directory


def _as_tensors(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weight) for name, weight in random_weights(shapes).items()}


def _byte_letters() -> list[str]:
    """One printable letter a byte, in the order of CLIP's vocabulary: printable bytes first, as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def official_shapes(name: str) -> dict[str, torch.Tensor]:
    """The weights of the official size, as the model's own package builds them, without their values."""
    weights = {}
    for general, (count, *shape) in recorded(name)["official_shapes"].items():
        for layer in range(count):
            weights[general.replace("*", str(layer))] = torch.empty(shape, device="meta")
    return weights


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in module.state_dict().items()}
