"""What each key of a config means: the comment above it in the file that it comes from, else ``configs/meanings.yaml``.

A file's first comment says what the file is.  Each other one belongs to the key below it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from fastgrpo.composing import config_files

# groups whose keys are of the whole config
_OF_ALL = ("experiment", "hardware")
_COMMENT, _KEY = re.compile(r"\s*# ?(.*)"), re.compile(r"( *)([\w.-]+):(?: |$)")


@dataclass
class Commented:
    """What a YAML file says about itself and about its keys, and which files of its directory it builds on."""

    heading: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    below: list[str] = field(default_factory=list)


def meanings(name: str, choices: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """By key what it means, and by group, as ``algorithm/noise``, what the chosen option is.

    ``choices`` are Hydra's: the option of each group, as ``{"reward/terms@reward.watch.jpeg": "jpeg"}``.
    """
    top = config_files()
    of_keys = _with_below(top, f"{name}").keys
    headings = {}
    for group, option in choices.items():
        where, _, package = group.partition("@")
        package = package.removeprefix("_global_.") or where.replace("/", ".")
        found = _with_below(top, f"{where}/{option}")
        headings[group] = found.heading
        prefix = "" if where in _OF_ALL else f"{package}."
        of_keys |= {f"{prefix}{key}": text for key, text in found.keys.items()}
    return of_keys, headings


def meaning_of(key: str, of_keys: Mapping[str, str], general: Mapping[str, str]) -> str:
    """Of one key: its own comment, else what ``general`` says of the longest end of its name; empty if nothing does."""
    if text := of_keys.get(key):
        return text
    parts = key.split(".")
    ends = [".".join(parts[first:]) for first in range(len(parts))]
    # or of all keys of a mapping
    ends += [".".join([*parts[first:-1], "*"]) for first in range(len(parts) - 1)]
    return next((general[end] for end in ends if end in general), "")


def general_meanings() -> dict[str, str]:
    """Those of keys that many files have, by the end of their name."""
    loaded = OmegaConf.to_container(OmegaConf.load(config_files() / "meanings.yaml"))
    assert isinstance(loaded, dict)
    return {str(key): " ".join(str(text).split()) for key, text in loaded.items()}


def read_comments(text: str) -> Commented:
    """The comments of a YAML file."""
    found = Commented()
    above: list[str] = []
    path: list[tuple[int, str]] = []
    in_defaults = False
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            said = comment[1].strip()
            if said.startswith("@package"):
                continue
            above.append(said)
            if not found.heading and not path:
                found.heading, above = said, []
            continue
        if in_defaults and (entry := re.fullmatch(r" *- (\w[\w/-]*)", line)) and entry[1] != "_self_":
            found.below.append(entry[1])
        if key := _KEY.match(line):
            indent, word = len(key[1]), key[2]
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, word)]
            in_defaults = word == "defaults"
            if word in ("defaults", "_target_"):
                # the heading may have more lines than one
                found.heading = " ".join([found.heading, *above]) if not found.keys else found.heading
            elif above:
                found.keys[".".join(name for _, name in path)] = " ".join(above)
        above = []
    return found


def _with_below(top: Path, where: str) -> Commented:
    """Of a file, and of those that it builds on as far as it does not speak of a key itself."""
    path = top / f"{where}.yaml"
    if not path.is_file():
        return Commented()
    found = read_comments(path.read_text(encoding="utf-8"))
    for other in found.below:
        place = other.lstrip("/") if other.startswith("/") else str(Path(where).parent / other)
        below = _with_below(top, place)
        found.keys = below.keys | found.keys
    return found
