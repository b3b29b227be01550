"""What a run that goes on may do otherwise than it began, and what makes it another run.

A config is compared key by key.  Where and how long a run computes, how it steps, and how it is watched may change, and
the config keeps from which iteration on; what it learns from what may not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fastgrpo.leaves import leaves

# a key, or the beginning of keys; * is any part of one
MAY_CHANGE = (
    "train.iterations",
    "train.max_minutes",
    "train.learning_rate",
    "train.warmup_iterations",
    "train.decay_share",
    "train.decay_to",
    "train.max_drift",
    "evaluate",
    "checkpoint",
    "runtime",
    "distributed",
    "compile",
    "wandb",
    "reward.scoring",
    "reward.golden",
    # where a judge is and how long it is waited for; golden scores tell whether it judges as it did
    "reward.*.endpoints",
    "reward.*.token_env",
    "reward.*.timeout_seconds",
    "reward.*.concurrency",
    "reward.*.patience_seconds",
    "reward.*.startup_patience_seconds",
    "model.condition_cache",
    # a search's estimates are no images that are learned from
    "model.estimate_decoder",
    "adaptation.rollout_weights",
    "adaptation.shard_over",
    "adaptation.backup",
)
# where a run lies and how it is shown, not what it is: a directory may have been moved
_NOT_COMPARED = ("recipe", "name", "output", "resume", "job", "history", "report")
# keys of these groups that a run does not have are of a later version, and have their default
_PLAIN = ("train", "prompts", "checkpoint")
# null in these groups is what a key means that a run of an earlier version does not have
_NULL_IS_NONE = ("model", "adaptation")
# sizes of fastgrpo's own, of this version or an earlier one; an own model's may be anything
_ARCHITECTURES = "fastgrpo.models.architectures."
_SHOWN = 3
_COLUMN = "prompts.column"
# prompt files that are read as they were before there was a column to choose; all others were text, a prompt a line
_READ_ALIKE = (".txt", ".jsonl")
_ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """A key, and its values before and after."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def changes(begun: Mapping[str, Any], wanted: Mapping[str, Any], directory: object) -> tuple[Change, ...]:
    """What ``wanted`` does otherwise than the config a run began with; ValueError for what may not change."""
    _refuse_other_reading(begun, directory)
    before, after = dict(leaves(_read(begun))), dict(leaves(_read(wanted)))
    if "prompts" in begun:
        # what a run of an earlier version has
        before.setdefault(_COLUMN, "")
    found = [
        Change(key, before.get(key, _ABSENT), after.get(key, _ABSENT))
        for key in dict.fromkeys((*before, *after))
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
        and not _begins(key, _NOT_COMPARED)
        and not (key not in before and (_begins(key, _PLAIN) or (_begins(key, _NULL_IS_NONE) and after[key] is None)))
    ]
    if refused := [change for change in found if not _begins(change.key, MAY_CHANGE)]:
        shown = "; ".join(f"{c.key} was {c.before} and would be {c.after}" for c in refused[:_SHOWN])
        others = f"; {len(refused) - _SHOWN} more keys differ" if len(refused) > _SHOWN else ""
        raise ValueError(
            f"the run in {directory} was begun otherwise: {shown}{others}. A run keeps its recipe, model, reward, "
            "prompts, seed and group size to its end: leave these keys out to go on with it. For a new run that starts "
            f"from its weights: fastgrpo export run={directory} output=EXPORT merged=true, then fastgrpo train "
            "name=NEW model.weights=EXPORT/merged with your settings; or, to train its LoRA on, without export, "
            f"adaptation.start={directory}"
        )
    return tuple(found)


def _refuse_other_reading(begun: Mapping[str, Any], directory: object) -> None:
    """ValueError for a run of an earlier version, to which a file that is now read by its format was lines of text."""
    prompts = begun.get("prompts", {})
    for key in ("path", "held_out"):
        path = str(prompts.get(key, ""))
        if "column" not in prompts and path and not path.endswith(_READ_ALIKE):
            raise ValueError(
                f"the run in {directory} was begun by a version that took each line of prompts.{key}={path} for a "
                "prompt; go on with it by that version, or begin another: fastgrpo doctor prompts=FILE shows how a "
                "file is read now"
            )


def _read(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config without an architecture that nothing reads: it has the sizes of random weights alone."""
    model = config.get("model", {})
    if not str(_target_of(model.get("architecture"))).startswith(_ARCHITECTURES) or model.get("weights") == "random":
        return config
    return {**config, "model": {key: value for key, value in model.items() if key != "architecture"}}


def _target_of(node: Any) -> Any:
    return node.get("_target_") if isinstance(node, Mapping) else None


def _begins(key: str, beginnings: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, beginning) or fnmatchcase(key, f"{beginning}.*") for beginning in beginnings)
