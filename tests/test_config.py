"""From words to a config: paths, quotation marks, and the config of a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fastgrpo.composing import config_groups
from fastgrpo.config import load_config
from fastgrpo.memory.batches import BatchSizes
from fastgrpo.overrides import quoted, value_of
from fastgrpo.parts import RunParts, read_runtime
from fastgrpo.pieces import build


def begin(tmp_path: Path, *overrides: str) -> Path:
    """The directory of a run that was begun with the overrides: its config alone."""
    output = tmp_path / "run"
    output.mkdir()
    config = load_config("train", [*overrides, f"output={output}"])
    history = [{"after_iteration": 1, "changed": {"train.iterations": [1, 2]}}]
    plain: Any = OmegaConf.to_container(config)
    OmegaConf.save(plain | {"history": history}, output / "config.yaml")
    return output


def resumed(output: Path, *overrides: str) -> Any:
    return load_config("train", [*overrides, f"output={output}", "resume=true"])


def differences(a: Any, b: Any, key: str = "") -> set[str]:
    if not OmegaConf.is_dict(a) or not OmegaConf.is_dict(b):
        return set() if a == b else {key}
    return {found for name in {*a, *b} for found in differences(a.get(name), b.get(name), f"{key}.{name}".strip("."))}


@pytest.mark.parametrize(
    ("begun", "line", "changed"),
    [
        # the recipe is not forgotten
        (["algorithm=flow_grpo_fast", "train.iterations=1"], ["train.iterations=2"], {"train.iterations"}),
        (["algorithm=flow_grpo_fast"], [], set()),
        # a value of the default config is one that is asked for, too
        (["train.learning_rate=1e-4"], ["train.learning_rate=1e-3"], {"train.learning_rate"}),
        # the same words again change nothing, in whatever order
        (
            ["algorithm=flow_grpo", "algorithm.schedule.num_steps=4"],
            ["algorithm.schedule.num_steps=4", "algorithm=flow_grpo"],
            set(),
        ),
        # a group that is chosen anew is the group as it comes
        (["algorithm=flow_grpo", "algorithm.objective.kl_coef=1.0"], ["algorithm=flow_grpo"], {"kl_coef"}),
        (["algorithm=flow_grpo", "algorithm.schedule.num_steps=4"], ["algorithm/schedule=sd3"], {"num_steps"}),
        # but for its time grid, which may be the model's
        (["model=flux_schnell", "algorithm=nft"], ["algorithm=nft"], set()),
        (["model=flux_schnell", "algorithm=nft"], ["algorithm=nft", "algorithm.schedule.num_steps=3"], {"num_steps"}),
        (["model=flux_schnell", "algorithm=nft"], ["algorithm=nft", "algorithm/schedule=sd3"], {"schedule"}),
        (["model=flux_schnell", "algorithm=nft"], ["algorithm=nft", "model=flux_schnell"], set()),
        (["model=flux_schnell", "algorithm=nft"], ["algorithm=flow_grpo"], {"algorithm"}),
        (["algorithm=flow_grpo", "algorithm.schedule.num_steps=4"], ["algorithm=flow_grpo"], set()),
        # one group in another
        (["algorithm=flow_grpo"], ["algorithm/dynamics=cps"], {"dynamics"}),
        (["algorithm=flow_grpo"], ["algorithm/dynamics=flow_sde"], set()),
        # a model that is named again does not bring its own batches and compilation once more
        (["model=sd35_medium", "compile=graphs", "runtime.micro_batch=4"], ["model=sd35_medium"], set()),
        (["model=sd35_medium", "compile=eager"], ["model=sd35_medium", "compile=blocks"], {"compile"}),
        (["experiment=flow_grpo_sd35", "compile=eager"], ["experiment=flow_grpo_sd35"], set()),
        # nor its adapters and its time grid
        (
            ["model=flux_dev", "adaptation.rank=16", "algorithm/schedule=linear", "algorithm.schedule.num_steps=7"],
            ["model=flux_dev"],
            set(),
        ),
        (["model=flux_dev"], ["model=flux_dev", "algorithm/schedule=linear"], {"schedule"}),
        # a key that only the run's recipe has
        (["algorithm/noise=elite"], ["algorithm.noise.elites=3"], {"elites"}),
        (["+reward.weights.more=2.0"], ["+reward.weights.more=2.0"], set()),
        ([], ["+reward.weights.more=2.0"], {"reward.weights.more"}),
    ],
    ids=lambda value: " ".join(sorted(value)) or "-",
)
def test_a_resumed_run_keeps_its_config_but_for_what_the_line_names(
    begun: list[str], line: list[str], changed: set[str], tmp_path: Path
) -> None:
    output = begin(tmp_path, *begun)
    config = resumed(output, *line)
    kept: Any = OmegaConf.load(output / "config.yaml")
    assert config.resume is True
    assert "history" not in config
    # recipe, and name with it, which another algorithm changes too
    found = {key for key in differences(kept, config) if not key.startswith(("resume", "history", "recipe", "name"))}
    assert bool(found) == bool(changed)
    assert all(any(part in key for part in changed) for key in found), found


def test_an_experiment_changes_what_it_changes_by_default(tmp_path: Path) -> None:
    output = begin(tmp_path, "experiment=flow_grpo_sd35", "train.iterations=7")
    config = resumed(output, "experiment=flow_grpo_sd35")
    kept: Any = OmegaConf.load(output / "config.yaml")
    assert differences(kept, config) == {"resume", "history", "train.iterations"}


def test_a_run_of_an_earlier_version_gets_the_keys_that_it_lacks(tmp_path: Path) -> None:
    output = begin(tmp_path, "seed=7")
    old: Any = OmegaConf.load(output / "config.yaml")
    del old.checkpoint.asynchronous, old.model.variant, old.model.transformer
    OmegaConf.save(old, output / "config.yaml")
    config = resumed(output)
    assert (config.checkpoint.asynchronous, config.seed) == (True, 7)


def test_rewards_are_computed_as_when_the_run_began_whatever_is_the_default_by_now(tmp_path: Path) -> None:
    words = ("model=sd35_medium", "reward=pick_score")
    output = begin(tmp_path, *words)
    old: Any = OmegaConf.load(output / "config.yaml")
    backend = {"_target_": "fastgrpo.compile.networks.Eager", "precision": "float32"}
    old.reward.terms.pick_score.backend = backend
    OmegaConf.save(old, output / "config.yaml")
    assert resumed(output, *words).reward.terms.pick_score.backend == backend
    chosen = resumed(output, *words, "reward_backend=inductor").reward.terms.pick_score.backend
    assert chosen._target_.endswith("Inductor")


def test_adapters_of_an_earlier_version_get_the_keys_that_they_lack(tmp_path: Path) -> None:
    output = begin(tmp_path, "adaptation.rank=8")
    old: Any = OmegaConf.load(output / "config.yaml")
    del old.adaptation.backup
    OmegaConf.save(old, output / "config.yaml")
    config = resumed(output, "adaptation.backup=host")
    assert (config.adaptation.rank, config.adaptation.backup) == (8, "host")


@pytest.mark.parametrize(
    ("words", "schedule", "adaptation"),
    [
        ([], "FluxSchedule", "lora.LoRA"),
        # what is on the line comes before what a model brings
        (["algorithm/schedule=linear", "adaptation=full"], "LinearSchedule", "adaptation.FullFineTuning"),
        (["algorithm=flow_grpo"], "FluxSchedule", "lora.LoRA"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "doctor", "submit"])
def test_a_model_brings_its_time_grid_and_its_adapters(
    command: str, words: list[str], schedule: str, adaptation: str
) -> None:
    config = load_config(command, ["model=flux_dev", *words])
    assert config.algorithm.schedule._target_.endswith(f".{schedule}")
    assert config.adaptation._target_.endswith(adaptation)
    assert "net.0.proj" in config.adaptation.get("targets", ["net.0.proj"])


@pytest.mark.parametrize("words", [["encode", "prompts.path=a"], ["export", "run=a"]])
def test_commands_that_draw_nothing_take_a_model_too(words: list[str]) -> None:
    assert load_config(words[0], ["model=flux_dev", words[1]]).model._target_ == "fastgrpo.models.flux.Flux"


def test_a_key_that_the_run_does_not_have_is_unknown(tmp_path: Path) -> None:
    output = begin(tmp_path, "algorithm/noise=gaussian")
    with pytest.raises(ValueError, match=r"train\.itertions; did you mean train\.iterations"):
        resumed(output, "train.itertions=3")


def test_resuming_what_never_began_is_beginning(tmp_path: Path) -> None:
    assert resumed(tmp_path / "none", "seed=3").seed == 3


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_is_written_out_in_every_path(home: Path) -> None:
    config = load_config("train", ["output=~/a/b", "prompts.held_out='~/a/b'", 'model.weights="~/a/b"'])
    assert {config.output, config.prompts.held_out, config.model.weights} == {str(home / "a/b")}
    assert load_config("sample", ["run=~/a/b", "prompt=~/a"]).prompt == "~/a"


def test_home_of_a_cache_is_that_of_whoever_opens_it(home: Path) -> None:
    assert load_config("train", ["model=sd35_medium"]).model.condition_cache.startswith("~/")


@pytest.mark.parametrize(
    "path", ["a b/c (1).txt", "a,b.txt", "a=b.txt", "it's.txt", "100%.txt", "a:b.txt", "~user.txt", "@home.txt", "a;b"]
)
def test_a_path_is_taken_as_it_stands(path: str) -> None:
    assert value_of(quoted(f"prompts.path={path}")) == path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("job.slurm.partition=null", None),
        ("job.slurm.partition='null'", "null"),
        ("job.slurm.setup=[a,b c]", ["a", "b c"]),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.max_minutes=inf", float("inf")),
        ("resume=true", True),
    ],
)
def test_what_is_an_expression_stays_one(override: str, value: object) -> None:
    assert value_of(quoted(override)) == value


def test_a_list_that_is_none_says_how_to_quote_it() -> None:
    with pytest.raises(ValueError, match=r"'\[a'.*in quotes, as output=\"'\[a\] b'\""):
        load_config("train", ["output=[a"])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("algorithm.advantage.std=both", "algorithm.advantage.std must be group or global or none, got 'both'"),
        ("train.xyz=1", "unknown key train.xyz; train has iterations, max_minutes, "),
        ("train.group=1", "unknown key train.group; did you mean train.group_size"),
        ("model.weight=a", "unknown key model.weight; did you mean model.weights"),
    ],
)
def test_a_wrong_word_names_what_it_could_be(word: str, says: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_config("train", [word])
    assert str(error.value).startswith(says)


def _runs(config: DictConfig) -> tuple[int, str]:
    return config.runtime.micro_batch, config.compile._target_.rpartition(".")[2]


MODELS = config_groups("train")["model"]
SMALL = ["shapes", *(model for model in MODELS if model.endswith("_miniature"))]


@pytest.mark.parametrize("model", [model for model in MODELS if model not in (*SMALL, "custom")])
def test_a_model_of_real_size_is_compiled_and_its_batches_are_planned(model: str) -> None:
    assert _runs(load_config("train", [f"model={model}"])) == (0, "CompiledBlocks")
    # what is asked for wins
    assert _runs(load_config("train", ["compile=eager", f"model={model}", "runtime=default"])) == (96, "Uncompiled")
    assert _runs(load_config("train", [f"model={model}", "runtime.micro_batch=4"])) == (4, "CompiledBlocks")


@pytest.mark.parametrize("model", SMALL)
def test_a_small_model_begins_at_once(model: str) -> None:
    assert _runs(load_config("train", [f"model={model}"])) == (96, "Uncompiled")


@pytest.mark.parametrize(("name", "words"), [("doctor", []), ("evaluate", []), ("sample", ["prompt=a cat"])])
def test_what_does_not_train_takes_batches_that_nobody_planned(name: str, words: list[str]) -> None:
    sizes = BatchSizes.of_runtime(read_runtime(load_config(name, ["model=sd35_medium", *words])))
    assert [size.value for size in (sizes.training, sizes.sampling, sizes.decoding)] == [16, 16, 16]


@pytest.mark.parametrize("model", [model for model in MODELS if not model.endswith("_miniature")])
def test_every_model_takes_weights_as_people_have_them(model: str) -> None:
    named = ["model._target_=fastgrpo.models.flux.Flux", "model.weights=a"] if model == "custom" else []
    config = load_config("train", [f"model={model}", *named, "model.variant=fp16", "model.transformer=a.safetensors"])
    assert (config.model.variant, config.model.transformer) == ("fp16", "a.safetensors")


@pytest.mark.parametrize("recipe", config_groups("train")["algorithm"])
@pytest.mark.parametrize(
    ("model", "num_steps"), [("z_image_turbo", 8), ("flux_schnell", 4), ("flux2_klein_distilled", 4)]
)
def test_no_recipe_changes_the_steps_of_a_distilled_model(model: str, num_steps: int, recipe: str) -> None:
    config = load_config("train", [f"algorithm={recipe}", f"model={model}"])
    assert config.algorithm.schedule.num_steps == num_steps


@pytest.mark.parametrize("recipe", config_groups("train")["algorithm"])
def test_every_recipe_takes_given_times(recipe: str) -> None:
    config = load_config("train", [f"algorithm={recipe}", "model=qwen_image_21_turbo"])
    assert len(build(config.algorithm.schedule)()) == 9


def test_guidance_that_is_not_linear_is_not_cached(tmp_path: Path) -> None:
    words = ["model=qwen_image_miniature", "solver=cached_guidance", "algorithm=flow_grpo", "algorithm/schedule=sd3"]
    config = load_config("train", words)
    with pytest.raises(
        ValueError, match=r"^solver=cached_guidance adds up branches of guidance, which QwenImage does n"
    ):
        RunParts.read(config)
