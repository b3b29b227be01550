"""What --help says of keys: every key of every choice means something, by the comments of its own file first."""

from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fastgrpo.cli import COMMANDS
from fastgrpo.composing import config_groups
from fastgrpo.config import explained_config
from fastgrpo.leaves import leaves
from fastgrpo.meanings import general_meanings, meaning_of, meanings, read_comments

TOP = Path(str(files("fastgrpo_configs")))


def lacking(name: str, choices: dict[str, str], plain: object, prefix: str = "") -> set[str]:
    """The keys of a plain config that nothing is said of."""
    of_keys, _ = meanings(name, choices)
    keys = {f"{prefix}{key}": key.split(".") for key, _ in leaves(plain) if key}
    shown = {key for key, parts in keys.items() if not parts[-1].startswith("_") and not {*parts} & SKIPPED}
    return {key for key in shown if not meaning_of(key, of_keys, general_meanings())}


# sizes of random weights, which --help leaves out, and Hydra's own
SKIPPED = {"architecture", "defaults"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_of_a_command_means_something(name: str) -> None:
    config, choices = explained_config(name, [])
    assert not lacking(name, choices, OmegaConf.to_container(config, resolve=False))
    assert not [group for group, text in meanings(name, choices)[1].items() if not text]


def test_every_key_of_every_option_means_something_and_every_option_says_what_it_is() -> None:
    without = set()
    for group, options in config_groups("train").items():
        for option in options:
            plain = OmegaConf.to_container(OmegaConf.load(TOP / group / f"{option}.yaml"), resolve=False)
            # a term stands below a name of its own
            chosen = f"{group}@reward.terms.{option}" if group == "reward/terms" else group
            package = chosen.partition("@")[2] or group.replace("/", ".")
            prefix = "" if group in ("experiment", "hardware") else f"{package}."
            without |= lacking("train", {chosen: option}, plain, prefix)
            assert meanings("train", {chosen: option})[1][chosen], (group, option)
    assert not without


def test_a_comment_belongs_to_the_key_below_it_and_the_first_to_the_file() -> None:
    found = read_comments(
        "# @package _global_\n# A heading\n# of two lines.\ndefaults:\n  - other\n  # of a group\n  - some: thing\n"
        "  - _self_\n\n# of a\na: 1\nb:\n  # of c,\n  # in two lines\n  c: 3\n  d: 4\n# of b's neighbor\ne: 5\n\n"
        "# of nobody\n\nf: 6\n"
    )
    assert found.heading == "A heading of two lines."
    assert found.below == ["other"]
    assert found.keys == {"a": "of a", "b.c": "of c, in two lines", "e": "of b's neighbor"}


def test_the_own_comment_of_a_key_comes_before_what_is_said_of_all_such_keys() -> None:
    general = {"rank": "of all", "adaptation.rank": "of adapters", "weights.*": "of each"}
    assert meaning_of("adaptation.rank", {"adaptation.rank": "its own"}, general) == "its own"
    assert meaning_of("adaptation.rank", {}, general) == "of adapters"
    assert meaning_of("other.rank", {}, general) == "of all"
    assert meaning_of("reward.weights.ocr", {}, general) == "of each"
    assert meaning_of("other", {}, general) == ""


def test_a_choice_brings_the_comments_of_its_own_file_and_of_what_it_builds_on() -> None:
    _, choices = explained_config("train", ["model=flux_schnell", "runtime=planned"])
    of_keys, headings = meanings("train", choices)
    assert headings["model"].startswith("FLUX.1-schnell")
    # of runtime/default, which planned builds on
    assert of_keys["runtime.device"] == "auto is CUDA where there is one, else the CPU"
    assert of_keys["train.optimizer_steps"].startswith("optimizer steps of an update")
    # of the term that stands below reward.watch
    _, choices = explained_config("train", ["+reward/terms@reward.watch.mine=http", "reward.watch.mine.name=x"])
    assert meanings("train", choices)[0]["reward.watch.mine.batch"] == "images a request, and requests at a time"
