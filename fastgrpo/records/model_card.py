"""What lies beside weights that others are to use: README.md, a model card, and generate.py, which draws with them."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastgrpo.files.whole import write_whole
from fastgrpo.models.diffusers_call import DiffusersCall, quoted

_SCRIPT = '''"""Draws images of a prompt with {what}, as fastgrpo sample does: python generate.py 'a red circle'."""

import argparse
{package}from itertools import count
from pathlib import Path

{imports}

HERE = Path(__file__).parent
{times}

def load():
    """The pipeline, on the GPU if there is one."""
{loading}
    return pipeline


def draw(pipeline, prompt, **settings):
    """Images of a prompt; settings are further ones of the pipeline's own call."""
    return pipeline(
        prompt=prompt,
{settings}
        **settings,
    ).images


def free_path(name):
    """The first of name_0.png, name_1.png, ... that is not there yet."""
    return next(path for number in count() if not (path := Path(f"{{name}}_{{number}}.png")).exists())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--images", type=int, default=1, help="how many")
    parser.add_argument("--seed", type=int, default=42, help="of the first; the others have the next ones")
    parser.add_argument("--output", default="image", help="what their files are called, before a number")
    words = parser.parse_args()
    pipeline = load()
    for number in range(words.images):
        generator = torch.Generator("cpu").manual_seed(words.seed + number)
        image = draw(pipeline, words.prompt, generator=generator)[0]
        path = free_path(words.output)
        image.save(path)
        print(path)
'''
_FILES = """## Files

| file | for |
|---|---|
| `pytorch_lora_weights.safetensors` | diffusers, ComfyUI, fastgrpo |
| `adapter_model.safetensors`, `adapter_config.json` | peft |

alpha is the rank in all of them, with the scale in B: every reader takes the LoRA at its full strength, which is 1.
"""
_COMFYUI = """## ComfyUI

Copy `pytorch_lora_weights.safetensors` into `ComfyUI/models/loras`, and load it by `LoraLoaderModelOnly` at strength 1
on the base model.
"""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Of the weights in a directory.

    times: from noise to image.  prompt: an example.  config: of the run, as plain data; empty where they are of none.
    iteration: after which they are the run's average.
    """

    call: DiffusersCall
    times: Sequence[float]
    prompt: str
    config: Mapping[str, Any]
    iteration: int | None = None

    def pasted(self, directory: Path, *, is_lora: bool) -> str:
        """The whole call that draws with what is in the directory."""
        place = {"lora" if is_lora else "merged": quoted(str(directory))}
        return self.call.pasted(self.times, self.prompt, **place)

    def write(self, directory: Path, *, is_lora: bool) -> None:
        """README.md and generate.py; the latter not for a LoRA of weights that take more than a pipeline's files."""
        is_drawn = not (is_lora and self.call.is_changed)
        if is_drawn:
            write_whole(directory / "generate.py", self._script(is_lora).encode())
        write_whole(directory / "README.md", "\n".join(self._card(directory, is_lora, is_drawn)).encode())

    def _script(self, is_lora: bool) -> str:
        place = {"lora" if is_lora else "merged": "HERE"}
        times = self.call.times(self.times)
        settings = self.call.settings(self.times)
        return _SCRIPT.format(
            what="this LoRA" if is_lora else "this model",
            package="".join(f"{line}\n" for line in self.call.package_imports()),
            imports="\n".join(self.call.imports()),
            times="\n".join(["# from noise to image", *times, ""] if times else []),
            loading="\n".join(f"    {line}" for line in self.call.loading(**place)),
            settings="\n".join(f"        {setting}," for setting in settings),
        )

    def _card(self, directory: Path, is_lora: bool, is_drawn: bool) -> Iterator[str]:
        base, name = self.call.base_model, self.config.get("name", directory.name)
        yield "---"
        if base is not None:
            yield f"base_model: {base.repository}"
        yield from ("library_name: diffusers", "pipeline_tag: text-to-image")
        yield from (f"tags: [{'lora, ' * is_lora}fastgrpo]", "---", "")
        weights = self.call.weights if base is None else base.repository
        yield f"# {name}: {'a LoRA' if is_lora else f'a {self.call.pipeline}'}, trained from {weights}"
        yield ""
        if self.config:
            yield f"Trained by reinforcement learning, with fastgrpo {version('fastgrpo')}.  It has no trigger word."
            yield from ("", "| recipe | |", "|---|---|")
            yield from (f"| {key} | {value} |" for key, value in _recipe(self.config, self.iteration))
            yield ""
        yield from ("## diffusers", "")
        if is_drawn:
            yield from (f"`python generate.py {shlex.quote(self.prompt)}`, or in this directory:", "", "```python")
            yield from (self.pasted(Path("."), is_lora=is_lora), "```", "")
        else:
            yield (
                "This LoRA was trained on another transformer than the pipeline's (model.transformer or model.lora): "
                "add it to that one, or take the whole pipeline of `fastgrpo export run=... merged=true`."
            )
            yield ""
        if is_lora:
            if self.call.comfyui_knows:
                yield _COMFYUI
            yield from ("## peft", "", "```python", "from peft import PeftModel", "")
            yield 'pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, ".")'
            yield from ("```", "", "## fastgrpo", "", "```")
            yield "fastgrpo sample lora=DIRECTORY prompt=... model=...     # the model that it was trained from"
            yield "fastgrpo train adaptation.start=DIRECTORY model=...     # a new run, which starts from it"
            yield from ("```", "", _FILES)
        yield from ("## Licence", "", "That of the base model holds; name it here before you publish this.", "")


def _recipe(config: Mapping[str, Any], iteration: int | None) -> Iterator[tuple[str, str]]:
    algorithm, training, reward, model = (config.get(key) or {} for key in ("algorithm", "train", "reward", "model"))
    for part in ("objective", "advantage", "dynamics", "noise"):
        yield part, _class_of(algorithm.get(part))
    weights = reward.get("weights") or {}
    yield "reward", ", ".join(f"{weight:g} {name}" for name, weight in weights.items()) or _class_of(reward)
    groups = f"{training.get('prompts_per_iteration')} prompts, {training.get('group_size')} images of each"
    yield "iterations", f"{iteration if iteration is not None else training.get('iterations')}, of {groups}"
    yield "learning rate", f"{training.get('learning_rate')}"
    adaptation = config.get("adaptation") or {}
    rank = f", rank {adaptation['rank']}, alpha {adaptation['alpha']}" if "rank" in adaptation else ""
    start = f", started from {adaptation['start']}" if adaptation.get("start") else ""
    yield "adaptation", f"{_class_of(adaptation)}{rank}{start}"
    yield "prompts", os.path.basename(str((config.get("prompts") or {}).get("path")))
    yield "resolution", f"{model.get('resolution')}"
    yield "guidance", f"{model.get('guidance_scale')}"
    yield "seed", f"{config.get('seed')}"


def _class_of(piece: Any) -> str:
    return str(piece.get("_target_", "")).rpartition(".")[2] if isinstance(piece, Mapping) else ""
