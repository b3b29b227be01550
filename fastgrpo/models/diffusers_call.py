"""How diffusers draws what a model draws, in lines of Python: from loading a pipeline to an image."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from fastgrpo.files.hub import HubId
from fastgrpo.models.lora_writing import DIFFUSERS_FILE

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_WIDTH, _INDENT = 100, "    "


@dataclass(frozen=True, kw_only=True)
class DiffusersCall:
    """A pipeline and what it is called with, so that its images are those of ``fastgrpo sample``.

    pipeline: the name of its class.  weights: as ``model.weights`` has it.  absent: parts that are not loaded.
    arguments: of a call, beside the prompt and the times.  takes_times: whether it can be told its times.
    is_changed: whether other files change the weights of the transformer, so that ``weights`` alone are another model.
    comfyui_knows: whether ComfyUI knows the transformer's layers by diffusers' names.
    """

    pipeline: str
    weights: str
    variant: str | None
    absent: Sequence[str]
    dtype: str
    decode_dtype: str
    arguments: Mapping[str, Any]
    takes_times: bool
    is_changed: bool
    comfyui_knows: bool

    @property
    def base_model(self) -> HubId | None:
        """What is trained, if it is a model of the hub."""
        return None if self._is_local else HubId.parse(self.weights)

    def imports(self) -> list[str]:
        """Of ``loading``."""
        classes = [_SCHEDULER, self.pipeline] if self.takes_times else [self.pipeline]
        return ["import torch", f"from diffusers import {', '.join(sorted(classes))}"]

    def package_imports(self) -> list[str]:
        """Of ``loading`` too, from the standard library."""
        return ["from importlib.resources import files"] if self.weights.startswith("pkg://") else []

    def loading(self, *, merged: str | None = None, lora: str | None = None) -> list[str]:
        """``pipeline = ...``: of the directory ``merged`` or the model's own weights, with the LoRA of a directory.

        Both are Python, as ``HERE`` or a text in quotes.
        """
        where = [merged] if merged is not None else self._where()
        given = [*where, f"dtype={self._torch_dtype()}", *(f"{part}=None" for part in self.absent)]
        lines = _call(f"pipeline = {self.pipeline}.from_pretrained", given)
        if lora is not None:
            lines.append(f"pipeline.load_lora_weights({lora}, weight_name={quoted(DIFFUSERS_FILE)})")
        if self.takes_times:
            lines += ["# takes times as they are", f"pipeline.scheduler = {_SCHEDULER}()"]
        return [*lines, 'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")']

    def settings(self, times: Sequence[float]) -> list[str]:
        """What a call is given beside its prompt; times fall from 1 to 0."""
        named = [f"{name}={quoted(value)}" for name, value in self.arguments.items()]
        return [f"num_inference_steps={len(times) - 1}", *(["sigmas=TIMES"] * self.takes_times), *named]

    def times(self, times: Sequence[float]) -> list[str]:
        """``TIMES = ...``, from noise to image; nothing for a pipeline that has its own."""
        if not self.takes_times:
            return []
        # the last, 0, is diffusers' own
        listed = ", ".join(repr(round(t, 7)) for t in times[:-1])
        return ["TIMES = [", *fill(listed, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT).splitlines(), "]"]

    def pasted(self, times: Sequence[float], prompt: str, *, merged: str | None = None, lora: str | None = None) -> str:
        """All of it, for one image; ``merged`` or ``lora`` is a directory as in ``loading``."""
        drawing = _call("images = pipeline", [f"prompt={quoted(prompt)}", *self.settings(times)])
        drawing[-1] += ".images"
        parts = [[*self.package_imports(), *self.imports()], self.loading(merged=merged, lora=lora)]
        parts.append([*self.times(times), *drawing, 'images[0].save("image.png")'])
        return "\n\n".join("\n".join(part) for part in parts)

    @property
    def _is_local(self) -> bool:
        return self.weights.startswith("pkg://") or Path(self.weights).expanduser().is_dir()

    def _where(self) -> list[str]:
        variant = [] if self.variant is None else [f"variant={quoted(self.variant)}"]
        if self.weights.startswith("pkg://"):
            package, _, inside = self.weights.removeprefix("pkg://").partition("/")
            return [f"str(files({quoted(package)}) / {quoted(inside)})", *variant]
        if (hub := self.base_model) is None:
            return [quoted(str(Path(self.weights).expanduser().absolute())), *variant]
        revision = [] if hub.revision is None else [f"revision={quoted(hub.revision)}"]
        return [quoted(hub.repository), *revision, *variant]

    def _torch_dtype(self) -> str:
        if self.dtype == self.decode_dtype:
            return f"torch.{self.dtype}"
        return f'{{"default": torch.{self.dtype}, "vae": torch.{self.decode_dtype}}}'


def quoted(value: object) -> str:
    """A text, number or truth value in Python, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _call(called: str, arguments: Sequence[str]) -> list[str]:
    """In one line where it fits, else an argument a line."""
    line = f"{called}({', '.join(arguments)})"
    return [line] if len(line) <= _WIDTH else [f"{called}(", *(f"{_INDENT}{one}," for one in arguments), ")"]
