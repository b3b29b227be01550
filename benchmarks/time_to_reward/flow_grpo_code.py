"""Flow-GRPO's own functions in the loop of its script, on the embedded model.

What is theirs and what is the driver's is said in benchmarks/flow_grpo/theirs.py; two optimizer steps an iteration, as
in their configs, on as large a micro-batch as that allows.  Here float32, no guidance, conditions encoded once.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.peer import Peer, adapters
from benchmarks.flow_grpo.pipeline import MINIATURE
from benchmarks.flow_grpo.recipe import OPTIMIZER_STEPS, Job, Recipe
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.their_update import TheirUpdate
from benchmarks.flow_grpo.theirs import sample
from benchmarks.time_to_reward.embedded import PROMPT_FILE, RESOLUTION, WEIGHTS, Encoder, Groups, load
from benchmarks.time_to_reward.learner import NUM_IMAGES, Judge, Run, device, our_name
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.models.lora import LoRA

_FULL = Recipe(
    name="full",
    algorithm="flow_grpo",
    guidance_scale=1.0,
    kl_coef=0.0,
    noise_level=0.7,
    dynamics="sde",
    clip_range=1e-4,
)
_FAST = replace(
    _FULL, name="fast", algorithm="flow_grpo_fast", noise_level=0.8, dynamics="cps", clip_range=1e-5, window=3
)


@dataclass(frozen=True, kw_only=True)
class FlowGRPOCode:
    """``is_fast`` is their fast script, a window under CPS; ``ema_every`` 8 is their config's."""

    kl_coef: float = 0.0
    is_fast: bool = False
    ema_every: int = 8
    micro_batch: int = NUM_IMAGES // OPTIMIZER_STEPS

    def missing(self, run: Run) -> str:
        if run.flow_grpo is None:
            return "--checkout, a checkout of flow_grpo"
        runs = Checkout(run.flow_grpo).runs(self.recipe)
        return "" if runs else "a checkout of flow_grpo that has its fast recipe, one from August 2025 or later"

    @property
    def recipe(self) -> Recipe:
        return replace(_FAST if self.is_fast else _FULL, kl_coef=self.kl_coef)

    def __call__(self, run: Run) -> "FlowGRPOLearner":
        assert run.flow_grpo is not None
        return FlowGRPOLearner(Checkout(run.flow_grpo.resolve()), self, run)


class FlowGRPOLearner:
    """``Learner`` over their functions."""

    def __init__(self, checkout: Checkout, side: FlowGRPOCode, run: Run) -> None:
        self.judge = Judge(run)
        job = Job(
            recipe="full",
            pipeline=WEIGHTS,
            size=replace(MINIATURE, resolution=RESOLUTION, lora_rank=LoRA().rank),
            prompts=PROMPT_FILE,
            batches=NUM_IMAGES // side.micro_batch,
            device=device(),
            threads=1,
            seed=run.seed,
            micro_batch=side.micro_batch,
            learning_rate=run.learning_rate,
            ema_every=side.ema_every,
        )
        self.peer = EmbeddedPeer(checkout, job, side.recipe)
        self.update = TheirUpdate(self.peer)
        self.groups = Groups(run.seed, side.micro_batch)
        self.iteration = 0

    def step(self) -> float:
        self.peer.transformer.eval()
        parts, rewards, texts = [], [], []
        for prompts in self.groups(self.iteration):
            part, images = sample(self.peer, prompts)
            rewards.append(self.groups.reward(images, prompts))
            parts.append(part)
            texts += prompts
        samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        rewards_S = torch.cat(rewards)
        rewards_ST = rewards_S.unsqueeze(1).repeat(1, self.peer.recipe.num_trained_steps)
        advantages_ST = self.peer.tracker.update(texts, rewards_ST.numpy())
        self.peer.tracker.clear()
        samples["advantages"] = torch.as_tensor(advantages_ST).to(self.peer.accelerator.device)
        self.update(samples)
        self.iteration += 1
        return rewards_S.mean().item()

    def evaluate(self) -> EvaluationResult:
        return self.judge(self.averages())

    def averages(self) -> dict[str, Tensor]:
        """Averaged weights by their names in our model."""
        names = [n for n, weight in self.peer.pipeline.transformer.named_parameters() if weight.requires_grad]
        return {our_name(name): weight for name, weight in zip(names, self.peer.ema.ema_parameters, strict=True)}


class EmbeddedPeer(Peer):
    """Their functions, optimizer and average, over the embedded model."""

    def __init__(self, checkout: Checkout, job: Job, recipe: Recipe) -> None:
        self._given = recipe
        super().__init__(checkout, job, Setting())

    def _recipe(self, job: Job) -> Recipe:
        return self._given

    def _load(self) -> Any:
        pipeline = load(self.accelerator.device)
        pipeline.transformer = get_peft_model(pipeline.transformer, adapters(self.job.size.lora_rank))
        self._encoder = Encoder(pipeline)
        return pipeline

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        return self._encoder(prompts)
