"""How many tokens the conditions of a text have: of models that read texts as long as they are, one of a few numbers.

    64, 128, 256, ... up to model.max_sequence_length

So batches have few shapes, each of which is compiled once.  Tokens that fill a text up are left out of attention.
"""

import logging
from typing import Any

from fastgrpo.types import Conditions

_log = logging.getLogger(__name__)
_SHORTEST = 64
_MAX_QUOTED = 60


def filled_length(num_tokens: int, most: int) -> int:
    """The least of the numbers that holds the tokens."""
    length = _SHORTEST
    while length < num_tokens:
        length *= 2
    return min(length, most)


def filled(row: Conditions, most: int) -> Conditions:
    """A row [1, L, C] with zeros up to such a number of tokens."""
    num_tokens = row.embeds_BLC.shape[1]
    embeds_BLC = row.embeds_BLC.new_zeros(1, filled_length(num_tokens, most), row.embeds_BLC.shape[2])
    embeds_BLC[:, :num_tokens] = row.embeds_BLC
    return Conditions(embeds_BLC, row.pooled_BC, row.keys, lengths_B=row.lengths_B)


def refuse_longer(text: str, num_tokens: int, most: int, longest: int) -> None:
    """ValueError for a text of more than ``most`` tokens; ``longest`` is what the family can be set to."""
    if num_tokens > most:
        raised = f", or raise model.max_sequence_length, up to {longest}" if most < longest else ""
        raise ValueError(
            f"prompt {_shown(text)!r} is {num_tokens} tokens long with its chat template, and "
            f"model.max_sequence_length is {most}; shorten it{raised}"
        )


def note_cut(text: str, tokenizer: Any, most: int) -> None:
    """Say in one line that a text is cut to its first ``most`` tokens, where it is."""
    if (num_tokens := len(tokenizer(text).input_ids)) > most:
        _log.warning(
            "prompt %r is %d tokens long, of which the first %d are read (model.max_sequence_length)",
            *(_shown(text), num_tokens, most),
        )


def _shown(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."
