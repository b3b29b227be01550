"""Conditions of a whole prompt file, encoded ahead: runs on these prompts then load no text encoder."""

from dataclasses import dataclass

from omegaconf import DictConfig
from rich.progress import track

from fastgrpo.files.locations import resolve_path
from fastgrpo.models.condition_cache import ConditionCache
from fastgrpo.models.pipeline_model import PipelineModel
from fastgrpo.parts import build_model
from fastgrpo.prompts import load_prompts, texts_to_encode


@dataclass(frozen=True)
class Encoded:
    """Different texts of a file, those among them that were encoded before, and the bytes that were written."""

    num_texts: int
    num_known: int
    num_bytes: int


def encode(config: DictConfig) -> None:
    """Run a checked ``encode`` config and print what it did; a second run goes on where a first one stopped."""
    prompts = load_prompts(resolve_path(config.prompts.path), column=config.prompts.column)
    if config.model.get("weights") == "random":
        raise ValueError("conditions of model.weights=random are drawn, not encoded; give the weights of a model")
    if config.model.get("condition_cache") is None:
        # where a model's config leaves a key out, Hydra wants to be told that it is meant
        key = "model.condition_cache" if "condition_cache" in config.model else "+model.condition_cache"
        raise ValueError(
            f"model.condition_cache is null, so conditions would be lost; add {key}=outputs/conditions here "
            "and to the runs that are to find them there"
        )
    model = build_model(config)
    if not isinstance(model, PipelineModel):
        raise ValueError(f"model._target_ is {config.model._target_}, which has no text encoders of its own")
    done = prepare(model.conditions, texts_to_encode(prompts))
    print(
        f"{done.num_texts} prompts: {done.num_known} were there, {done.num_texts - done.num_known} encoded, "
        f"{done.num_bytes / 1e6:.1f} MB written to {model.conditions.directory}"
    )


def prepare(cache: ConditionCache, texts: list[str]) -> Encoded:
    """Put what lacks of the texts, and of the empty one that guidance asks for, into the cache."""
    texts = list(dict.fromkeys([*texts, ""]))
    lacking = [text for text in texts if cache.lacks(text)]
    written = sum(track(cache.prepare(lacking), "encoding", total=len(lacking)))
    return Encoded(len(texts), len(texts) - len(lacking), written)
