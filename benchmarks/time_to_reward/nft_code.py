"""DiffusionNFT's own sampling, loss and update, on the embedded model.

Theirs, unmodified, from the checkout: ``pipeline_with_logprob`` with its solvers, the loop over inner epochs of its
script, ``return_decay`` and the move of the adapter ``old``, ``PerPromptStatTracker`` and ``EMAModuleWrapper``.  The
driver's: what their script sets up, and what stands for several GPUs, logging and progress bars, which is nothing.
Their loss runs the reference policy whether its weight is zero or not; that is part of it.
Letters: B samples of a micro-batch, S samples of an iteration, T times an image is trained at in an inner epoch.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.flow_grpo.peer import adapters
from benchmarks.flow_grpo.recipe import EMA_DECAY, MAX_GRAD_NORM, WEIGHT_DECAY
from benchmarks.time_to_reward.embedded import RESOLUTION, Encoder, Groups, load
from benchmarks.time_to_reward.learner import NUM_IMAGES, Judge, Run, device, our_name
from benchmarks.time_to_reward.nft_checkout import NFTCheckout
from fastgrpo.evaluation import EvaluationResult
from fastgrpo.models.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class NFTCode:
    """``inner_epochs`` optimizer steps on a rollout, each of ``num_times`` of its times for every image.

    solver: a name of theirs.  ``dpm2`` is in their config; in 6 steps it makes worse images here than ``flow``,
    which is Euler's.  decay_type: 0 samples with the newest weights, 1 with a mean of them and older ones.
    ema_decay: of the average that is judged, an optimizer step; .9 is in their script.
    """

    num_steps: int = 6
    solver: str = "flow"
    num_times: int = 1
    inner_epochs: int = 6
    adv_clip_max: float = 2.0
    kl_coef: float = 0.0
    decay_type: int = 0
    ema_decay: float = EMA_DECAY
    micro_batch: int = NUM_IMAGES // 2

    def missing(self, run: Run) -> str:
        return "" if run.nft else "--nft-checkout, a checkout of DiffusionNFT"

    def __call__(self, run: Run) -> "NFTLearner":
        assert run.nft is not None
        return NFTLearner(NFTCheckout(run.nft.resolve()), self, run)


class NFTLearner:
    """``Learner`` over their code."""

    def __init__(self, checkout: NFTCheckout, side: NFTCode, run: Run) -> None:
        self.judge, self.side = Judge(run), side
        torch.set_num_threads(1)
        torch.manual_seed(run.seed)
        self.device = torch.device(device())
        self.pipeline = load(self.device)
        self.encoder = Encoder(self.pipeline)
        self.groups = Groups(run.seed, side.micro_batch)
        self.sample = checkout.module("diffusers_patch.pipeline_with_logprob").pipeline_with_logprob
        self.tracker = checkout.module("stat_tracking").PerPromptStatTracker(True)
        self._update, self._move_old = checkout.update(), checkout.move_old()
        trained, old = self._adapt()
        self.names = [n for n, weight in self.pipeline.transformer.named_parameters() if weight.requires_grad]
        self.ema = checkout.module("ema").EMAModuleWrapper(
            trained, decay=side.ema_decay, update_step_interval=1, device=self.device
        )
        self.iteration = 0
        # the variables of their main that the two statements read and write
        self.variables: dict[str, Any] = {
            **_NOTHING,
            "torch": torch,
            "defaultdict": defaultdict,
            "return_decay": checkout.return_decay(),
            "config": self._config(),
            "device": self.device,
            "transformer_ddp": _OneProcess(self.pipeline.transformer),
            "transformer_trainable_parameters": trained,
            "old_transformer_trainable_parameters": old,
            "optimizer": torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=WEIGHT_DECAY),
            "ema": self.ema,
            "num_train_timesteps": side.num_times,
            "num_batches": NUM_IMAGES // side.micro_batch,
            "effective_grad_accum_steps": NUM_IMAGES // side.micro_batch * side.num_times,
            "global_step": 0,
        }

    def _adapt(self) -> tuple[list[Tensor], list[Tensor]]:
        """Adapters as their script makes them: ``default`` is trained, ``old`` samples and starts equal."""
        lora = adapters(LoRA().rank)
        transformer = self.pipeline.transformer = get_peft_model(self.pipeline.transformer, lora)
        transformer.add_adapter("old", lora)
        weights = {}
        for name in ("old", "default"):
            transformer.set_adapter(name)
            weights[name] = [weight for weight in transformer.parameters() if weight.requires_grad]
        for weight, old in zip(weights["default"], weights["old"], strict=True):
            old.data.copy_(weight.data)
        return weights["default"], weights["old"]

    def _config(self) -> SimpleNamespace:
        train = SimpleNamespace(
            num_inner_epochs=self.side.inner_epochs,
            adv_clip_max=self.side.adv_clip_max,
            adv_mode="all",
            beta=self.side.kl_coef,
            max_grad_norm=MAX_GRAD_NORM,
            ema=True,
        )
        sampling = SimpleNamespace(guidance_scale=1.0)
        return SimpleNamespace(beta=1.0, use_lora=True, decay_type=self.side.decay_type, train=train, sample=sampling)

    def step(self) -> float:
        transformer = self.pipeline.transformer
        transformer.eval()
        transformer.set_adapter("old")
        parts, rewards, texts = [], [], []
        for prompts in self.groups(self.iteration):
            part, images = self._sample(prompts)
            rewards.append(self.groups.reward(images, prompts))
            parts.append(part)
            texts += prompts
        transformer.set_adapter("default")
        samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        rewards_S = torch.cat(rewards)
        rewards_ST = rewards_S.unsqueeze(1).repeat(1, self.side.num_times)
        samples["advantages"] = torch.from_numpy(self.tracker.update(texts, rewards_ST.numpy())).to(self.device)
        self.tracker.clear()
        transformer.train()
        num_samples, num_times = samples["timesteps"].shape
        self.variables |= {
            "epoch": self.iteration,
            "filtered_samples": samples,
            "total_batch_size_filtered": num_samples,
            "num_timesteps_filtered": num_times,
            "current_accumulated_steps": 0,
            "gradient_update_times": 0,
        }
        exec(self._update, self.variables)
        exec(self._move_old, self.variables)
        self.iteration += 1
        return rewards_S.mean().item()

    def _sample(self, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        embeds, pooled = self.encoder(prompts)
        images, latents, _ = self.sample(
            self.pipeline,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            num_inference_steps=self.side.num_steps,
            guidance_scale=1.0,
            output_type="pt",
            height=RESOLUTION,
            width=RESOLUTION,
            deterministic=True,
            solver=self.side.solver,
            model_type="sd3",
        )
        times_BT = self.pipeline.scheduler.timesteps.repeat(len(prompts), 1).to(self.device)
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "timesteps": times_BT,
            "next_timesteps": torch.cat([times_BT[:, 1:], torch.zeros_like(times_BT[:, :1])], dim=1),
            "latents_clean": latents[-1],
        }, images

    def evaluate(self) -> EvaluationResult:
        return self.judge(self.averages())

    def averages(self) -> dict[str, Tensor]:
        """Averaged weights by their names in our model."""
        return {our_name(name): weight for name, weight in zip(self.names, self.ema.ema_parameters, strict=True)}


class _OneProcess:
    """In place of DistributedDataParallel, of which one process needs nothing."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def _bare(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


# progress bars, mixed precision, ranks and logs
_NOTHING: dict[str, Any] = {
    "tqdm": _bare,
    "torch_autocast": lambda **_: nullcontext(),
    "enable_amp": False,
    "mixed_precision_dtype": None,
    "scaler": None,
    "rank": 0,
    "is_main_process": lambda rank: False,
    "dist": SimpleNamespace(all_reduce=lambda tensor, op: None, ReduceOp=SimpleNamespace(AVG="avg")),
}
