"""All sides, by name: the code of others with its settings, and ours, a recipe with overrides each."""

from typing import Protocol

from benchmarks.flow_grpo.recipe import EMA_DECAY
from benchmarks.time_to_reward.flow_grpo_code import FlowGRPOCode
from benchmarks.time_to_reward.learner import Learner, Run
from benchmarks.time_to_reward.nft_code import NFTCode
from benchmarks.time_to_reward.ours import Ours


class Side(Protocol):
    """Called, it makes the learner."""

    def missing(self, run: Run) -> str:
        """What it cannot run without and has not, or nothing."""

    def __call__(self, run: Run) -> Learner: ...


SIDES: dict[str, Side] = {
    "flow_grpo_code": FlowGRPOCode(kl_coef=0.04),
    "flow_grpo_code_no_kl": FlowGRPOCode(),
    # their average lags where steps are few, and it is what is judged
    "flow_grpo_code_no_kl_ema_1": FlowGRPOCode(ema_every=1),
    "flow_grpo_code_fast": FlowGRPOCode(is_fast=True),
    "flow_grpo_code_fast_ema_1": FlowGRPOCode(is_fast=True, ema_every=1),
    # the settings of ours, as far as their script has them: of its 6 steps the last, from t = .009, does nothing, and
    # its average is of ten optimizer steps
    "nft_code": NFTCode(),
    # as many steps of use as ours, and an average of as many iterations
    "nft_code_7_steps": NFTCode(num_steps=7, ema_decay=EMA_DECAY ** (1 / 6)),
    "nft_code_published": NFTCode(
        num_steps=10, solver="dpm2", num_times=9, inner_epochs=1, adv_clip_max=5.0, kl_coef=1e-4, decay_type=1
    ),
    "flow_grpo": Ours(recipe="flow_grpo"),
    "flow_grpo_fast": Ours(recipe="flow_grpo_fast"),
    "smart_grpo": Ours(recipe="smart_grpo"),
    "nft": Ours(recipe="nft"),
    "nft_4_updates": Ours(recipe="nft", overrides=("train.updates=4",)),
    "awm": Ours(recipe="awm"),
    "v_grpo": Ours(recipe="v_grpo"),
    "flow_grpo_guard": Ours(recipe="flow_grpo_guard"),
    "flow_dppo": Ours(recipe="flow_dppo"),
    "chunk_grpo": Ours(recipe="chunk_grpo"),
}
# whose best is what the others are set beside
BASELINES = tuple(name for name, side in SIDES.items() if isinstance(side, FlowGRPOCode))
