"""One iteration of Flow-GRPO by its own functions.

Theirs, unmodified, from the checkout: ``pipeline_with_logprob`` (sampling, with its ``sde_step_with_logprob``),
``compute_log_prob``, ``encode_prompt``, ``PerPromptStatTracker``, ``EMAModuleWrapper`` and ``multi_score`` with its
JPEG reward; from their libraries: peft's adapters, accelerate's preparation, accumulation and mixed precision.

The driver's, since their loop is the body of a ``main()`` that cannot be imported: the order of those calls, their
arguments, the clipped loss and the statistics that are logged, as ``scripts/train_sd3.py`` has them.  It leaves out
what only costs time: data loaders, logging to wandb, progress bars, evaluation, the copy of logged images, the wrapper
for several GPUs.  Samples of zero advantage are kept, on both sides.

fp16 mixed precision over float32 weights is what its configs say; on a CPU, where that is slow, float32 and bfloat16
mixed precision, and each of them compiled on demand, which its script does not do.
Letters: B samples of a micro-batch, S samples of an iteration, T trained steps.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.flow_grpo.checkout import Checkout
from benchmarks.flow_grpo.peer import Peer
from benchmarks.flow_grpo.recipe import MICRO_BATCH, NUM_STEPS, Job
from benchmarks.flow_grpo.setting import Setting
from benchmarks.flow_grpo.side import Iteration, now
from benchmarks.flow_grpo.their_update import TheirUpdate
from fastgrpo.memory.device import peak_bytes
from fastgrpo.prompts import PromptSource, load_prompts

_ID_TOKENS = 256
_REWARD_THREADS = 8


class FlowGRPO:
    """Called, it drives their functions through one iteration."""

    def __init__(self, checkout: Checkout, job: Job, setting: Setting) -> None:
        self.peer = Peer(checkout, job, setting)
        self.update = TheirUpdate(self.peer)
        self.prompts = PromptSource(load_prompts(job.prompts), job.batches, job.seed)
        self.executor = ThreadPoolExecutor(_REWARD_THREADS)
        self.epoch = 0

    def __call__(self) -> Iteration:
        job = self.peer.job
        if job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cpu, start = time.process_time(), now()
        samples = self._sample()
        sampled = now()
        deviation = self.update(samples)
        end = now()
        self.epoch += 1
        return Iteration(
            num_images=job.num_images,
            rollout_seconds=sampled - start,
            update_seconds=end - sampled,
            cpu_seconds=time.process_time() - cpu,
            peak_bytes=peak_bytes(self.peer.accelerator.device),
            ratio_deviation=deviation,
        )

    def _sample(self) -> dict[str, Tensor]:
        """Images, their rewards in threads beside it, and advantages: rows of S samples."""
        self.peer.transformer.eval()
        parts, waiting = [], []
        for prompt in self.prompts.at(self.epoch).texts:
            part, images = self._sample_batch([prompt] * MICRO_BATCH)
            waiting.append(self.executor.submit(self.peer.reward, images, [prompt] * MICRO_BATCH, {}, only_strict=True))
            # lets the reward's thread begin
            time.sleep(0)
            parts.append(part)
        samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        samples["advantages"] = self._advantages(samples.pop("prompt_ids"), waiting)
        return samples

    def _sample_batch(self, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
        ids = self.peer.pipeline.tokenizer(
            prompts, padding="max_length", max_length=_ID_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(self.peer.accelerator.device)
        samples, images = sample(self.peer, prompts)
        return {"prompt_ids": ids, **samples}, images

    def _advantages(self, prompt_ids: Tensor, waiting: list[Future[Any]]) -> Tensor:
        """Of their tracker, a column a trained step [S, T]."""
        device = self.peer.accelerator.device
        rewards_S = torch.cat([torch.as_tensor(future.result()[0]["avg"], device=device).float() for future in waiting])
        rewards_ST = rewards_S.unsqueeze(1).repeat(1, self.peer.recipe.num_trained_steps)
        prompts = self.peer.pipeline.tokenizer.batch_decode(prompt_ids.cpu().numpy(), skip_special_tokens=True)
        advantages = self.peer.tracker.update(prompts, rewards_ST.cpu().numpy())
        self.peer.tracker.clear()
        return torch.as_tensor(advantages).to(device)


def sample(peer: Peer, prompts: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """One micro-batch by their pipeline: what their update needs of it, and its images."""
    embeds, pooled = peer.encode(prompts)
    arguments: dict[str, Any] = {}
    if peer.recipe.window:
        arguments = {
            "sde_window_size": peer.recipe.window,
            "sde_window_range": peer.recipe.window_range,
            "sde_type": peer.recipe.dynamics,
        }
    with torch.no_grad():
        images, latents, log_probs, *rest = peer.pipeline_with_logprob(
            peer.pipeline,
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=peer.empty_embeds,
            negative_pooled_prompt_embeds=peer.empty_pooled,
            num_inference_steps=NUM_STEPS,
            guidance_scale=peer.recipe.guidance_scale,
            output_type="pt",
            height=peer.job.size.resolution,
            width=peer.job.size.resolution,
            noise_level=peer.recipe.noise_level,
            **arguments,
        )
    times = torch.stack(rest[0]) if rest else peer.pipeline.scheduler.timesteps
    latents_BT = torch.stack(latents, dim=1)
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "timesteps": times.repeat(len(prompts), 1),
        "latents": latents_BT[:, :-1],
        "next_latents": latents_BT[:, 1:],
        "log_probs": torch.stack(log_probs, dim=1),
    }, images
