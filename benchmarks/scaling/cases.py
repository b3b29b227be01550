"""Kinds of training whose exchanges are measured, on the embedded model, and what is expected of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from omegaconf import DictConfig
from torch import nn

from benchmarks.scaling.exchanges import FLOAT32, Exchange, Shares, always, of_adapters, shares_of
from benchmarks.scaling.sharded import Passes, of_shards, units_of
from fastgrpo.config import load_config
from fastgrpo.distributed.spread import Spread
from fastgrpo.files.locations import resolve_path
from fastgrpo.memory.batches import even
from fastgrpo.models.adaptation import FullFineTuning
from fastgrpo.pieces import build

# 15 samples in 2 optimizer steps: no number of ranks above 1 divides them
SETTINGS = (
    "algorithm=flow_grpo",
    "algorithm.schedule.num_steps=4",
    "train.iterations=2",
    "train.prompts_per_iteration=3",
    "train.group_size=5",
    "train.optimizer_steps=2",
    "train.learning_rate=1e-5",
    "evaluate.every=100",
    "evaluate.images_per_prompt=1",
    "evaluate.num_steps=1",
    "runtime.device=cpu",
    "runtime.micro_batch=2",
    "runtime.threads=1",
)


@dataclass(frozen=True)
class Case:
    """A run of ``SETTINGS`` and what it adds to them, on each of some numbers of processes.

    per_node: processes that are told to be of one node; by default all.
    """

    name: str
    overrides: tuple[str, ...] = ()
    num_ranks: tuple[int, ...] = (1, 2, 4)
    per_node: int | None = None

    @property
    def words(self) -> list[str]:
        return [*SETTINGS, *self.overrides]


# with guidance all passes that there are occur: with and without text, of the policy and of the reference
_FULL = ("adaptation=full", "model.guidance_scale=2.5")
CASES = (
    Case("lora"),
    Case("lora_search", ("algorithm=smart_grpo_paper", "algorithm.schedule.num_steps=4")),
    Case("full_gathered", (*_FULL, "adaptation.rollout_weights=gathered")),
    Case("full_sharded", (*_FULL, "adaptation.rollout_weights=sharded")),
    Case("full_nodes", (*_FULL, "adaptation.shard_over=node"), num_ranks=(4,), per_node=2),
)


def expected(config: DictConfig, num_ranks: int, per_node: int | None = None) -> list[Exchange]:
    """The exchanges of one iteration on ``num_ranks``, none of them for one; ``per_node`` as in ``Case``.

    For configs whose noise search, if any, searches every prompt, and which train all steps but the last.
    """
    if num_ranks == 1:
        return []
    settings, noise = config.train, config.algorithm.noise
    shares = shares_of(settings.prompts_per_iteration * settings.group_size, settings.optimizer_steps)
    searches = [settings.prompts_per_iteration * noise.candidates] * noise.rounds if "rounds" in noise else []
    num_rewards = len(config.reward.terms) + len(config.reward.get("watch") or {})
    has_reference = config.algorithm.objective.kl_coef > 0
    found = always(num_ranks, shares, num_rewards, searches, has_reference=has_reference)
    adaptation, transformer = build(config.adaptation), network_of(Path(resolve_path(config.model.weights)))
    if not isinstance(adaptation, FullFineTuning):
        return found + of_adapters(sum(w.numel() for w in adaptation(transformer).trainable.values()), shares)
    within_node = config.adaptation.shard_over == "node"
    num_shards = per_node or num_ranks if within_node else num_ranks
    passes = _passes(config, shares, num_ranks)
    return found + of_shards(units_of(transformer), num_shards, passes, FLOAT32, over_nodes=within_node)


def network_of(weights: Path) -> nn.Module:
    """The network of a StableDiffusion3Pipeline's directory, of which only shapes are there."""
    with torch.device("meta"):
        network: nn.Module = SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(weights / "transformer")
        )
    return network


def latent_bytes(config: DictConfig) -> int:
    """Of one latent, in float32."""
    network: Any = network_of(Path(resolve_path(config.model.weights)))
    return FLOAT32 * network.config.in_channels * network.config.sample_size**2


def load(case: Case, *words: str) -> DictConfig:
    """The checked config of a case."""
    return load_config("train", [*case.words, *words])


def _passes(config: Any, shares: Shares, num_ranks: int) -> Passes:
    num_trained = config.algorithm.schedule.num_steps - 1
    is_guided, has_reference = config.model.guidance_scale != 1, config.algorithm.objective.kl_coef > 0
    sampled = config.runtime.micro_batch
    trained = even(-(-max(map(len, shares)) // num_ranks), sampled)
    most = Spread.of_shares(shares, num_ranks).most

    def batches(rows: int, size: int = trained) -> int:
        return -(-rows // size)

    in_update = [num_trained * batches(-(-len(share) // num_ranks)) for share in shares]
    gathers = config.adaptation.rollout_weights == "gathered"
    return Passes(
        gathered={"rollout": 1} if gathers else {},
        # trained steps run the branches one by one; the last step both at once, for as many as are sampled at a time
        rollout=0 if gathers else num_trained * (1 + is_guided) * batches(most) + batches(most, sampled),
        policy=sum(in_update) + is_guided * sum(in_update[1:]),
        backward=sum(in_update),
        reference=has_reference * sum(in_update),
        optimizer_steps=len(shares),
    )
