"""Code of the user's own, from the working directory: commands find it, and no config on disk imports it alone."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from fastgrpo import cli
from fastgrpo.config import load_config
from fastgrpo.own_code.named import PIECES, check_named, to_name_again
from tests.tiny_config import make_overrides

# imports are counted in a file, also those of other processes
COUNTS = "from pathlib import Path\nwith Path('imported').open('a') as file:\n    file.write(__name__ + ' ')\n"
MODEL = f"""
{COUNTS}
from fastgrpo.models.sd3 import StableDiffusion3

class Marked(StableDiffusion3):
    def save_lora(self, directory):
        super().save_lora(directory)
        (directory / "marked.txt").write_text("mine")

    def decode(self, x_BCHW):
        return 1 - super().decode(x_BCHW)

class Few(Marked):
    def __init__(self, *, path: str, strength: float = 1.0, **others):
        super().__init__(weights=path, resolution=64, **others)

class NoOthers(Marked):
    def __init__(self, *, weights: str, strength: float = 1.0, adaptation, device, attention, compile, checkpointing,
                 lossy):
        self.strength = strength
        super().__init__(weights=weights, resolution=64, adaptation=adaptation, device=device)

class Unfinished:
    def __init__(self, **others):
        pass

class Stubborn:
    def __init__(self, weights, adaptation):
        pass

number = 3
"""
LOSS = f"""
{COUNTS}
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgrpo.algorithm.objective.clipped_surrogate import ClippedSurrogate

if TYPE_CHECKING:
    from nowhere import Number

@dataclass(frozen=True, kw_only=True)
class Scaled(ClippedSurrogate):
    by: "Number" = 2.0

    def __post_init__(self):
        if self.by == 7:
            raise RuntimeError("not seven")
