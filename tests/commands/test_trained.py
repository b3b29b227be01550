"""What a command takes of a run's config: its model, its adapters and its time grid."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fastgrpo.commands.trained import with_run
from fastgrpo.config import load_config

TRAINED = ["model=flux_miniature", "algorithm=flow_grpo", "algorithm.schedule.num_steps=7", "adaptation.rank=3"]


def begun(directory: Path) -> Path:
    config: Any = OmegaConf.to_container(load_config("train", TRAINED))
    directory.mkdir()
    OmegaConf.save(config, directory / "config.yaml")
    return directory


def config_of(command: str, run: Path, *words: str) -> Any:
    overrides = [f"run={run}", *words]
    return with_run(load_config(command, overrides), overrides)


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_run_brings_its_model_and_its_time_grid(command: str, tmp_path: Path) -> None:
    config = config_of(command, begun(tmp_path / "run"))
    assert config.model._target_ == "fastgrpo.models.flux.Flux"
    assert config.adaptation.rank == 3
    assert config.algorithm.schedule == {
        "_target_": "fastgrpo.algorithm.schedule.FluxSchedule",
        "num_steps": 7,
        "resolution": 192,
    }


@pytest.mark.parametrize(
    ("word", "schedule"),
    [
        ("algorithm/schedule=linear", "LinearSchedule"),
        ("algorithm=flow_grpo", "SD3Schedule"),
    ],
)
def test_the_line_comes_first(word: str, schedule: str, tmp_path: Path) -> None:
    config = config_of("sample", begun(tmp_path / "run"), word)
    assert config.algorithm.schedule._target_.endswith(schedule)


def test_the_line_changes_the_time_grid_of_the_run(tmp_path: Path) -> None:
    schedule = config_of("sample", begun(tmp_path / "run"), "algorithm.schedule.num_steps=5").algorithm.schedule
    assert (schedule._target_, schedule.num_steps) == ("fastgrpo.algorithm.schedule.FluxSchedule", 5)


def test_code_of_anybodys_own_is_not_imported_for_a_time_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run")
    config: Any = OmegaConf.load(run / "config.yaml")
    config.algorithm.schedule = {"_target_": "my_grid.Grid", "num_steps": 2}
    OmegaConf.save(config, run / "config.yaml")
    (tmp_path / "my_grid.py").write_text(
        "open('imported', 'w').close()\nclass Grid:\n    def __init__(self, num_steps: int) -> None: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"algorithm\.schedule\._target_=my_grid\.Grid is no piece of fastgrpo's; .* add"
    ):
        config_of("sample", run)
    assert not (tmp_path / "imported").exists()
