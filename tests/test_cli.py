"""Every command of the console script, from its words to what it writes; every mistake is one line on stderr."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from omegaconf import OmegaConf
from PIL import Image

from fastgrpo import cli
from fastgrpo.algorithm.image_search import Halving
from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo_kernels import combined
from tests.tiny import PROMPTS, make_pipeline

MODEL = ("model.resolution=32", "runtime.device=cpu", "runtime.micro_batch=4")
LORA = ("adaptation.rank=4", "adaptation.alpha=8.0")
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
REWARD = "reward=jpeg_incompressibility"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def train_words(tiny_weights: Path, prompts: Path) -> list[str]:
    """A training run of three iterations with a search, short of its output."""
    return [
        "train",
        "algorithm/noise=elite",
        "algorithm=smart_grpo",
        "algorithm/timesteps=all_but_last",
        "algorithm.schedule.num_steps=3",
        "algorithm.noise.candidates=4",
        "algorithm.noise.elites=2",
        "algorithm.noise.estimate_steps=1",
        f"model.weights={tiny_weights}",
        *MODEL,
        *LORA,
        REWARD,
        f"prompts.path={prompts}",
        f"prompts.held_out={prompts}",
        "train.iterations=3",
        "train.learning_rate=0.05",
        "train.prompts_per_iteration=2",
        "train.group_size=3",
        "evaluate.images_per_prompt=2",
        "evaluate.num_steps=2",
        "checkpoint.every=1",
    ]


@pytest.fixture(scope="module")
def run(train_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main([*train_words, f"output={path}"]) == 0
    return path


def fails(capsys: pytest.CaptureFixture[str], words: list[str], code: int, *says: str) -> None:
    """The command fails with the code and one line that says all of ``says``."""
    capsys.readouterr()
    assert cli.main(words) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("fastgrpo: ")
    for text in says:
        assert text in error[0]


# help


def test_help_names_every_command_and_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("train", "sample", "evaluate", "export", "serve-reward", "doctor"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastgrpo 0.")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_has_examples_groups_and_defaults(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"\n  fastgrpo {name}" in shown
    # every command but these has a model
    has_model = name not in ("serve-reward", "report", "runs")
    assert ("\n  adaptation" in shown) == has_model
    assert ("full, [lora]" in shown) == has_model
    assert ("smart_grpo_paper" in shown) == (has_model and name not in ("export", "encode"))
    assert ("\n  model.resolution=64\n      of a square image, or [height, width]\n" in shown) == has_model


def test_help_a_mistyped_key_and_the_table_of_runs_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from fastgrpo import cli; cli.main(['train', '--help']); cli.main(['train', 'sed=1']); "
        "assert cli.main(['runs', 'in=.']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "fastgrpo: unknown key sed; did you mean seed?\n"


def test_no_words_show_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: fastgrpo COMMAND" in capsys.readouterr().err


def test_help_has_the_keys_of_what_the_line_chooses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "algorithm=flow_grpo", "--help", "algorithm.objective.clip_range=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "keys, with their values under algorithm=flow_grpo algorithm.objective.clip_range=0.5:" in shown
    assert "algorithm/objective=clipped_surrogate: PPO's clipped surrogate (arXiv:1707.06347)" in shown
    assert "\n  algorithm.objective.clip_range=0.5\n      how far a ratio may leave 1\n" in shown
    assert "[clipped_surrogate]," in shown
    assert "max_advantage" not in shown
    fails(capsys, ["train", "algorithm=flow_gpro", "-h"], 2, "algorithm has no option 'flow_gpro'")
    fails(capsys, ["train", "seed", "-h"], 2, "'seed' is not a setting")


def test_a_dry_run_shows_the_config_and_makes_nothing(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*train_words, f"output={tmp_path / 'run'}", "--dry-run"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert OmegaConf.create(shown).train.group_size == 3
    assert f"# writes {tmp_path / 'run'}\n" in shown
    assert "# trains for 3 iterations, each on 2 prompts x 3 images = 6, of 5 prompts" in shown
    assert "held-out prompts x 2 images = 10 before, every 20 iterations and at the end, by jpeg" in shown
    assert not (tmp_path / "run").exists()
    fails(capsys, [*words, "train.group_size=1"], 2, "train.group_size must be at least 2")
    assert cli.main(["sample", "prompt=a", "--dry-run"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).prompt == "a"


# mistakes in the words


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["train", "--iterations", "3"], ["'--iterations' is not a setting", "train.iterations=VALUE"]),
        (["train", "iterations=3"], ["unknown key iterations", "did you mean train.iterations"]),
        (
            ["train", "algorithm/objective=rwr", "algorithm.objective.beta=4"],
            ["algorithm.objective.beta is a key of the default choice of its group", "drop it"],
        ),
        (["train", "algorithm.timesteps.shif=3"], ["algorithm.timesteps.shif", "algorithm.timesteps.shift"]),
        (["train", "noise=gaussian"], ["unknown key noise", "algorithm/noise"]),
        (["train", "+train.speed=3"], ["unknown key train.speed"]),
        (["train", "+model.speed=3"], ["unknown key model.speed", "StableDiffusion3 takes weights"]),
        (["train", "~seed"], ["seed must have a value"]),
        (["train", "train=3"], ["train has keys of its own", "train.iterations"]),
        (["train", "train.iterations=many"], ["train.iterations must be int, got 'many'"]),
        (["train", "train.iterations=1.5"], ["train.iterations must be int, got 1.5"]),
        (["train", "resume=3"], ["resume must be bool, got 3"]),
        (["train", "adaptation.rank=high"], ["adaptation.rank must be int, got 'high'"]),
        (
            ["train", "algorithm=flow_gpro"],
            ["algorithm has no option 'flow_gpro'; did you mean flow_grpo", "It has awm,"],
        ),
        (["evaluate", "reward=http"], ["reward.terms.http.name has no value", "VALUE: what its server calls it"]),
        (["train", "search=true"], ["unknown key search; the commands evaluate and sample have it"]),
        (["train", "search=true", "--help"], ["unknown key search; the commands evaluate and sample have it"]),
        (["train", "search=halving"], ["unknown key search; the commands evaluate and sample have it"]),
        (["train", "hardware=h100"], ["hardware has no option 'h100'; it has 24gb, 80gb, 8x80gb"]),
        (["train", "algorithm/noise=elit"], ["algorithm/noise has no option 'elit'; did you mean elite?"]),
        (["train", "--dryrun"], ["'--dryrun' is not a setting; did you mean --dry-run?"]),
        (["train", "--dry_run"], ["did you mean --dry-run?"]),
        (["train", "resume"], ["'resume' is not a setting; write resume=true, see fastgrpo train --help"]),
        (["train", "--name=a"], ["'--name=a' is not a setting; write name=a, see"]),
        (["train", "seed"], ["write seed=VALUE"]),
        (["doctor", "recomend"], ["did you mean recommend=VALUE?"]),
        (["report", "outputs/nft"], ["'outputs/nft' is not a setting; write run=outputs/nft"]),
        (["runs", "/"], ["'/' is not a setting; write in=/"]),
        (["evaluate", "foo"], ["a setting is KEY=VALUE, and fastgrpo evaluate --help has the keys"]),
        (["train", "prompts.path=[a"], ["'[a'"]),
        (["train", "reward=custom"], ["reward.path has no value; give it as reward.path=VALUE: module.function"]),
        (["export"], ["nothing to export; give run=outputs/NAME, or lora=DIRECTORY with merged=true"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_in_the_words_is_one_line(
    words: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, words, 2, *says)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.iterations=0", "train.iterations must be at least 1, got 0"),
        ("train.learning_rate=-1.0", "train.learning_rate must be positive, got -1.0"),
        ("algorithm.noise.candidates=0", "candidates must be at least 1, got 0"),
        ("algorithm.dynamics.noise_level=0.0", "noise_level must be positive, got 0.0"),
        ("model.guidance_scale=0.5", "model.guidance_scale must be at least 1, got 0.5"),
        ("~model.resolution", "StableDiffusion3 needs resolution"),
        (
            "model.resolution=33",
            "model.resolution=33: height and width must be multiples of 16; 32 and 48 are the nearest to 33",
        ),
        ("adaptation.rank=0", "rank must be at least 1, got 0"),
        ("model.weights=nowhere/at/all", "model.weights='nowhere/at/all' is neither a directory here"),
        ("prompts.path=nowhere.txt", "prompt file nowhere.txt does not exist"),
        ("runtime.device=cuda:77", "runtime.device"),
        ("output=/proc/nowhere", "cannot write the run directory /proc/nowhere"),
    ],
)
def test_a_value_out_of_range_is_one_line_before_training(
    word: str, says: str, train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if word == "runtime.device=cuda:77" and torch.cuda.is_available():
        pytest.skip("a CUDA device that does not exist is another error where others do")
    fails(capsys, [*train_words, f"output={tmp_path / 'run'}", word], 2, says)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_traceback_shows_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGRPO_TRACEBACK", "1")
    assert cli.main(["train", "sed=1"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("fastgrpo: unknown key sed; did you mean seed?\n")


@pytest.mark.parametrize("words", [["~reward.watch"], ["~reward.watch", "--dry-run"], ["~train.iterations"]])
def test_a_key_that_is_deleted_and_needed_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert words[0].removeprefix("~").split(".")[-1] in said[0]
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_told_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    assert cli.main(["train", "sed=1"]) == 2
    message = json.loads(told.read_text())["message"]["message"]
    assert message == "ValueError: unknown key sed; did you mean seed?"


def test_torchrun_is_told_what_nobody_expected(
    train_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setattr("fastgrpo.training.assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*train_words, f"output={tmp_path / 'run'}"])
    assert "ZeroDivisionError: division by zero" in json.loads(told.read_text())["message"]["extraInfo"]["py_callstack"]


def test_a_prompt_is_taken_as_it_stands(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = r"it's (one), [two]: {three} \ 'four' "
    words = ["sample", f"model.weights={tiny_weights}", *MODEL, "num_steps=1", "images_per_prompt=1"]
    assert cli.main([*words, f"prompt={text}", f"output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "0000_00_it_s_one_two_three_four.png").is_file()


# train


def test_training_writes_the_run_and_a_lora_quietly(
    train_words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [sys.executable, "-m", "fastgrpo.cli", *train_words, "train.iterations=1", f"output={tmp_path / 'run'}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "fastgrpo train: loading"
    assert lines[2] == "iteration 0/1  evaluating before training"
    assert lines[-1] == f"written to {tmp_path / 'run'}"
    assert f"  {tmp_path / 'run/images/before_after.png'}  what changed" in lines
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "checkpoints", "lora"} <= written


def test_a_taken_run_directory_is_refused(
    run: Path, train_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, [*train_words, f"output={run}"], 2, f"{run} already holds a run", "resume=true")


def test_a_reward_that_fails_is_a_failed_run(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_that_fail.py").write_text("def broken(images, prompts):\n    return images.mean() / 0 * 0\n")
    monkeypatch.chdir(tmp_path)
    words = [word for word in train_words if word != REWARD]
    words += ["reward=custom", "reward.path=rewards_that_fail.broken", f"output={tmp_path / 'run'}"]
    fails(capsys, words, 1, "reward 'custom' answered shape []")


# sample


def test_sampling_a_run_differs_from_the_base_and_is_reproducible(
    run: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["sample", "prompt=a red circle", "num_steps=2", "images_per_prompt=2"]
    assert cli.main([*common, f"run={run}", "runtime.micro_batch=4", f"output={tmp_path / 'a'}"]) == 0
    assert f"averaged weights of {run}/checkpoints/step_000003" in capsys.readouterr().out
    step = run / "checkpoints" / "step_000003"
    assert cli.main([*common, f"run={step}", "runtime.micro_batch=4", f"output={tmp_path / 'b'}"]) == 0
    assert cli.main([*common, f"model.weights={tiny_weights}", *MODEL, f"output={tmp_path / 'base'}"]) == 0
    names = ["0000_00_a_red_circle.png", "0000_01_a_red_circle.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*names, "grid.png"]
    for name in names:
        a, b, base = (np.asarray(Image.open(tmp_path / where / name)) for where in ("a", "b", "base"))
        assert a.shape == (32, 32, 3)
        assert (a == b).all()
        assert (a != base).any()


def test_searched_samples_have_more_reward_than_plain_ones(
    run: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File size is the reward, of the model of a run; one image in full is the plain one."""
    words = ["sample", f"run={run}", "runtime.micro_batch=4", REWARD, f"prompts.path={prompts}", "num_steps=4"]
    words += ["images_per_prompt=2", "reward.terms.jpeg.quality=95"]
    said, files = {}, {}
    for name, more in (
        ("plain", ["search=false", "budget=1"]),
        ("one", ["search=true", "budget=4"]),
        ("halving", ["search=halving", "budget=20"]),
        ("elite", ["search=elite", "budget=20", "search.estimate_steps=1"]),
    ):
        capsys.readouterr()
        assert cli.main([*words, *more, f"output={tmp_path / name}"]) == 0
        said[name] = capsys.readouterr().out
        paths = sorted((tmp_path / name).glob("0*.png"))
        assert len(paths) == 2 * len(PROMPTS)
        files[name] = [path.read_bytes() for path in paths]
        assert len(set(files[name])) == len(paths)
    assert files["one"] == files["plain"]
    assert f"averaged weights of {run}/checkpoints/step_000003: {tmp_path / 'plain'}," in said["plain"]
    assert "each the best of 1 that BestOfN found by 1 * jpeg: 4 network evaluations" in said["one"]
    plan = Halving().plan(20, 4)
    assert f"the best of {plan.candidates} that Halving found" in said["halving"]
    assert f": {plan.velocities} network evaluations an image of budget=20, {plan.scored} images" in said["halving"]
    # 16 estimates of a step
    assert (
        "the best of 16 that Elite found by 1 * jpeg: 20 network evaluations an image of budget=20, 17" in said["elite"]
    )
    kilobytes = {name: sum(map(len, contents)) for name, contents in files.items()}
    assert kilobytes["halving"] > kilobytes["plain"]
    # a pipe gets lines alone
    assert "searching" not in said["halving"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give either prompt="),
        (["prompt=a", "prompts.path=b"], "give either prompt="),
        (["prompts.path=nowhere.txt"], "prompt file nowhere.txt does not exist"),
        (["prompt=a", "num_steps=0"], "num_steps must be at least 1"),
        (["prompt=a", "images_per_prompt=0"], "images_per_prompt must be at least 1"),
        (["prompt=a", "output=/proc/nowhere"], "cannot write /proc/nowhere"),
        (["prompt=a", "search=yes"], "search must be true, false or one of best_of_estimates, best_of_n, elite"),
        (["prompt=a", "search=elite", "search.keep=0.5"], "search.keep"),
        (["prompt=a", "search=halving", "search.keep=2"], "search.keep must lie between 0 and 1, got 2"),
        (["prompt=a", "search=true", "search.looks=[.5]"], "unknown key search.looks; search=halving has it"),
        (["prompt=a", "search=true", "budget=9"], "budget=9 is too small: one image of 10 steps takes 10"),
        (["prompt=a", "search=true", "budget=many"], "budget must be int"),
        (["prompt=a", "search=true", "budget=19", "model.guidance_scale=2.0"], "raise it to at least 20"),
        (["prompt=a", "search=elite", "num_steps=3"], "search.estimate_steps must be at most num_steps = 3"),
        (["prompt=nothing", "search=true", "reward=shapes"], "reward 'shapes' cannot judge the prompt 'nothing'"),
        (["prompt=a", "run=nowhere"], "run=nowhere is neither a run directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_sampling_refuses_bad_input(
    words: list[str], says: str, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "run=nowhere" in words else [f"model.weights={tiny_weights}", *MODEL]
    fails(capsys, ["sample", *model, REWARD, f"output={tmp_path / 'out'}", *words], 2, says)


def test_an_output_with_something_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    fails(capsys, ["sample", "prompt=a", f"output={tmp_path}"], 2, f"{tmp_path} is not empty", "output=")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# the model of a run


def test_a_run_brings_its_own_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("model.guidance_scale=2.0", "adaptation=full"):
        fails(capsys, ["sample", "prompt=a", f"run={run}", word], 2, word, "brings its own")


def test_a_run_of_other_weights_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    config: Any = OmegaConf.load(other / "config.yaml")
    config.model.weights = str(make_pipeline(tmp_path / "other", seed=1))
    OmegaConf.save(config, other / "config.yaml")
    fails(capsys, ["sample", "prompt=a", f"run={other}", f"output={tmp_path / 'out'}"], 1, "is of model")


def test_a_run_without_a_complete_checkpoint_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    words = ["sample", "prompt=a", f"run={other}", f"output={tmp_path / 'out'}"]
    fails(capsys, words, 2, "has no complete checkpoint")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "_target_", "os.system"),
        ("model", "_target_", "fastgrpo.rewards.custom.from_path"),
        ("model", "_target_", "fastgrpo.models.weights.Path"),
        ("adaptation", "_target_", "fastgrpo.config.find_target"),
        ("adaptation", "targets", [{"_target_": "os.getcwd"}]),
        ("model", "weights", "${oc.env:HOME}"),
    ],
)
def test_the_config_of_a_run_is_data(
    section: str, key: str, value: object, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "run")
    config: Any = OmegaConf.load(other / "config.yaml")
    config[section][key] = value
    OmegaConf.save(config, other / "config.yaml")
    fails(capsys, ["sample", "prompt=a", f"run={other}"], 2, f"{other / 'config.yaml'}: {section}.{key}")


