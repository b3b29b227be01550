"""``fastgrpo COMMAND --dry-run``: the config that a command would have, and what it would do; nothing is made.

What can be known to fail is found as the command itself would find it.
"""

from omegaconf import DictConfig, OmegaConf

from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.parts import RunParts

_TRAINS = ("train", "submit")


def dry_run(name: str, config: DictConfig) -> str:
    """The text; ValueError for a config that the command would refuse before it loads anything."""
    text = OmegaConf.to_yaml(config)
    return f"{text}\n{_of_training(config)}" if name in _TRAINS else text


def _of_training(config: DictConfig) -> str:
    parts = RunParts.read(config)
    training, evaluating, directory = parts.training, parts.evaluating, RunDirectory(parts.output)
    if not parts.resume:
        directory.refuse_if_taken()
    until = f" or {training.max_minutes:g} minutes" if training.max_minutes < float("inf") else ""
    evaluated = len(parts.held_out) * evaluating.images_per_prompt
    return "\n".join(
        [
            f"# {'goes on in' if parts.resume and directory.is_taken else 'writes'} {parts.output}",
            f"# trains for {training.iterations} iterations{until}, each on {training.prompts_per_iteration} prompts x "
            f"{training.group_size} images = {training.num_samples}, of {len(parts.prompts)} prompts",
            f"# in each {training.num_updates} updates of {training.optimizer_steps} optimizer steps",
            f"# evaluates {len(parts.held_out)} held-out prompts x {evaluating.images_per_prompt} images = {evaluated} "
            f"before, every {evaluating.every} iterations and at the end, by {', '.join(parts.rewards.names['terms'])}"
            + "".join(f", {name}" for name in parts.rewards.names["watch"]),
        ]
    )
