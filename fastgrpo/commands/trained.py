"""The model of a finished run: its configuration, read as data, and the averaged weights of a checkpoint.

``run`` is a run directory, whose newest complete checkpoint is taken, or one ``checkpoints/step_*`` of it.  Without
one it is the base model, with ``lora`` added to its weights where that is given.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fastgrpo.checkpoints.checkpoint import Checkpoint
from fastgrpo.commands.judged_as_run import take_judgement
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.models.adapter import FlowModel
from fastgrpo.overrides import key_of, line_of, quoted
from fastgrpo.own_code.begun import of_today
from fastgrpo.own_code.named import MODELS, check_named, check_values
from fastgrpo.parts import build_model
from fastgrpo.pieces import check
from fastgrpo.proposal.files import make_network
from fastgrpo.proposal.network import ProposalNetwork

# what a run brings along beside its time grid; every other key is the command's
_OF_RUN = ("model", "adaptation")
_GRID, _GRIDS = "algorithm.schedule", ("fastgrpo.algorithm",)
_TARGET = "._target_"


def with_run(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with the run's model in place of its own, or with ``lora`` in its own.

    ValueError if the user asked for another one as well.

    What the run's config would import must be of fastgrpo.models, or named by an override ``KEY._target_=PATH``.
    """
    if config.lora and config.run:
        raise ValueError(f"lora={config.lora}: run={config.run} brings its own weights; leave one of the two out")
    if config.lora:
        with_lora = config.copy()
        OmegaConf.update(with_lora, "model.lora", config.lora, force_add=True)
        check(with_lora)
        return with_lora
    if not config.run:
        return config
    of_run = [override for override in overrides if re.split(r"[./]", key_of(override))[0] in _OF_RUN]
    for override in of_run:
        key = re.split(r"[./]", key_of(override))[0]
        if not key_of(override).endswith(_TARGET) or override.startswith("~"):
            raise ValueError(f"{override}: run={config.run} brings its own {key}; leave one of the two out")
    run, _ = _find(config.run)
    try:
        saved: Any = OmegaConf.load(run.config)
        sections = {key: OmegaConf.to_container(saved[key], resolve=False) for key in _OF_RUN}
    except (OSError, OmegaConfBaseException, YAMLError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{run.config} is not the config of a run ({_one_line(error)})") from error
    line = line_of([quoted(override) for override in of_run])
    for key, path in line.items():
        _refuse_other(key, path, OmegaConf.select(OmegaConf.create(sections), key), run.config)
    check_values(sections, "", run.config)
    sections["model"] = of_today(sections["model"], run.config)
    # it is in the checkpoint
    if isinstance(sections["adaptation"], dict) and "start" in sections["adaptation"]:
        sections["adaptation"]["start"] = None
    check_named(sections, run.config, line, MODELS)
    kept: dict[str, Any] = {str(key): config[key] for key in config}
    own = OmegaConf.create(kept | sections)
    _take_grid(own, saved, run.config, overrides)
    take_judgement(own, saved, run.config, overrides)
    check(own)
    return own


def _take_grid(own: DictConfig, saved: DictConfig, source: Path, overrides: Sequence[str]) -> None:
    """The time grid that the run was trained on, changed by the line, unless the line chooses one."""
    words = [override for override in overrides if key_of(override).startswith(f"{_GRID}.")]
    schedule: Any = OmegaConf.select(saved, _GRID)
    if schedule is None or {"algorithm", "algorithm/schedule"} & set(map(key_of, overrides)):
        return
    plain: Any = OmegaConf.create({"algorithm": {"schedule": schedule}})
    plain = OmegaConf.to_container(plain, resolve=False)
    check_values(plain, "", source)
    check_named(plain, source, line_of([quoted(word) for word in words]), _GRIDS)
    changed = {key: OmegaConf.select(own, key) for key in map(key_of, words)}
    own.algorithm.schedule = plain["algorithm"]["schedule"]
    for key, value in changed.items():
        OmegaConf.update(own, key, value, force_add=True)


def _refuse_other(key: str, path: str, recorded: object, source: Path) -> None:
    if path != recorded:
        has = f"{key}={recorded}" if recorded is not None else f"no {key}"
        raise ValueError(f"{key}={path}: {source} has {has}; name what it has, or leave this out")


def load_model(config: DictConfig, on_base: Callable[[FlowModel], object] = lambda _: None) -> tuple[FlowModel, str]:
    """The model of a config that ``with_run`` returned, and in words where its weights are from.

    on_base: called with the model that a run began from, before the run's weights are put into it.
    """
    if not config.run:
        base = config.model.get("weights", config.model._target_)
        own = "".join(f" with {config.model[key]}" for key in ("transformer", "lora") if config.model.get(key))
        return build_model(config), f"the base model {base}{own}"
    run, step = _find(config.run)
    checkpoint = Checkpoint(run.checkpoints, every=1, keep=1)
    path = step or checkpoint.latest()
    if path is None:
        raise ValueError(f"run {run.path} has no complete checkpoint; let it train to its first, see checkpoint.every")
    model = build_model(config)
    on_base(model)
    averages = checkpoint.load_averages(path, model.trainable, model.fingerprint)
    with torch.no_grad():
        for name, weight in model.trainable.items():
            weight.copy_(averages[name])
    return model, f"the averaged weights of {path}"


def config_of_run(run: str) -> dict[str, Any]:
    """The config of a run, as data that nothing is made of."""
    config: Any = OmegaConf.to_container(OmegaConf.load(_find(run)[0].config), resolve=False)
    return config


def load_proposal_of_run(run: str) -> ProposalNetwork | None:
    """The start noise that a run learned, of the checkpoint that ``load_model`` takes; None where it learned none."""
    directory, step = _find(run)
    checkpoint = Checkpoint(directory.checkpoints, every=1, keep=1)
    path = step or checkpoint.latest()
    values, weights = checkpoint.load_proposal(path) if path is not None else ({}, {})
    return make_network(values, weights) if values else None


def _find(run: str) -> tuple[RunDirectory, Path | None]:
    """The run directory of ``run``, and the checkpoint if it names one."""
    path = Path(run).expanduser()
    if (path / "config.yaml").is_file():
        return RunDirectory(path), None
    if path.name.startswith("step_") and path.is_dir():
        directory = RunDirectory(path.resolve().parents[1])
        if directory.config.is_file():
            return directory, path
    raise ValueError(f"run={run} is neither a run directory, which has a config.yaml, nor a checkpoints/step_* of one")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
