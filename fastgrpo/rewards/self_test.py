"""Golden scores: every reward is tried on fixed pairs before a run pays for it.

An answer that fails, is wrongly shaped, not finite, or the same for all pairs stops the run.  So do scores that differ
from recorded ones by more than the reward's ``golden_tolerance`` times their spread (max - min).  Recorded are
    the rewards of this package, in golden_set/scores.json,
    weights that ``fastgrpo doctor reward=... record=true`` was run with, in the user's cache,
    and those of a run in its own golden.json, which a resumed run is held to.
A reward that asks for metadata is tried with rows of the run's own prompts unless it has golden pairs of its own: it
must answer with numbers, which are neither recorded nor have to differ, since the images are of other prompts.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FunctionType

import torch

from fastgrpo.rewards.golden import GoldenSet, golden_set, with_prompts
from fastgrpo.rewards.reward import Reward, RewardError, asks_for_metadata
from fastgrpo.rewards.scores import Scores
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.types import Prompt

SHIPPED = Path(__file__).parent / "golden_set" / "scores.json"
DEFAULT_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class GoldenScores:
    """What one reward scored its golden pairs; ``identity`` names the reward with its settings, or its weights."""

    identity: str
    scores: list[float]
    tolerance: float

    @property
    def spread(self) -> float:
        return max(self.scores) - min(self.scores)


def self_test(
    rewards: Rewards, device: torch.device | str, prompts: Sequence[Prompt | str] = ()
) -> dict[str, GoldenScores]:
    """Score golden pairs on ``device``; RewardError for a reward that should not be trained on.

    ``prompts`` are the run's, for rewards that are tried with these.
    """
    tested = golden_scores(rewards, device, prompts)
    for name, golden in tested.items():
        if (on_record := recorded(golden.identity)) is not None:
            compare(name, golden, *on_record)
    return tested


def golden_scores(
    rewards: Rewards, device: torch.device | str, prompts: Sequence[Prompt | str] = ()
) -> dict[str, GoldenScores]:
    """What each reward scores its golden pairs; RewardError if that is no score, or the same for all of them."""
    rewards.greet()
    tested = {}
    for name, reward in rewards.all.items():
        golden = _golden_set_of(name, reward, prompts)
        if golden is None:
            continue
        scores: Scores[dict[str, torch.Tensor]] = Scores(rewards.scoring, {name: reward}, golden.asked, dict)
        scores.add(golden.images_BCHW.to(device))
        answered = scores.collect()[name].tolist()
        if not golden.is_known:
            continue
        tested[name] = GoldenScores(
            identity=identity(reward),
            scores=answered,
            tolerance=getattr(reward, "golden_tolerance", DEFAULT_TOLERANCE),
        )
        if tested[name].spread == 0:
            raise RewardError(
                f"reward {name!r} answered {tested[name].scores[0]:g} for all {len(golden.prompts)} golden pairs "
                f"({golden.name}): it would teach nothing; mend it, give it a golden_set of its own, or set "
                "reward.golden=false"
            )
    return tested


def compare(name: str, tested: GoldenScores, expected: list[float], origin: str) -> float:
    """The largest difference, in units of the expected spread; RewardError if it is above the tolerance."""
    if len(expected) != len(tested.scores):
        raise RewardError(f"reward {name!r}: {origin} has {len(expected)} golden scores, not {len(tested.scores)}")
    spread = max(expected) - min(expected)
    differences = [abs(score - wanted) for score, wanted in zip(tested.scores, expected, strict=True)]
    if not max(differences) <= tested.tolerance * spread:
        worst = differences.index(max(differences))
        raise RewardError(
            f"reward {name!r} scores golden pair {worst} {tested.scores[worst]:.6g}, but {origin} says "
            f"{expected[worst]:.6g}: more than {tested.tolerance:g} of the spread {spread:.4g}; use the weights, "
            "backend and library versions of then, or, if the change is meant, fastgrpo doctor record=true"
        )
    return max(differences) / spread


def recorded(identity: str) -> tuple[list[float], str] | None:
    """The scores on record for a reward, and where they are from."""
    for path in (SHIPPED, _user_record(identity)):
        if path.exists() and identity in (scores := json.loads(path.read_text(encoding="utf-8"))):
            return scores[identity], str(path)
    return None


def record(tested: GoldenScores) -> Path:
    """Put scores on the user's record, for all runs to come; returns the file."""
    path = _user_record(tested.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({tested.identity: tested.scores}, indent=2) + "\n", encoding="utf-8")
    return path


def identity(reward: Reward) -> str:
    """What scores are recorded under: the weights of a network, the settings of a piece, the name of a function."""
    if fingerprint := getattr(reward, "fingerprint", None):
        return str(fingerprint)
    if isinstance(reward, FunctionType):
        return f"{reward.__module__}.{reward.__qualname__}"
    # an object without a repr of its own would be named by its address
    settings = repr(reward) if is_dataclass(reward) else type(reward).__qualname__
    return f"{type(reward).__module__}.{settings}"


def _golden_set_of(name: str, reward: Reward, prompts: Sequence[Prompt | str]) -> GoldenSet | None:
    chosen = getattr(reward, "golden_set", "prompts" if asks_for_metadata(reward) else "scenes")
    if isinstance(chosen, GoldenSet):
        return chosen
    if chosen == "none":
        return None
    if chosen == "prompts":
        return with_prompts(prompts)
    try:
        return golden_set(chosen)
    except ValueError as error:
        raise ValueError(f"golden_set of reward {name!r}: {error}") from error


def _user_record(identity: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastgrpo" / "golden" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
