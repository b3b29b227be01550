"""``lora=``: a run's LoRA over the base model is the run, to the bit; and what is refused beside it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from fastgrpo import cli
from fastgrpo.commands.trained import with_run
from fastgrpo.config import load_config

MODEL = ["runtime.device=cpu", "runtime.micro_batch=4", "runtime.threads=1"]
DRAW = ["evaluate.images_per_prompt=1", "evaluate.num_steps=2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\ntwo blue squares\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """Two iterations of the embedded model, of another rank than evaluate's own adapters have."""
    output = tmp_path_factory.mktemp("runs") / "run"
    words = [f"output={output}", f"prompts.path={prompts}", f"prompts.held_out={prompts}", *MODEL, *DRAW]
    words += ["adaptation.rank=3", "adaptation.alpha=6.0", "train.iterations=2", "train.learning_rate=0.02"]
    words += [
        "train.prompts_per_iteration=2",
        "train.group_size=4",
        "train.updates=1",
        "algorithm.schedule.num_steps=3",
    ]
    assert cli.main(["train", *words]) == 0
    return output


def evaluated(words: list[str], output: Path) -> tuple[dict[str, dict[str, float]], bytes]:
    """The scores, and a page of images, since too short a run changes no score of the verifier."""
    assert cli.main(["evaluate", *words, f"output={output}", *MODEL, *DRAW]) == 0
    report = json.loads((output / "evaluation.json").read_text())
    return report["rewards"], (output / "grid.png").read_bytes()


def test_evaluating_a_runs_lora_is_evaluating_the_run(run: Path, prompts: Path, tmp_path: Path) -> None:
    held_out = f"prompts.held_out={prompts}"
    of_run = evaluated([f"run={run}", held_out], tmp_path / "run")
    assert evaluated([f"lora={run / 'lora'}", held_out], tmp_path / "lora") == of_run
    assert evaluated([f"lora={run}", held_out], tmp_path / "of_the_run") == of_run
    assert evaluated([held_out], tmp_path / "base")[1] != of_run[1]
    model = json.loads((tmp_path / "lora" / "evaluation.json").read_text())["model"]
    assert model == f"the base model pkg://fastgrpo.shapes/checkpoint with {run / 'lora'}"


def test_samples_of_a_runs_lora_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    pages = {}
    for name, words in {"run": [f"run={run}"], "lora": [f"lora={run / 'lora'}"], "base": []}.items():
        words += ["prompt=a red circle", "images_per_prompt=2", "num_steps=2", f"output={tmp_path / name}", *MODEL]
        assert cli.main(["sample", *words]) == 0
        pages[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("0*.png"))]
    assert len(pages["run"]) == 2
    assert pages["lora"] == pages["run"] != pages["base"]


def test_export_writes_the_pipeline_that_the_run_exports(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {}
    for name in ("run", "lora"):
        out = tmp_path / name
        assert cli.main(["export", f"{name}={run}", f"output={out}", "merged=true", "runtime.device=cpu"]) == 0
        merged = StableDiffusion3Pipeline.from_pretrained(out / "merged", text_encoder_3=None, tokenizer_3=None)
        weights[name] = merged.transformer.state_dict()
    assert all(torch.equal(weight, weights["lora"][name]) for name, weight in weights["run"].items())
    # adapters that nobody trained are not exported
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["merged"]
    assert f"with {run}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["export"], "nothing to export; give run=outputs/NAME, or lora=DIRECTORY with merged=true"),
        (["export", "lora=a"], "lora=a is a LoRA already; use merged=true for a pipeline with it in its weights"),
        (["export", "lora=a", "merged=true"], "lora=a is not here ("),
        (
            ["export", "lora=a", "model=sd35_miniature", "merged=true"],
            "this is of model.weights=random, a pipeline without text encoders; give other",
        ),
        (["sample", "lora=a", "run={run}", "prompt=b"], "run={run} brings its own weights; leave one of the two out"),
        (["evaluate", "lora={run}", "model=flux_miniature"], "a FluxTransformer2DModel lacks "),
        (["evaluate", "lora=3"], "lora must be str, got 3"),
        (["train", "lora=a"], "unknown key lora"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_refused(
    words: list[str], says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.format(run=run) for word in words]) == 2
    said = capsys.readouterr().err.strip()
    assert says.format(run=run) in said
    assert said.startswith("fastgrpo: ")
    assert "\n" not in said


def test_a_model_of_ones_own_that_takes_no_lora_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lora_model.py").write_text("class Mine:\n    def __init__(self, weights: str = 'a') -> None: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["lora=a", "model._target_=my_lora_model.Mine"]
    config = load_config("evaluate", words)
    with pytest.raises(ValueError, match=r"unknown key model\.lora; Mine takes"):
        with_run(config, words)
