"""What is read of a prompt file: how many prompts, from where in it, how long they are, and what rewards are told."""

from collections import Counter
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from fastgrpo.files.locations import resolve_path
from fastgrpo.models.local_tokenizers import longest_in_tokens
from fastgrpo.parts import read_prompts
from fastgrpo.prompts import load_prompt_file, num_bytes
from fastgrpo.resolution import places_by_resolution
from fastgrpo.types import Prompt

_NUM_EXAMPLES = 5
_MOST_SHOWN = 100
# of English, in tokenizers of CLIP, T5 and Qwen
_BYTES_PER_TOKEN = 4


def prompts_table(config: DictConfig) -> Table:
    """Of the file ``prompts.path``; ValueError for whatever a run would refuse in it.  No model is loaded."""
    prompts = read_prompts(config, "path")
    column = load_prompt_file(resolve_path(config.prompts.path), column=config.prompts.column).column
    table = Table("", "", title=escape(f"prompts of {config.prompts.path}"), show_header=False)
    table.add_row("prompts", str(len(prompts)) + (escape(f", of the column {column}") if column else ""))
    table.add_row("duplicates", _duplicates(prompts))
    table.add_row("longest", _longest(config.model, [prompt.text for prompt in prompts]))
    if keys := Counter(key for prompt in prompts for key in prompt.metadata):
        named = [_with_count(key, of, len(prompts)) for key, of in keys.items()]
        table.add_row("metadata", escape(", ".join(named)))
    if any(prompt.resolution for prompt in prompts):
        sizes = places_by_resolution(prompt.resolution for prompt in prompts).items()
        drawn = [f"{len(places)} of {resolution or 'the own one'}" for resolution, places in sizes]
        table.add_row("resolutions", escape(", ".join(drawn)))
    if num := sum(prompt.negative is not None for prompt in prompts):
        table.add_row("negative prompts", str(num))
    for row in dict.fromkeys(round(n * (len(prompts) - 1) / (_NUM_EXAMPLES - 1)) for n in range(_NUM_EXAMPLES)):
        text = prompts[row].text
        # what is in brackets would be a style
        table.add_row(f"prompt {row + 1}", escape(shorten(text, _MOST_SHOWN, placeholder="...")))
    return table


def _duplicates(prompts: list[Prompt]) -> str:
    num = len(prompts) - len({prompt.text for prompt in prompts})
    if not num:
        return "none"
    whole = [(prompt.text, prompt.resolution, prompt.negative, repr(dict(prompt.metadata))) for prompt in prompts]
    return f"{num} texts come again, {len(prompts) - len(set(whole))} of them with all that their row says"


def _longest(model: Any, texts: list[str]) -> str:
    most = f"model.max_sequence_length is {model.max_sequence_length}" if model.get("max_sequence_length") else ""
    if counts := longest_in_tokens(str(model.get("weights", "")), texts):
        said = [f"{num} tokens by {name}" for name, num in counts.items()]
    else:
        num_tokens = -(-max(map(num_bytes, texts)) // _BYTES_PER_TOKEN)
        said = [f"some {num_tokens} tokens, estimated by its bytes: the tokenizer of model.weights is not here"]
    return "; ".join([*said, *([most] if most else [])])


def _with_count(key: str, count: int, total: int) -> str:
    return key if count == total else f"{key} (in {count})"