"""
REWARD = f"{COUNTS}\ndef half(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
NAMED = "model._target_=own_model.Marked"
NAMED_LOSS = "algorithm.objective._target_=own_loss.Scaled"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with modules of one's own."""
    for name, source in (("own_model", MODEL), ("own_loss", LOSS), ("own_reward", REWARD)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def words(command: str, weights: Path, *more: str) -> list[str]:
    return [command, *make_overrides(weights, Path("run"), "train.iterations=1", *more)]


def imported() -> str:
    return Path("imported").read_text() if Path("imported").exists() else ""


def fails(capsys: pytest.CaptureFixture[str], line: list[str], *says: str) -> str:
    capsys.readouterr()
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for text in says:
        assert text in error
    return error


def begin(weights: Path, *more: str) -> None:
    """A run that is begun, its config alone."""
    Path("run").mkdir()
    config = load_config("train", words("train", weights, *more)[1:])
    OmegaConf.save(config, "run/config.yaml")
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    Path("imported").unlink(missing_ok=True)


def change(key: str, value: object) -> None:
    """Write another value into the config of the run."""
    config: Any = OmegaConf.load("run/config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, "run/config.yaml")


def test_a_model_of_ones_own_trains_by_the_console_script_and_every_command_takes_its_run(
    tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # as the console script: the working directory is not on the path
    script = [sys.executable, "-P", "-c", "import sys; from fastgrpo.cli import main; sys.exit(main())"]
    done = subprocess.run(
        [*script, *words("train", tiny_weights, NAMED, NAMED_LOSS)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert Path("run/lora/marked.txt").read_text() == "mine"
    config: Any = OmegaConf.load("run/config.yaml")
    assert (config.model._target_, config.algorithm.objective._target_) == ("own_model.Marked", "own_loss.Scaled")
    Path("imported").unlink()

    prompts, few = "prompts.held_out=prompts.txt", "evaluate.num_steps=1"
    commands = [
        ["sample", "prompt=a", "run=run", "output=out/sample", "num_steps=1", "images_per_prompt=1"],
        ["evaluate", "run=run", "output=out/evaluate", prompts, "reward=jpeg_incompressibility", few],
        ["export", "run=run", "output=out/export"],
    ]
    for command in commands:
        fails(capsys, command, "run/config.yaml: model._target_=own_model.Marked", f"add {NAMED} to the command")
        assert imported() == ""
    for command in commands:
        assert cli.main([*command, NAMED]) == 0
    assert Path("out/export/lora/marked.txt").read_text() == "mine"
    other = fails(capsys, [*commands[2], "model._target_=own_model.Few"], "has model._target_=own_model.Marked")
    assert "run/config.yaml" in other
    fails(capsys, [*commands[2], NAMED, "model.guidance_scale=2.0"], "brings its own model")
    architecture = "model.architecture._target_"
    fails(capsys, [*commands[2], NAMED, f"{architecture}=own_loss.Scaled"], f"has no {architecture}; ")

    resume = ["train", "output=run", "resume=true", "train.iterations=2"]
    fails(capsys, [*resume, NAMED], f"add {NAMED_LOSS} to the command")
    fails(capsys, resume, f"add {NAMED_LOSS} {NAMED} to the command")
    assert cli.main([*resume, NAMED, NAMED_LOSS]) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3


def test_images_of_ones_own_model_are_its_own(tiny_weights: Path) -> None:
    """Its decode is the negative of the other's."""
    from PIL import Image

    line = ["sample", "prompt=a", f"model.weights={tiny_weights}", "model.resolution=32", "runtime.device=cpu"]
    line += ["num_steps=1", "images_per_prompt=1"]
    assert cli.main([*line, "output=theirs"]) == 0
    assert cli.main([*line, NAMED, "output=mine"]) == 0
    theirs, mine = (
        torch.tensor(list(Image.open(Path(name) / "0000_00_a.png").tobytes())).int() for name in ("theirs", "mine")
    )
    assert (theirs + mine - 255).abs().max() <= 1
    assert (theirs - mine).abs().max() > 10


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model._target_", "own_model.Marked", f"add {NAMED} to"),
        ("adaptation._target_", "own_model.Marked", "add adaptation._target_=own_model.Marked to"),
        ("algorithm.objective._target_", "own_loss.Scaled", f"add {NAMED_LOSS} to"),
        ("reward.terms.jpeg._target_", "own_reward.half", "add reward.terms.jpeg._target_=own_reward.half to"),
        (
            "reward.terms.more",
            {"_target_": "fastgrpo.rewards.custom.from_path", "path": "own_reward.half"},
            "add reward.terms.more.path=own_reward.half to",
        ),
        ("reward._target_", "fastgrpo.own_code.found.find", "no piece of fastgrpo's"),
        ("reward._target_", "fastgrpo.tensorrt.engine.load_library", "no piece of fastgrpo's"),
        ("reward._target_", "fastgrpo.rewards.scoring.Tensor", "no piece of fastgrpo's"),
        (
            "model.more._target_",
            "fastgrpo.models.sd3.Gone",
            "config.yaml: model.more._target_=fastgrpo.models.sd3.Gone: ",
        ),
        (
            "adaptation._target_",
            "fastgrpo.models.sd2.Gone",
            "config.yaml: adaptation._target_=fastgrpo.models.sd2.Gone: there is no module",
        ),
        ("solver._target_", "fastgrpo.cli.Command", "no piece of fastgrpo's"),
        ("adaptation.targets", [{"_target_": "own_model.Marked"}], "give adaptation.targets again"),
        ("model._target_", "own_model.Marked; echo", "names no class"),
        ("seed", "${oc.env:HOME}", "seed is the interpolation"),
        ("model._target_", "${oc.env:EVIL}", "model._target_ is the interpolation"),
    ],
)
def test_a_config_on_disk_imports_nothing_that_the_line_does_not_name(
    key: str, value: object, says: str, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tiny_weights)
    change(key, value)
    # the working directory is on the path in any case
    sys.path.insert(0, str(Path.cwd()))
    for command in ("train", "submit"):
        error = fails(capsys, [command, "output=run", "resume=true"], says)
        assert "run/config.yaml: " in error or "own_" not in error
    if key.startswith(("model", "adaptation")):
        fails(capsys, ["export", "run=run", "output=out"], "run/config.yaml: ")
    assert imported() == ""


def test_weights_in_a_package_do_not_import_it(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tiny_weights)
    Path("own_package/inside").mkdir(parents=True)
    Path("own_package/__init__.py").write_text(COUNTS)
    sys.path.insert(0, str(Path.cwd()))
    change("model.weights", "pkg://own_package.inside/weights")
    (run := Path("run/checkpoints/step_000001")).mkdir(parents=True)
    assert cli.main(["export", f"run={run}", "output=out", "runtime.device=cpu"]) != 0
    change("model.weights", f"{tiny_weights}")
    change("prompts.path", "pkg://own_package/prompts.txt")
    fails(capsys, ["train", "output=run", "resume=true"], "own_package/prompts.txt")
    change("prompts.path", "pkg://own_nowhere/prompts.txt")
    fails(capsys, ["train", "output=run", "resume=true"], "there is no package 'own_nowhere'")
    assert imported() == ""
    shutil.rmtree("own_package")


def test_a_reward_of_ones_own_is_named_again_to_go_on(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tiny_weights, "reward=custom", "reward.path=own_reward.half")
    fails(capsys, ["train", "output=run", "resume=true"], "add reward.path=own_reward.half to the command")
    assert imported() == ""
    config = load_config("train", ["output=run", "resume=true", "reward.path=own_reward.half"])
    assert config.reward.path == "own_reward.half"


def test_a_token_is_sent_where_the_line_names_its_variable_again(
    tiny_weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_TOKEN", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    word, judge = "reward.terms.http.token_env=OWN_TOKEN", "reward.watch.judge.token_env=OWN_TOKEN"
    begin(tiny_weights, "reward=http", "reward.terms.http.name=red", word)
    resume = ["output=run", "resume=true"]
    change("reward.terms.http.endpoints", ["http://elsewhere"])
    for command in ("train", "submit"):
        error = fails(capsys, [command, *resume], f"run/config.yaml: {word} sends", f"add {word} to the command")
        assert "to ['http://elsewhere']" in error
    for other in ("reward.terms.http.token_env=OTHER", "++reward.watch.http.token_env=OWN_TOKEN", ""):
        line = [*resume, *([other] if other else [])]
        if "OTHER" in other:
            assert load_config("train", line).reward.terms.http.token_env == "OTHER"
        else:
            fails(capsys, ["train", *line], f"add {word} ")
    assert load_config("train", [*resume, word]).reward.terms.http.token_env == "OWN_TOKEN"
    assert load_config("train", [*resume, "reward.terms.http.token_env=''"]).reward.terms.http.token_env == ""
    # of each reward, and by its value
    change("reward.watch.judge", {"_target_": "fastgrpo.rewards.remote.vision_judge.VisionJudge"})
    change("reward.watch.judge.token_env", "OWN_TOKEN")
    fails(capsys, ["train", *resume, word], f"add {judge} to the command")
    change("reward.terms.http.token_env", "AWS_SECRET_ACCESS_KEY")
    stolen = "reward.terms.http.token_env=AWS_SECRET_ACCESS_KEY"
    error = fails(capsys, ["train", *resume], f"add {stolen} {judge} to the command")
    assert "s3cret" not in error


def test_a_token_is_named_by_its_value() -> None:
    config = {"reward": {"terms": {"http": {"token_env": "OTHER", "endpoints": ["http://a"]}}}}
    with pytest.raises(ValueError, match=r"add reward\.terms\.http\.token_env=OTHER to the command"):
        check_named(config, Path("c"), {"reward.terms.http.token_env": "OWN_TOKEN"}, PIECES)
    check_named(config, Path("c"), {"reward.terms.http.token_env": "OTHER"}, PIECES)


def test_what_to_go_on_with_names_code_and_tokens() -> None:
    remote = {"_target_": "fastgrpo.rewards.remote.http_reward.HttpReward", "endpoints": ["http://a"]}
    config = {
        "model": {"_target_": "own_model.Marked"},
        "reward": {"terms": {"a": {**remote, "token_env": "OWN TOKEN"}, "b": {**remote, "token_env": ""}}},
    }
    assert to_name_again(config) == f"{NAMED} 'reward.terms.a.token_env=OWN TOKEN'"


def test_what_the_line_names_at_one_key_is_not_allowed_at_another(
    tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tiny_weights)
    change("solver._target_", "own_loss.Scaled")
    fails(capsys, ["train", "output=run", "resume=true", NAMED_LOSS], "add solver._target_=own_loss.Scaled to")
    assert imported() == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["model._target_=own_model"], "model._target_ is module.name, as in "),
        (["model._target_=./own_model.py"], "model._target_ is module.name, as in "),
        (["model._target_=own_modle.Marked"], "there is no module 'own_modle'; put own_modle.py into "),
        (["model._target_=own_model.Markd"], "own_model.py has no 'Markd'; it defines own_model.Marked, own_model.Few"),
        (["model._target_=own_model.number"], "own_model.number is of type int, not a class or a function"),
        (["model._target_=own_wrong.Model"], "own_wrong.py, line 2: SyntaxError: "),
        (["model._target_=fastgrpo.models.sd3.Stable"], "sd3.py has no 'Stable'; it defines fastgrpo.models.sd3."),
        (["model._target_=fastgrpo.models.sd4.Stable"], "there is no module 'fastgrpo.models.sd4'; correct it"),
        (["model._target_=builtins.dict"], "builtins.dict does not say what it takes"),
        (["model._target_=own_model.NoOthers", "model.more=1"], "unknown key model.more; NoOthers takes weights, str"),
        (["model._target_=own_model.NoOthers", "model.strength=much"], "model.strength must be float, got 'much'"),
        (["model._target_=own_model.Few"], "own_model.Few needs path"),
        (
            ["model._target_=own_model.Unfinished"],
            "Unfinished lacks latent_shape, latent_shape_of, device, trainable, ",
        ),
        (["model._target_=own_model.Stubborn"], "own_model.Stubborn does not take device, attention, "),
        ([NAMED_LOSS, "algorithm.objective.by=7"], "RuntimeError('not seven')"),
        (["algorithm.objectve._target_=own_loss.Scaled"], "unknown key algorithm.objectve; Algorithm takes schedule"),
        (["train._target_=own_loss.Scaled"], "unknown key train._target_"),
        (["model._target_=peft.Model"], "peft.py has the name of "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_in_ones_own_code_is_one_line(
    line: list[str], says: str, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own_wrong.py").write_text("\nclass Model(:\n")
    Path("peft.py").write_text("class Model: ...\n")
    fails(capsys, words("train", tiny_weights, *line), says)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        # what the default's piece takes and one's own does not is left out, what one's own takes may be given
        (["model._target_=own_model.NoOthers", "model.strength=2.0"], "model", {"strength": 2.0}),
        (["model._target_=own_model.NoOthers", "+model.strength=2.0"], "model", {"strength": 2.0}),
        ([NAMED_LOSS, "algorithm.objective.by=3"], "algorithm.objective", {"by": 3}),
        (
            ["algorithm.objective={_target_: own_loss.Scaled, clip_range: 0.5}"],
            "algorithm.objective",
            {"clip_range": 0.5},
        ),
    ],
)
def test_ones_own_piece_takes_its_own_keys(
    line: list[str], key: str, expected: dict[str, Any], tiny_weights: Path
) -> None:
    config = load_config("train", ["algorithm=flow_grpo", f"model.weights={tiny_weights}", *line])
    found: Any = OmegaConf.to_container(OmegaConf.select(config, key))
    assert found | expected == found
    if key == "model":
        assert found == {"_target_": "own_model.NoOthers", "weights": str(tiny_weights), **expected}


def test_a_package_with_relative_imports(tiny_weights: Path) -> None:
    Path("own_package").mkdir()
    Path("own_package/__init__.py").touch()
    Path("own_package/layers.py").write_text("from own_model import Marked\n")
    Path("own_package/models.py").write_text("from .layers import Marked\nclass Model(Marked): ...\n")
    line = [f"model.weights={tiny_weights}", "model._target_=own_package.models.Model"]
    assert load_config("train", line).model._target_ == "own_package.models.Model"
    assert sys.modules["own_package.models"].Model.__mro__[1].__name__ == "Marked"
