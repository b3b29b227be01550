"""What a resumed run may do otherwise: by hand-written configs, key by key."""

from pathlib import Path
from typing import Any

import pytest

from fastgrpo.checkpoints.changes import Change, changes

BEGUN: dict[str, Any] = {
    "name": "a",
    "output": "outputs/a",
    "resume": False,
    "seed": 42,
    "train": {"iterations": 10, "learning_rate": 1e-3, "group_size": 16, "weight_decay": 1e-4},
    "algorithm": {"noise": {"_target_": "Elite", "candidates": 32}, "timesteps": {"steps": [0, 1]}},
    "runtime": {"micro_batch": 96},
    "reward": {
        "scoring": {"retries": 2},
        "weights": {"shapes": 1.0},
        "terms": {"http": {"endpoints": ["a"], "name": "x"}},
    },
    "model": {"weights": "here", "condition_cache": "~/a"},
}


def with_value(key: str, value: Any) -> dict[str, Any]:
    def put(node: dict[str, Any], path: list[str]) -> dict[str, Any]:
        first, *rest = path
        return node | {first: put(node.get(first, {}), rest) if rest else value}

    return put(BEGUN, key.split("."))


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("train.iterations", 20, Change("train.iterations", 10, 20)),
        ("train.learning_rate", 1e-4, Change("train.learning_rate", 1e-3, 1e-4)),
        ("runtime.micro_batch", 8, Change("runtime.micro_batch", 96, 8)),
        ("reward.scoring.retries", 5, Change("reward.scoring.retries", 2, 5)),
        ("reward.terms.http.endpoints", ["b"], Change("reward.terms.http.endpoints", ["a"], ["b"])),
        ("model.condition_cache", None, Change("model.condition_cache", "~/a", None)),
        ("evaluate.every", 5, Change("evaluate.every", "absent", 5)),
    ],
)
def test_where_and_how_long_a_run_computes_may_change(key: str, value: Any, change: Change) -> None:
    assert changes(BEGUN, with_value(key, value), Path("r")) == (change,)


def test_null_of_a_model_is_what_a_key_means_that_an_earlier_version_does_not_have() -> None:
    assert changes(BEGUN, with_value("model.transformer", None), Path("r")) == ()
    assert changes(BEGUN, with_value("adaptation.start", None), Path("r")) == ()
    with pytest.raises(ValueError, match=r"adaptation\.start was absent and would be a"):
        changes(BEGUN, with_value("adaptation.start", "a"), Path("r"))
    with pytest.raises(ValueError, match=r"model\.transformer was absent and would be a"):
        changes(BEGUN, with_value("model.transformer", "a"), Path("r"))
    with pytest.raises(ValueError, match=r"algorithm\.window was absent and would be None"):
        changes(BEGUN, with_value("algorithm.window", None), Path("r"))


def with_model(**model: Any) -> dict[str, Any]:
    return BEGUN | {"model": BEGUN["model"] | model}


@pytest.mark.parametrize("other", [{}, {"architecture": {"_target_": "fastgrpo.models.architectures.New", "b": 2}}])
def test_an_architecture_that_is_not_read_is_not_compared(other: dict[str, Any]) -> None:
    one = {"architecture": {"_target_": "fastgrpo.models.architectures.Old", "a": 1}}
    assert changes(with_model(**one), with_model(**other), Path("r")) == ()
    assert changes(with_model(**other), with_model(**one), Path("r")) == ()
    with pytest.raises(ValueError, match=r"model\.architecture\._target_ was fastgrpo\.models\.architectures\.Old"):
        changes(with_model(weights="random", **one), with_model(weights="random", **other), Path("r"))


@pytest.mark.parametrize("other", ["b", {"_target_": "own.Sizes", "a": 2}])
def test_an_architecture_of_an_own_model_is_compared(other: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.architecture"):
        changes(with_model(architecture={"_target_": "own.Sizes", "a": 1}), with_model(architecture=other), Path("r"))


@pytest.mark.parametrize("key", ["name", "output", "resume", "job.nodes", "history", "report"])
def test_where_a_run_lies_is_not_compared(key: str) -> None:
    assert changes(BEGUN, with_value(key, "other"), Path("r")) == ()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", 7, "seed was 42 and would be 7"),
        ("train.group_size", 8, "train.group_size was 16 and would be 8"),
        ("train.weight_decay", 0.0, "train.weight_decay was 0.0001 and would be 0.0"),
        ("algorithm.noise.candidates", 16, "algorithm.noise.candidates was 32 and would be 16"),
        ("algorithm.noise._target_", "Gaussian", "algorithm.noise._target_ was Elite and would be Gaussian"),
        ("algorithm.timesteps.steps", [0, 2], r"algorithm.timesteps.steps was \[0, 1\] and would be \[0, 2\]"),
        ("reward.weights.jpeg", 0.5, "reward.weights.jpeg was absent and would be 0.5"),
        ("reward.terms.http.name", "y", "reward.terms.http.name was x and would be y"),
        ("model.weights", "there", "model.weights was here and would be there"),
        # begins like a key that may change, and is another
        ("train.iterations_of", 3, None),
        ("evaluated", 3, "evaluated was absent and would be 3"),
    ],
)
def test_what_a_run_learns_from_may_not(key: str, value: Any, says: str | None) -> None:
    if says is None:
        # a key of a plain group that the run's version did not have
        assert changes(BEGUN, with_value(key, value), Path("r")) == ()
        return
    with pytest.raises(ValueError, match=rf"the run in r was begun otherwise: {says}\. .*export run=r .*merged=true"):
        changes(BEGUN, with_value(key, value), Path("r"))


def test_a_key_that_is_left_out_is_a_difference() -> None:
    without = {key: value for key, value in BEGUN.items() if key != "seed"}
    with pytest.raises(ValueError, match="seed was 42 and would be absent"):
        changes(BEGUN, without, Path("r"))


def test_many_differences_are_counted() -> None:
    wanted = BEGUN | {"algorithm": {"a": 1, "b": 2}}
    with pytest.raises(ValueError, match=r"; 2 more keys differ\. "):
        changes(BEGUN, wanted, Path("r"))


PROMPTS = {"path": "a.jsonl", "held_out": "b.txt"}


@pytest.mark.parametrize("begun", [PROMPTS, PROMPTS | {"column": ""}])
def test_a_column_that_was_not_chosen_may_not_be_later(begun: dict[str, str]) -> None:
    old = BEGUN | {"prompts": begun}
    assert changes(old, BEGUN | {"prompts": PROMPTS | {"column": ""}}, Path("r")) == ()
    with pytest.raises(ValueError, match=r"prompts\.column was  and would be tag\. "):
        changes(old, BEGUN | {"prompts": PROMPTS | {"column": "tag"}}, Path("r"))


@pytest.mark.parametrize("key", ["path", "held_out"])
@pytest.mark.parametrize("name", ["p.tsv", "p.csv", "p.json", "p.ndjson", "p.JSONL", "p"])
def test_a_run_whose_file_was_read_as_lines_of_text_does_not_go_on_with_other_prompts(key: str, name: str) -> None:
    old, today = PROMPTS | {key: name}, PROMPTS | {key: name, "column": ""}
    with pytest.raises(
        ValueError, match=rf"the run in r was begun by a version that took each line of prompts\.{key}="
    ):
        changes(BEGUN | {"prompts": old}, BEGUN | {"prompts": today}, Path("r"))
    assert changes(BEGUN | {"prompts": today}, BEGUN | {"prompts": today}, Path("r")) == ()
