"""The models' guide has a model of one's own: a user types it into a file, and every command works with it."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from fastgrpo.algorithm.schedule import LinearSchedule
from fastgrpo.cli import main
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.models.blocks.layout import blocks_of
from fastgrpo.models.encoder_identity import code_identity
from fastgrpo.models.flux import Flux
from fastgrpo.models.lora import LoRA
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples
from tests.tiny import PROMPTS
from tests.tiny_flux import make_autoencoder, make_t5_tokenizer

README = Path(__file__).parents[2] / "fastgrpo" / "models" / "README.md"
TEXTS = list(PROMPTS[:3])
WIDTH = 16
GUIDANCE = 3.0


def example() -> str:
    """The file of README's section."""
    section = README.read_text(encoding="utf-8").split("## Your own model")[1]
    found = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_it_is_under_sixty_lines() -> None:
    assert len(example().splitlines()) < 60


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature AuraFlow, and the user's file in the working directory."""
    torch.manual_seed(0)
    tokenizer = make_t5_tokenizer()
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        vae=make_autoencoder(latent_channels=4, shift_factor=None),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipeline.save_pretrained(tmp_path / "weights")
    (tmp_path / "aura_flow.py").write_text(example(), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "aura_flow", raising=False)
    return tmp_path / "weights"


def start() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def test_its_images_are_those_of_the_pipeline(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(weights.parent))
    from aura_flow import AuraFlow  # type: ignore[import-not-found]

    settings: dict[str, Any] = {"guidance_scale": GUIDANCE, "max_sequence_length": 7}
    model = AuraFlow(weights=str(weights), adaptation=LoRA(rank=2), resolution=64, **settings)
    assert len(model.trainable) == 2 * (8 + 2 * 4)
    sampler = Sampler(model=model, grid=LinearSchedule(4, 1.73)(), batch_sizes=BatchSizes.of(2))
    ours = sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1, 2]), 1), model.encode(TEXTS), start())
    pipeline = AuraFlowPipeline.from_pretrained(weights)
    pipeline.set_progress_bar_config(disable=True)
    sigmas = [1 - i / 4 for i in range(4)]
    size = {"height": 64, "width": 64, "num_inference_steps": 4, "sigmas": sigmas, "output_type": "pt"}
    theirs = pipeline(TEXTS, [""] * 3, latents=start(), **size, **settings).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert ours.std() > 0.01


SIZES = [
    "model=custom",
    "model._target_=aura_flow.AuraFlow",
    "model.resolution=64",
    "model.max_sequence_length=7",
    "model.dtype=float32",
    "model.decode_dtype=float32",
    "model.condition_cache=null",
    "runtime=default",
]


def test_every_command_takes_it(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = [
        *SIZES,
        f"model.weights={weights}",
        "algorithm/schedule=shifted",
        "algorithm.schedule.num_steps=3",
        "reward=jpeg_compressibility",
        "prompts.path=prompts.txt",
        "prompts.held_out=prompts.txt",
        "adaptation.rank=2",
        "train.iterations=1",
        "train.prompts_per_iteration=2",
        "train.group_size=2",
        "evaluate.num_steps=3",
        "evaluate.images_per_prompt=1",
        "checkpoint.every=1",
        "output=run",
    ]
    named = "model._target_=aura_flow.AuraFlow"
    quick = ["num_steps=3", "images_per_prompt=1", "runtime=default"]
    assert main(["train", *train]) == 0
    assert main(["sample", "run=run", named, "prompt=a red circle", "output=samples", *quick]) == 0
    evaluate = ["evaluate.num_steps=3", "evaluate.images_per_prompt=1", "reward=jpeg_compressibility"]
    assert main(["evaluate", "run=run", named, "prompts.held_out=prompts.txt", *evaluate]) == 0
    assert main(["export", "run=run", named, "output=export", "merged=true"]) == 0
    said = capsys.readouterr().out
    assert 'AuraFlowPipeline.from_pretrained("export/merged", dtype=torch.float32)' in said
    pipeline = AuraFlowPipeline.from_pretrained("export/merged")
    base = AuraFlowPipeline.from_pretrained(weights)
    trained = pipeline.transformer.joint_transformer_blocks[0].attn.to_q.weight
    assert not torch.equal(trained, base.transformer.joint_transformer_blocks[0].attn.to_q.weight)
    base.load_lora_weights("export/lora", weight_name="pytorch_lora_weights.safetensors")
    assert main(["sample", "run=run", "prompt=a red circle", "output=again", *quick]) == 2
    assert named in capsys.readouterr().err


def own_model(**members: Any) -> Any:
    from aura_flow import AuraFlow  # type: ignore[import-not-found]

    return type("Own", (AuraFlow,), members)


def test_what_it_cannot_do_is_said_before_weights_are_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(weights.parent))
    settings: dict[str, Any] = {"weights": str(weights), "resolution": 64, "max_sequence_length": 7}
    own = own_model(_make_pipeline=lambda *_: pytest.fail("weights were read"))
    with pytest.raises(
        ValueError, match=r"runtime\.attention=flash: AuraFlowNetwork runs diffusers' own attention; use"
    ):
        own(adaptation=LoRA(), attention="flash", **settings)
    without_loader = type("SomePipeline", (), {})
    with pytest.raises(ValueError, match=r"^diffusers' SomePipeline has no LoRA files; use adaptation=full"):
        own_model(pipeline_class=without_loader)(adaptation=LoRA(), **settings)


def test_its_blocks_are_found_by_their_lists(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(weights.parent))
    transformer = AuraFlowPipeline.from_pretrained(weights).transformer
    assert [name for name, _ in blocks_of(transformer)] == [
        "joint_transformer_blocks.0",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]


def test_conditions_are_those_of_its_code_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    identities = []
    for number in (1, 2):
        (tmp_path / "reader.py").write_text(f"class Reader:\n    number = {number}\n")
        monkeypatch.delitem(sys.modules, "reader", raising=False)
        importlib.invalidate_caches()
        identities.append(code_identity(importlib.import_module("reader").Reader))
    assert identities[0] != identities[1]
    assert identities[0].startswith("reader.Reader ")
    assert code_identity(Flux) == "fastgrpo.models.flux.Flux"
