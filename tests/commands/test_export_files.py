"""What a run's end and ``export`` write and print is run as it stands, on the embedded model."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import PeftModel
from PIL import Image

from fastgrpo import cli
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.commands.trained import load_model, with_run
from fastgrpo.config import load_config
from fastgrpo.files.locations import resolve_path
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.sampler import Sampler
from fastgrpo.types import Prompts, Samples

TEXTS = ["a red circle left of a blue square", "two green triangles"]
CPU = ["runtime.device=cpu", "runtime.threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration of the embedded model, which is changed by it enough to be seen."""
    output = tmp_path_factory.mktemp("runs") / "run"
    (output.parent / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
    prompts = [f"prompts.{key}={output.parent / 'prompts.txt'}" for key in ("path", "held_out")]
    words = ["train", f"output={output}", *prompts, *CPU, "runtime.micro_batch=8", "train.iterations=3"]
    # stopped after the first
    words += ["train.max_minutes=1e-6"]
    words += ["train.prompts_per_iteration=2", "train.group_size=4", "train.updates=1", "train.learning_rate=0.02"]
    words += ["algorithm.schedule.num_steps=3", "evaluate.num_steps=5", "evaluate.images_per_prompt=1"]
    assert cli.main(words) == 0
    return output


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert cli.main(["export", f"run={run}", f"output={out}", "merged=true", *CPU]) == 0
    return out


def images_of_ours(words: list[str], start: torch.Tensor) -> torch.Tensor:
    """As ``sample`` makes them of a model, but of a given noise."""
    model = load_model(with_run(load_config("sample", [*words, "prompt=a", *CPU]), [*words, "prompt=a", *CPU]))[0]
    sampler = Sampler(model=model, grid=SD3Schedule(5)(), batch_sizes=BatchSizes.of(2))
    return sampler(Samples.all_of(Prompts(TEXTS, ids=[0, 1]), 1), model.encode(TEXTS), start)


def test_all_that_was_written_draws_what_the_run_draws(run: Path, exported: Path) -> None:
    start = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    ours, base = images_of_ours([f"run={run}"], start), images_of_ours([], start)
    # many times what follows allows
    assert (ours - base).abs().max() > 0.05
    for directory in (run / "lora", exported / "lora", exported / "merged"):
        names = runpy.run_path(str(directory / "generate.py"))
        pipeline = names["load"]()
        theirs = names["draw"](pipeline, TEXTS, latents=start, output_type="pt")
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    # and the same directory by peft, on the pipeline without a LoRA
    weights = resolve_path("pkg://fastgrpo.shapes/checkpoint")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        weights, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, run / "lora")
    theirs = names["draw"](pipeline, TEXTS, latents=start, output_type="pt")
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_the_script_is_run_by_its_own_line(exported: Path, tmp_path: Path) -> None:
    text = (exported / "lora" / "README.md").read_text()
    assert f"`python generate.py '{TEXTS[0]}'`, or in this directory:" in text
    words = [sys.executable, str(exported / "lora" / "generate.py"), TEXTS[0], "--images", "2", "--seed", "5"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_0.png", "image_1.png"]
    names = runpy.run_path(str(exported / "lora" / "generate.py"))
    expected = names["draw"](names["load"](), TEXTS[0], generator=torch.Generator("cpu").manual_seed(6))[0]
    drawn = np.asarray(Image.open(tmp_path / "image_1.png")).astype(int)
    assert drawn.shape == (64, 64, 3)
    assert np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(drawn - np.asarray(Image.open(tmp_path / "image_0.png")).astype(int)).max() > 10
    before = (tmp_path / "image_0.png").read_bytes()
    again = subprocess.run(words[:3], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout) == (0, "image_2.png\n"), again.stderr
    assert (tmp_path / "image_0.png").read_bytes() == before


def test_what_is_printed_can_be_pasted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", f"run={run}", "output=out", "merged=true", *CPU]) == 0
    said = capsys.readouterr().out
    assert f"\nThe averaged weights of {run / 'checkpoints' / 'step_000001'}:\n" in said
    blocks = re.findall(
        r"^from importlib.*?^images\[0\]\.save\(\"image\.png\"\)$", said, flags=re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    drawn = []
    for block in blocks:
        torch.manual_seed(0)
        exec(block, {})
        drawn.append(np.asarray(Image.open("image.png")).astype(int))
        Path("image.png").unlink()
    # the LoRA and the merged pipeline
    assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert drawn[0].shape == (64, 64, 3)


def test_the_card_is_of_the_run(run: Path, exported: Path) -> None:
    for path in (run / "lora", exported / "lora", exported / "merged"):
        text = (path / "README.md").read_text()
        assert "| iterations | 1, of 2 prompts, 4 images of each |" in text
        assert f'prompt="{TEXTS[0]}",' in text
        assert "num_inference_steps=5," in text
    config: dict[str, Any] = json.loads((run / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pkg://fastgrpo.shapes/checkpoint"


def test_a_pipeline_of_anothers_lora_is_drawn_in_the_models_own_times(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", f"lora={run}", f"output={tmp_path / 'out'}", "merged=true", *CPU]) == 0
    text = (tmp_path / "out" / "merged" / "README.md").read_text()
    assert "num_inference_steps=10," in text
    assert "| recipe | |" not in text
    assert (tmp_path / "out" / "merged" / "generate.py").is_file()
