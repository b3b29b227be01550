"""One iteration of fastgrpo: ``Trainer.step`` of the trainer that ``fastgrpo train`` builds, with nothing taken out."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.flow_grpo.recipe import Job, our_config
from benchmarks.flow_grpo.side import Iteration, now
from fastgrpo.assembly import build_trainer


class FastGRPO:
    """Our side; ``overrides`` are of the config, as on the command line."""

    def __init__(self, job: Job, output: Path, overrides: Sequence[str] = ()) -> None:
        self.job = job
        self.trainer = build_trainer(our_config(job, [*overrides, f"output={output}"]))

    def __call__(self) -> Iteration:
        if self.job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cpu, start = time.process_time(), now()
        metrics = self.trainer.step()
        seconds = now() - start
        return Iteration(
            num_images=self.job.num_images,
            rollout_seconds=seconds - metrics["seconds/update"],
            update_seconds=metrics["seconds/update"],
            cpu_seconds=time.process_time() - cpu,
            peak_bytes=int(metrics["peak_bytes"]),
            ratio_deviation=metrics["ratio_deviation"],
        )
