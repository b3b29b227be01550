"""A run's config for the model of ``tiny.py``: an iteration takes a tenth of a second."""

from pathlib import Path

from omegaconf import DictConfig

from fastgrpo.config import load_config

TEXTS = ("a red circle", "two blue squares", "a green triangle", "a red square", "two red triangles")


def make_overrides(weights: Path, output: Path, *overrides: str) -> list[str]:
    """2 prompts x 3 samples x 4 steps, 3 of them trained, rewarded for large files; later overrides win."""
    prompts = output.parent / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return [
        "algorithm=flow_grpo",
        "algorithm.schedule.num_steps=4",
        f"model.weights={weights}",
        "adaptation.rank=4",
        "adaptation.alpha=6.0",
        "reward=jpeg_incompressibility",
        f"prompts.path={prompts}",
        f"prompts.held_out={prompts}",
        "runtime.device=cpu",
        "runtime.micro_batch=4",
        "runtime.threads=1",
        f"output={output}",
        "train.iterations=2",
        # so that a run is the same however far it is to go
        "train.decay_share=0",
        "train.prompts_per_iteration=2",
        "train.group_size=3",
        "evaluate.images_per_prompt=1",
        "evaluate.num_steps=2",
        # a second of a test
        "report=false",
        *overrides,
    ]


def make_config(weights: Path, output: Path, *overrides: str) -> DictConfig:
    """The checked ``train`` config of ``make_overrides``."""
    return load_config("train", make_overrides(weights, output, *overrides))
