"""What is said of a line that makes no config: the mistake, and what was probably meant."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastgrpo.composing import compose_config, config_files, config_groups


def in_words(error: Exception, name: str) -> str:
    """What Hydra says of the line of the command ``name``, in one line, with the nearest of what is known."""
    text = " ".join(str(error).split()).split(" Config search path:")[0].split(" See https://hydra.cc")[0]
    if unknown := re.match(r"Could not override '([^']*)'", text):
        return unknown_key(unknown[1], name)
    if missing := re.match(r".*Could not find '(.*)/([^']*)' Available options", text):
        return _unknown_option(missing[1], missing[2], config_groups(name))
    is_grammar = re.search("no viable alternative|mismatched input|extraneous input|token recognition error", text)
    return f"{text}; give a text with such characters in quotes, as output=\"'[a] b'\"" if is_grammar else text


def unknown_key(key: str, name: str) -> str:
    """Says that a key is unknown, and which known ones are near in spelling or end alike."""
    known = _known(name)
    if key in known:
        return (
            f"{key} is a key of the default choice of its group, not of the one you took; drop it or take the default"
        )
    parent, _, last = key.rpartition(".")
    if having := [f"{parent}={option}" for option in _options_with(last, parent.replace(".", "/"), name)]:
        return f"unknown key {key}; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    if near := _near(key, known):
        return f"unknown key {key}; did you mean {', '.join(near)}?"
    siblings = [other.rpartition(".")[2] for other in known if parent and other.rpartition(".")[0] == parent]
    return f"unknown key {key}; " + (
        f"{parent} has {', '.join(siblings)}" if siblings else f"see fastgrpo {name} --help"
    )


def refuse_groups_of_others(keys: Iterable[str], name: str) -> None:
    """ValueError for a group that other commands choose from; what Hydra says of it depends on its value."""
    top, own = config_files(), config_groups(name)
    for key in keys:
        if key in own or not (top / key).is_dir():
            continue
        if others := [other for other in _commands() if key in config_groups(other)]:
            have = "the command {} has" if len(others) == 1 else "the commands {} have"
            raise ValueError(f"unknown key {key}; {have.format(' and '.join(others))} it")


def no_setting(word: str, name: str, flags: Sequence[str]) -> str:
    """Says that a word is neither a setting nor one of ``flags``, and how it may have been meant."""
    key, equals, value = word.lstrip("-").partition("=")
    said = f"{word!r} is not a setting; "
    if word.startswith("-") and not equals and (near := get_close_matches(word.replace("_", "-"), flags, n=1)):
        return f"{said}did you mean {near[0]}?"
    known = _known(name)
    if key in known:
        is_switch = isinstance(OmegaConf.select(compose_config(name), key), bool)
        return f"{said}write {key}={value or ('true' if is_switch else 'VALUE')}, see fastgrpo {name} --help"
    # a directory or a file, where the command takes one
    takes = next((place for place in ("run", "in") if place in known), None)
    if takes is not None and not word.startswith("-") and ("/" in word or Path(word).exists()):
        return f"{said}write {takes}={word}"
    if near := _near(key, known):
        return f"{said}did you mean {near[0]}={value or 'VALUE'}? See fastgrpo {name} --help"
    return f"{said}a setting is KEY=VALUE, and fastgrpo {name} --help has the keys"


def keys_of(config: Any, prefix: str = "") -> list[str]:
    """All keys of a config, as ``train.iterations``, and those of what they are in."""
    if not OmegaConf.is_dict(config):
        return [prefix]
    children = [keys_of(config._get_node(key), f"{prefix}.{key}" if prefix else str(key)) for key in config]
    return [key for child in children for key in child] + ([prefix] if prefix else [])


def _commands() -> list[str]:
    """Those that have a config."""
    return sorted(path.stem for path in config_files().glob("*.yaml") if "defaults" in OmegaConf.load(path))


def _known(name: str) -> list[str]:
    return [*keys_of(compose_config(name)), *config_groups(name)]


def _near(key: str, known: Collection[str]) -> list[str]:
    """At most three keys that end like this one or are spelled like it."""
    parent, _, last = key.rpartition(".")
    alike = [other for other in known if re.split(r"[./]", other)[-1] == re.split(r"[./]", key)[-1]]
    siblings = {other.rpartition(".")[2]: other for other in known if parent and other.rpartition(".")[0] == parent}
    near = alike + [siblings[word] for word in get_close_matches(last, siblings, n=3, cutoff=0.6)]
    # a key that is unlike its siblings may be meant for elsewhere, but is not its own group
    elsewhere = [other for other in known if other != parent and other not in siblings.values()]
    near += get_close_matches(key, elsewhere, n=3, cutoff=0.6)
    return list(dict.fromkeys(near))[:3]


def _unknown_option(group: str, option: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Says that a group has no such option, and which it has."""
    options = groups.get(group, [])
    near = get_close_matches(option, options, n=2)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{group} has no option {option!r}; {meant}{'It' if near else 'it'} has {', '.join(options)}"


def _options_with(key: str, group: str, name: str) -> list[str]:
    """The options of a group whose files have a key."""
    options = config_groups(name).get(group, [])
    return [option for option in options if key in OmegaConf.load(config_files() / group / f"{option}.yaml")]
