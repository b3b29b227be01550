"""``fastgrpo --help`` and ``fastgrpo COMMAND [key=value ...] --help``: of the config that these words make."""

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Protocol

from omegaconf import OmegaConf

from fastgrpo.composing import config_groups
from fastgrpo.config import explained_config
from fastgrpo.leaves import leaves
from fastgrpo.meanings import general_meanings, meaning_of, meanings

# what nobody sets: _target_ is in the name of the option
# sizes of a network, of interest to who builds one with random weights
_SIZES = "architecture"
_OF_HYDRA = ("_target_", "_convert_", "_partial_", "_recursive_")
_WIDEST, _LONGEST_VALUE = 112, 48
_INDENT = 4


class Explained(Protocol):
    """What a command says of itself."""

    @property
    def summary(self) -> str: ...

    @property
    def details(self) -> str: ...

    @property
    def examples(self) -> tuple[str, ...]: ...


def overview(commands: Mapping[str, Explained]) -> str:
    """Every command in a line."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        [
            "usage: fastgrpo COMMAND [key=value ...]",
            "",
            "Online reinforcement learning of flow-matching image models.",
            "",
            *lines,
            "",
            "fastgrpo COMMAND --help explains every key of a command, fastgrpo COMMAND key=value --help those of",
            "another choice, fastgrpo COMMAND --dry-run shows what would be done, fastgrpo --version says the version.",
        ]
    )


def explanation(name: str, command: Explained, overrides: Sequence[str], leaves_out: str = "") -> str:
    """Usage, examples, groups, and every key: its value under the overrides and what it means.

    leaves_out: a group that the command has and nobody uses.
    """
    config, choices = explained_config(name, overrides)
    groups = {group: options for group, options in config_groups(name).items() if not _is_left_out(group, leaves_out)}
    width = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
    lines = [f"usage: fastgrpo {name} [key=value ...]", "", f"{command.summary.capitalize()}."]
    lines += [*textwrap.wrap(command.details, width), "", "examples:"]
    lines += [f"  {example}" for example in command.examples]
    if groups:
        lines += ["", "groups, each chosen by group=option; [the one that is taken]:"]
    indent = " " * (max(map(len, groups), default=0) + 4)
    for group, options in groups.items():
        shown = [f"[{option}]" if choices.get(group) == option else option for option in options]
        lines += textwrap.wrap(f"  {group:<{len(indent) - 4}}  {', '.join(shown)}", width, subsequent_indent=indent)
    of_keys, headings = meanings(name, choices)
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    lines += ["", f"keys, with their values{' under ' + ' '.join(overrides) if overrides else ''}:"]
    shown_of = {group.partition("@")[0]: text for group, text in headings.items() if "@" not in group}
    # the command's own keys before those of groups
    own = {str(key): value for key, value in plain.items() if str(key) not in shown_of}
    own |= {str(key): value for key, value in plain.items() if str(key) in shown_of and str(key) != leaves_out}
    lines += _keys(own, of_keys, shown_of, choices, width)
    return "\n".join(lines)


def _keys(
    plain: Mapping[str, object],
    of_keys: Mapping[str, str],
    headings: Mapping[str, str],
    choices: Mapping[str, str],
    width: int,
) -> list[str]:
    general, lines, said = general_meanings(), [], set[str]()
    for key, value in leaves(plain):
        parts = key.split(".")
        # what an option is stands before the first of its keys
        for depth in range(1, len(parts)):
            group = "/".join(parts[:depth])
            if group in headings and group not in said:
                said.add(group)
                lines += ["", *textwrap.wrap(f"{group}={choices[group]}: {headings[group]}", width)]
        if parts[-1] in _OF_HYDRA or _SIZES in parts[:-1]:
            continue
        lines += _line(key, value, meaning_of(key, of_keys, general), width)
    return lines


def _line(key: str, value: object, meaning: str, width: int) -> list[str]:
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    shown = shown.replace("\n", " ")
    head = f"  {key}={shown if len(shown) <= _LONGEST_VALUE else shown[: _LONGEST_VALUE - 1] + '…'}"
    indent = " " * (2 + _INDENT)
    return [head, *textwrap.wrap(meaning, width, initial_indent=indent, subsequent_indent=indent)]


def _is_left_out(group: str, leaves_out: str) -> bool:
    return bool(leaves_out) and group.split("/")[0] == leaves_out
