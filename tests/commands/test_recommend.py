"""doctor recommend= plans each model as memory= plans one, and its commands are those of train; presets are runs."""

from typing import Any

import pytest

from fastgrpo import cli
from fastgrpo.commands import recommend
from fastgrpo.config import load_config
from fastgrpo.memory.batch_size import DoesNotFit
from fastgrpo.memory.plan import TRAINING, Choice, Cost, MemoryPlan

PROMPTS = ("prompts.path=a", "prompts.held_out=b")


def plan(memory: int) -> MemoryPlan:
    """8 of 64 samples at a time, 3 GiB and half a GiB each."""
    choice = Choice("runtime.micro_batch", Cost(3 * 2**30, 2**29), total=64, fitting=9, beside=0)
    return MemoryPlan({TRAINING: choice}, checkpointing=True, held=0, memory=memory)


def test_each_model_is_planned_with_its_adapters_and_what_fits_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def planned(config: Any, memory: int) -> MemoryPlan:
        asked.append(config)
        assert memory == 24 * 2**30
        if "flux" in config.model.weights or config.model.guidance_scale == 3.5:
            raise DoesNotFit("one sample of training needs 99 GiB")
        return plan(memory)

    monkeypatch.setattr(recommend, "counted_plan", planned)
    words = ["doctor", "recommend=24GiB", "models=[sd35_medium,flux_dev]", "updates=4"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert [config.model.weights for config in asked] == ["random", "random"]
    assert [(config.num_prompts, config.group_size, config.updates) for config in asked] == [(8, 8, 4)] * 2
    assert [config.model.guidance_scale for config in asked] == [1.0, 3.5]
    assert asked[1].adaptation.rank == 64
    rows = {line.split()[1]: line.split() for line in shown.splitlines() if line.startswith("│")}
    assert rows["sd35_medium"][3:] == ["8", "of", "64", "│", "9", "│", "yes", "│", "7.00", "GiB", "│"]
    assert rows["flux_dev"][3:6] == ["does", "not", "fit"]
    (command,) = [line.strip() for line in shown.splitlines() if line.startswith("  fastgrpo train")]
    given = command.removeprefix("fastgrpo train ").split()
    assert {"train.prompts_per_iteration=8", "train.group_size=8", "train.updates=4"} < {*given}
    # as pasted it is a config
    config = load_config("train", given)
    assert (config.train.group_size, config.model.guidance_scale, config.train.updates) == (8, 1.0, 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recommend=lots"], "must be a size such as 80GiB"),
        (["recommend=24GiB", "models=[sd35,flux_dev]"], "models has sd35, of which there is no model="),
        (["recommend", "runtime.device=cpu"], "this machine has none; give a size"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) == 2
    assert says in capsys.readouterr().err


def test_presets_choose_a_model_and_sizes_and_the_line_still_wins() -> None:
    found = {name: load_config("train", [f"hardware={name}", *PROMPTS]) for name in ("24gb", "80gb", "8x80gb")}
    small, large, many = found.values()
    assert [config.model.guidance_scale for config in found.values()] == [1.0, 3.5, 3.5]
    sizes = [(config.train.prompts_per_iteration, config.train.group_size) for config in found.values()]
    assert sizes == [(8, 8), (8, 24), (64, 24)]
    # planned when they start
    assert {config.runtime.micro_batch for config in found.values()} == {0}
    assert small.algorithm.objective._target_.endswith("NFT")
    assert large.model == many.model
    klein = load_config("train", ["hardware=24gb", "model=flux2_klein", "train.group_size=4", *PROMPTS])
    assert klein.model._target_.endswith("Flux2Klein")
    assert klein.train.group_size == 4


def test_a_run_is_called_by_its_recipe() -> None:
    called = {}
    for words in (["algorithm=flow_grpo"], [], ["experiment=nft_sd35", *PROMPTS], ["name=mine"], ["recipe=tried"]):
        config = load_config("train", words)
        called[" ".join(words[:1])] = (config.recipe, config.name, config.output)
    assert called == {
        "algorithm=flow_grpo": ("flow_grpo", "flow_grpo", "outputs/flow_grpo"),
        "": ("nft", "nft", "outputs/nft"),
        "experiment=nft_sd35": ("nft_sd35", "nft_sd35", "outputs/nft_sd35"),
        "name=mine": ("nft", "mine", "outputs/mine"),
        "recipe=tried": ("tried", "tried", "outputs/tried"),
    }
