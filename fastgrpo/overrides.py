"""One setting of the command line, ``key=value``, as Hydra's grammar reads it.

Hydra gives meaning to characters that are plain in paths and sentences: ``~/a``, ``a,b``, ``a (1)``.  A value that is
no valid expression, or a list of values to sweep over, which no command does, is taken as the text that it is.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# keys whose value is a sentence
TEXT_KEYS = ("prompt",)
# groups that a plain yes or no chooses from: which option each of them means
_SWITCHED = {"search": {True: "best_of_n", False: "none"}}
_OPENING = ("'", '"', "[", "{")


def key_of(override: str) -> str:
    """The key, without its sign and its package: ``reward/terms`` of ``+reward/terms@reward.terms.jpeg=...``."""
    return override.lstrip("+~").split("=")[0].split("@")[0]


def is_plain(override: str) -> bool:
    """Whether it sets a value, rather than choosing a group's option, adding or removing a key."""
    return override[:1] not in ("+", "~") and "/" not in override.split("=")[0] and "@" not in override.split("=")[0]


def value_of(override: str) -> Any:
    """The value, as Hydra reads it."""
    return OverridesParser.create().parse_override(override).value()


def line_of(overrides: Sequence[str]) -> dict[str, Any]:
    """What the line sets, by key; the values in mappings and lists by theirs, as ``a.b`` and ``a[0]``."""
    line: dict[str, Any] = {}
    for override in overrides:
        if "=" in override and not override.startswith("~"):
            line |= _leaves(value_of(override), key_of(override))
    return line


def _leaves(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in _leaves(child, f"{key}.{name}").items()}
    if isinstance(value, list):
        return {k: v for index, child in enumerate(value) for k, v in _leaves(child, f"{key}[{index}]").items()}
    return {key: value}


def beside_targets(overrides: Sequence[str]) -> list[str]:
    """The same line, in which keys beside a ``_target_`` that it names may be new: no default has what that takes."""
    nodes = tuple(key_of(o).removesuffix("_target_") for o in overrides if key_of(o).endswith("._target_"))
    return [f"++{o}" if is_plain(o) and key_of(o).startswith(nodes) else o for o in overrides]


def gathered(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The same line, in which each of ``keys`` that is given several times is given once, with a list of its values."""
    line = list(overrides)
    for key in keys:
        given = [override for override in line if override.startswith(f"{key}=")]
        if len(given) < 2:
            continue
        values = []
        for override in given:
            value = value_of(quoted(override))
            values += value if isinstance(value, list) else [value]
        words = ",".join(quoted_text(str(value)) for value in values)
        line = [*(override for override in line if override not in given), f"{key}=[{words}]"]
    return line


def switched(override: str, groups: Mapping[str, Sequence[str]]) -> str:
    """The override with an option of its group in place of true or false; ValueError for what is neither."""
    key, equals, text = override.partition("=")
    if key not in _SWITCHED or key not in groups or not equals:
        return override
    value = value_of(override)
    if isinstance(value, bool):
        return f"{key}={_SWITCHED[key][value]}"
    if value not in groups[key]:
        options = ", ".join(groups[key])
        raise ValueError(
            f"{key} must be true, false or one of {options}, got {text}; {key}=true is {key}={_SWITCHED[key][True]}"
        )
    return override


def of_file(override: str, name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """What ``prompts=FILE`` means to doctor, which shows that file; ValueError for another command's, with its key."""
    key, equals, text = override.partition("=")
    if key != "prompts" or "prompts" not in groups or not equals:
        return [override]
    value = str(value_of(override))
    if value in groups["prompts"] or not ("." in value or "/" in value):
        return [override]
    if name == "doctor":
        return [f"prompts.path={text}", "show_prompts=true"]
    option = "held_out" if name == "evaluate" else "path"
    raise ValueError(f"prompts is one of {', '.join(groups['prompts'])}; give a file as prompts.{option}={text}")


def quoted(override: str) -> str:
    """The override in a form that Hydra reads as it was meant."""
    key, equals, text = override.partition("=")
    if not equals or (text[:1] in ("'", '"') if key in TEXT_KEYS else not _is_misread(override, text)):
        return override
    return f"{key}={quoted_text(text)}"


def quoted_text(text: str) -> str:
    """The text as Hydra writes one in quotes."""
    # in Hydra's grammar backslashes count only before a quote
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text) + "'"


def _is_misread(override: str, text: str) -> bool:
    parse = partial(OverridesParser.create().parse_override, override)
    try:
        return parse().is_sweep_override()
    except HydraException:
        # what begins as a list, a mapping or a quotation was meant as one
        return not text.startswith(_OPENING)