@pytest.mark.parametrize("text", ["", "- 1", "model: 3", "{", "model: {}"], ids=repr)
def test_a_config_that_is_not_one_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    fails(capsys, ["sample", "prompt=a", f"run={tmp_path}"], 2, "is not the config of a run")


# evaluate


def test_evaluation_of_a_run_is_the_one_that_training_logged_beside_that_of_its_base(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's own reward, held-out prompts, number of images and steps, none of which is named."""
    assert cli.main(["evaluate", "runtime.micro_batch=4", f"run={run}", f"output={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert "jpeg" in shown
    assert "one object" in shown
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    first, *_, logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert report["rewards"]["jpeg"]["mean"] == pytest.approx(logged["eval/jpeg"], rel=1e-6)
    assert report["base"]["jpeg"]["mean"] == pytest.approx(first["eval/jpeg"], rel=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert report["differences"]["jpeg"] == pytest.approx(summary["differences"]["jpeg"], rel=1e-4)
    assert logged["eval/jpeg"] != first["eval/jpeg"]
    row = next(line for line in shown.splitlines() if f"{first['eval/jpeg']:.4f}" in line)
    assert f"{logged['eval/jpeg']:.4f}" in row
    assert report["images"] == 2 * len(PROMPTS)
    assert sum(kind["prompts"] for kind in report["kinds"].values()) == len(PROMPTS)
    weighted = sum(kind["prompts"] * kind["rewards"]["jpeg"]["mean"] for kind in report["kinds"].values())
    assert weighted / len(PROMPTS) == pytest.approx(report["rewards"]["jpeg"]["mean"])
    assert report["rewards"]["jpeg"]["standard_error"] > 0
    assert report["versions"]["torch"] == torch.__version__
    assert {"hardware", "commit"} <= report.keys()
    names = {"evaluation.json", "grid.png", "before_after.png", "before_after_all.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert shown.splitlines()[-1] == f"written to {tmp_path / 'out'}: evaluation.json, grid.png, before_after.png"


def test_what_the_line_names_judges_a_run_and_the_base_can_be_left_out(
    run: Path, prompts: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two.txt"
    two.write_text("\n".join(PROMPTS[:2]))
    words = [
        "evaluate",
        f"run={run}",
        "runtime.micro_batch=4",
        "reward=jpeg_compressibility",
        f"prompts.held_out={two}",
    ]
    assert cli.main([*words, "evaluate.images_per_prompt=1", "base=false", f"output={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (report["images"], report["num_steps"], report["base"], report["differences"]) == (2, 2, {}, {})
    # minus its kilobytes
    assert report["rewards"]["jpeg"]["mean"] < 0


def test_a_reward_of_ones_own_judges_a_run_only_where_the_line_names_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_brightness.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\n"
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(run, tmp_path / "run")
    config: Any = OmegaConf.load(other / "config.yaml")
    config.reward.terms = {
        "custom": {"_target_": "fastgrpo.rewards.custom.from_path", "path": "own_brightness.brightness"}
    }
    config.reward.weights = {"custom": 1.0}
    OmegaConf.save(config, other / "config.yaml")
    words = ["evaluate", f"run={other}", "runtime.micro_batch=4", "evaluate.images_per_prompt=1", "reward.golden=false"]
    fails(capsys, words[:-1], 2, f"{other / 'config.yaml'}: the run's reward has code of your own", "reward=custom")
    assert not (tmp_path / "imported").exists()
    own = ["reward=custom", "reward.path=own_brightness.brightness", f"output={tmp_path / 'out'}"]
    assert cli.main([*words, *own]) == 0
    assert set(json.loads((tmp_path / "out" / "evaluation.json").read_text())["rewards"]) == {"custom"}
    # sampling asks no reward unless it searches
    sample = ["sample", "prompt=a", f"run={other}", "num_steps=1", "runtime.micro_batch=4"]
    assert cli.main([*sample, f"output={tmp_path / 'samples'}"]) == 0
    fails(capsys, [*sample, "search=true"], 2, "the run's reward has code of your own")


def test_default_outputs_are_numbered_and_named_ones_refused(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", f"model.weights={tiny_weights}", *MODEL, "num_steps=1", "images_per_prompt=1", "prompt=a"]
    for _ in range(3):
        assert cli.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["samples", "samples_2", "samples_3"]
    assert cli.main([*words, "output=outputs/samples_2"]) == 2


def test_an_evaluation_of_searched_images_says_what_it_took_and_judges_by_what_is_watched(
    tiny_weights: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", f"model.weights={tiny_weights}", *MODEL, REWARD, f"prompts.held_out={prompts}"]
    words += ["reward.terms.jpeg.quality=95", "evaluate.images_per_prompt=2", "evaluate.num_steps=4"]
    words += ["+reward/terms@reward.watch.small=jpeg_compressibility", "reward.watch.small.quality=20", "budget=19"]
    reports = {}
    for search in ("false", "best_of_n"):
        assert cli.main([*words, f"search={search}", f"output={tmp_path / search}"]) == 0
        reports[search] = json.loads((tmp_path / search / "evaluation.json").read_text())
    shown = " ".join(capsys.readouterr().out.split())
    assert "each the best of 4 that BestOfN found by 1 * jpeg: 16 network evaluations an image of budget=19, 4" in shown
    assert reports["false"]["search"] is None
    assert reports["best_of_n"]["search"] == {
        "method": "BestOfN",
        "settings": {},
        "maximized": {"jpeg": 1.0},
        "budget": 19,
        "candidates": 4,
        "evaluations_per_image": 16.0,
        "scored_per_image": 4.0,
    }
    assert list(reports["best_of_n"]["rewards"]) == ["jpeg", "small"]
    plain, found = (reports[search]["rewards"]["jpeg"]["mean"] for search in ("false", "best_of_n"))
    assert found > plain
    assert reports["best_of_n"]["images"] == reports["false"]["images"] == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["search=true", "budget=9"], "budget=9 is too small"),
        (["search=maybe"], "search must be true, false or one of"),
        (["search=elite", "evaluate.num_steps=2"], "search.estimate_steps must be at most num_steps = 2"),
    ],
    ids=" ".join,
)
def test_an_evaluation_refuses_a_search_that_cannot_be(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["evaluate", *words, f"output={tmp_path / 'out'}"], 2, says)
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_ends_a_search(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_without_number.py").write_text(
        "def broken(images, prompts):\n    return images.mean(dim=(1, 2, 3)) / 0 * 0\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["sample", "prompt=a", f"model.weights={tiny_weights}", *MODEL, "search=true", "reward.golden=false"]
    words += ["reward=custom", "reward.path=rewards_without_number.broken", f"output={tmp_path / 'out'}"]
    fails(capsys, words, 1, "reward 'custom' answered nan for image 0")


# export


def test_exported_weights_are_the_averages_in_diffusers(
    run: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", f"run={run}", f"output={out}", "merged=true"]) == 0
    assert f'load_lora_weights("{out / "lora"}", weight_name=' in capsys.readouterr().out
    with_lora = StableDiffusion3Pipeline.from_pretrained(tiny_weights, **WITHOUT_T5)
    with_lora.load_lora_weights(out / "lora")
    merged = StableDiffusion3Pipeline.from_pretrained(out / "merged", **WITHOUT_T5)
    base = StableDiffusion3Pipeline.from_pretrained(tiny_weights, **WITHOUT_T5)
    v_lora, v_merged, v_base = (_velocity(pipeline) for pipeline in (with_lora, merged, base))
    torch.testing.assert_close(v_lora, v_merged, rtol=1e-4, atol=1e-5)
    assert (v_lora - v_base).abs().max() > 100 * (v_lora - v_merged).abs().max()
    state = Checkpoint(run / "checkpoints", every=1, keep=1).load(run / "checkpoints" / "step_000003")
    # the last block's text stream leads nowhere, so its adapters stay 0; and a file's tensors come in any order
    name, ema = max(
        ((n, w) for n, w in state.ema.items() if n.endswith("lora_B.weight")), key=lambda item: item[1].abs().max()
    )
    assert (ema != state.weights[name]).any()
    layer = name.removesuffix(".lora_B.weight")
    delta = merged.transformer.get_submodule(layer).weight - base.transformer.get_submodule(layer).weight
    scale = 8.0 / 4
    torch.testing.assert_close(delta, scale * ema @ state.ema[f"{layer}.lora_A.weight"], rtol=1e-3, atol=1e-5)


def _velocity(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
        x = torch.randn(1, 16, 4, 4, generator=generator)
        return pipeline.transformer(x, embeds, pooled, torch.tensor([500.0]), return_dict=False)[0]


def test_a_fully_trained_run_exports_merged_only(
    train_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = tmp_path / "run", [word for word in train_words if word not in LORA]
    assert cli.main([*words, "adaptation=full", "train.iterations=1", f"output={run}"]) == 0
    export = ["export", f"run={run}", f"output={tmp_path / 'out'}"]
    fails(capsys, export, 2, "no LoRA to export; use merged=true")
    assert cli.main([*export, "merged=true"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out" / "merged", **WITHOUT_T5)
    ema = Checkpoint(run / "checkpoints", every=1, keep=1).load(run / "checkpoints" / "step_000001").ema
    for name, weight in merged.transformer.named_parameters():
        assert torch.equal(weight, ema[name])


# doctor


@pytest.mark.parametrize(
    ("choices", "num_steps"),
    [
        ("algorithm=flow_grpo_fast", 3),
        ("algorithm=flow_grpo", 9),
        ("algorithm=flow_grpo_fast model.guidance_scale=2.0", 3),
        ("algorithm=flow_grpo_fast adaptation=full", 3),
    ],
)
def test_doctor_finds_a_ratio_of_one(
    choices: str, num_steps: int, tiny_weights: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"model.weights={tiny_weights}", *MODEL, f"prompts.path={prompts}"]
    assert cli.main([*words, *(() if "adaptation=full" in choices else LORA), *choices.split()]) == 0
    shown = capsys.readouterr().out
    assert f"ratio_deviation = 0 over 8 samples, {num_steps} terms of each" in shown
    assert "fastgrpo[flash-attn]" in shown.replace("\n", "")
    assert torch.__version__ in shown


def test_doctor_refuses_a_deterministic_policy(
    tiny_weights: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"model.weights={tiny_weights}", *MODEL, *LORA, f"prompts.path={prompts}"]
    fails(capsys, [*words, "algorithm=flow_grpo", "algorithm/dynamics=ode"], 2, "use algorithm/dynamics=flow_sde")


def test_doctor_finds_that_velocities_agree_where_images_are_learned_from(
    tiny_weights: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", f"model.weights={tiny_weights}", *MODEL, *LORA, f"prompts.path={prompts}"]
    assert cli.main([*words, "algorithm.timesteps.per_image=2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = re.search(r"velocity_deviation = (\S+) over 8 samples, 2 terms of each \(limit 0\.001\)", shown)
    assert found is not None
    assert 0 < float(found[1]) < 1e-4
    fails(capsys, [*words, "max_deviation=0"], 1, "velocity_deviation = ", "so rollout and update disagree")


def test_doctor_fails_where_a_replay_is_not_the_rollout(
    tiny_weights: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgrpo.models.sd3 import StableDiffusion3

    velocity = StableDiffusion3.velocity

    def other_under_gradient(self, x, t, conditions, *branch):  # type: ignore[no-untyped-def]
        v = velocity(self, x, t, conditions, *branch)
        return combined(v) * 1.001 if torch.is_grad_enabled() else v

    monkeypatch.setattr(StableDiffusion3, "velocity", other_under_gradient)
    words = ["doctor", f"model.weights={tiny_weights}", *MODEL, *LORA, f"prompts.path={prompts}"]
    # with a penalty the replay is velocity_and_reference
    words += ["algorithm=flow_grpo", "algorithm.objective.kl_coef=0.0"]
    fails(capsys, words, 1, "ratio_deviation = ", "rollout and update disagree")
