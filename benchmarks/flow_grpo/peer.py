"""What Flow-GRPO's training script sets up, from the user's checkout: its functions, its model, its optimizer.

Which of it is theirs and which is the driver's: benchmarks/flow_grpo/theirs.py.
"""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.recipe import (
    EMA_DECAY,
    OPTIMIZER_STEPS,
    RECIPES,
    WEIGHT_DECAY,
    Job,
    Recipe,
)
from benchmarks.flow_grpo.setting import Setting

_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# a block with its adapters on and off, with and without gradient, in training and not: dynamo's own limit is 8
_MAX_VARIANTS = 64


class Peer:
    """Flow-GRPO's functions from ``checkout``, and the model, optimizer and average that its script makes."""

    def __init__(self, checkout: Checkout, job: Job, setting: Setting) -> None:
        self.recipe, self.job, self.setting = self._recipe(job), job, setting
        if job.threads:
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self._take_functions(checkout)
        # accelerate has one state a process, and a check has a peer in each setting
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=setting.mixed_precision,
            cpu=job.device == "cpu",
            gradient_accumulation_steps=job.batches // OPTIMIZER_STEPS * self.recipe.num_trained_steps,
        )
        self.pipeline = self._load()
        self.trained = [p for p in self.pipeline.transformer.parameters() if p.requires_grad]
        self.ema = self.ema_class(
            self.trained, decay=EMA_DECAY, update_step_interval=job.ema_every, device=self.accelerator.device
        )
        optimizer = torch.optim.AdamW(self.trained, lr=job.learning_rate, weight_decay=WEIGHT_DECAY)
        self.transformer, self.optimizer = self.accelerator.prepare(self.pipeline.transformer, optimizer)
        self.empty_embeds, self.empty_pooled = (
            row.repeat(job.micro_batch, *[1] * (row.dim() - 1)) for row in self.encode([""])
        )

    def _recipe(self, job: Job) -> Recipe:
        return RECIPES[job.recipe]

    def _take_functions(self, checkout: Checkout) -> None:
        patch = "flow_grpo.diffusers_patch"
        fast = "_fast" if self.recipe.window else ""
        self.pipeline_with_logprob = checkout.module(f"{patch}.sd3_pipeline_with_logprob{fast}").pipeline_with_logprob
        self.encode_prompt = checkout.module(f"{patch}.train_dreambooth_lora_sd3").encode_prompt
        self.compute_log_prob = checkout.compute_log_prob(self.recipe)
        self.ema_class = checkout.module("flow_grpo.ema").EMAModuleWrapper
        self.tracker = checkout.module("flow_grpo.stat_tracking").PerPromptStatTracker(global_std=True)
        rewards = checkout.module("flow_grpo.rewards")
        self.reward = rewards.multi_score(torch.device(self.job.device), {"jpeg_compressibility": 1.0})
        # what compute_log_prob reads of their config
        self.config = SimpleNamespace(
            train=SimpleNamespace(cfg=self.recipe.guidance_scale > 1),
            sample=SimpleNamespace(
                guidance_scale=self.recipe.guidance_scale,
                noise_level=self.recipe.noise_level,
                sde_type=self.recipe.dynamics,
            ),
        )

    def _load(self) -> Any:
        pipeline = StableDiffusion3Pipeline.from_pretrained(self.job.pipeline)
        pipeline.set_progress_bar_config(disable=True)
        encoder_dtype = getattr(torch, self.setting.dtype)
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        for module in (*encoders, pipeline.vae, pipeline.transformer):
            module.requires_grad_(False)
            module.to(self.accelerator.device, dtype=encoder_dtype if module in encoders else torch.float32)
        pipeline.transformer = get_peft_model(pipeline.transformer, adapters(self.job.size.lora_rank))
        if self.setting.compiled:
            torch._dynamo.config.recompile_limit = _MAX_VARIANTS
            for block in pipeline.transformer.transformer_blocks:
                block.compile(dynamic=False)
        return pipeline

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Conditions of the prompts, each encoded as often as it occurs."""
        pipeline = self.pipeline
        with torch.no_grad():
            embeds, pooled = self.encode_prompt(
                [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3],
                [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3],
                prompts,
                self.job.size.t5_tokens,
            )
        return embeds.to(self.accelerator.device), pooled.to(self.accelerator.device)


def adapters(rank: int) -> LoraConfig:
    """What their scripts train: the joint attention of every block."""
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        init_lora_weights="gaussian",
        target_modules=[f"attn.{target}" for target in _TARGETS],
    )
