"""What a config that was found on disk may import, and whose tokens it may send: what the command line names again.

The command line is the user's word.  A config on disk is data, of whoever wrote it: its paths to code, unless they lead
to fastgrpo's own pieces, are compared with the line before anything is imported.  So is each ``token_env``, before the
token in that variable of the environment is read, since ``endpoints`` beside it say to whom it is sent.
"""

import inspect
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgrpo.own_code.found import OF_A_PROGRAM, find, is_dotted, is_of_a_program, is_ours

TARGET = "_target_"
_TOKEN = "token_env"
# all packages of pieces; other parts of fastgrpo import or run what they are told to
PIECES = tuple(f"fastgrpo.{package}" for package in ("algorithm", "models", "compile", "rewards", "tensorrt"))
# those of a model
MODELS = ("fastgrpo.models",)
# some rewards are functions; these import what their path names
_REWARDS, _OF_PATH = "fastgrpo.rewards.", "fastgrpo.rewards.custom."


def check_named(node: Any, source: Path, line: Mapping[str, Any], pieces: tuple[str, ...], key: str = "") -> None:
    """Refuse what a plain config from the file ``source`` would import, unless it is a piece or the line names it too.

    The same of a variable of the environment whose token it would send.
    ``line`` has the values of the command line by their keys, ``pieces`` the packages that may be imported from.
    """
    unnamed = {}
    for place, path in _code(node, key):
        is_named = line.get(place) == path
        if is_of_a_program(path) and not is_named:
            raise ValueError(f"{source}: {place}={path} {OF_A_PROGRAM}")
        if not is_of_a_program(path) and not is_dotted(path):
            raise ValueError(f"{source}: {place} is {path!r}, which names no class; correct it")
        if is_named or _is_piece(path, pieces, f"{source}: {place}"):
            continue
        if "[" in place:
            # no word of a command line names a part of a list
            whole = place.partition("[")[0]
            raise ValueError(
                f"{source}: {place} is {path!r}, no piece of fastgrpo's; give {whole} again, or correct it"
            )
        unnamed[place] = path
    if unnamed:
        raise ValueError(
            f"{source}: {', '.join(f'{place}={path}' for place, path in unnamed.items())} is no piece of fastgrpo's; "
            f"if it is code of yours, add {_as_words(unnamed)} to the command, so that it may be imported"
        )
    _check_tokens(node, source, line, key)


def _check_tokens(node: Any, source: Path, line: Mapping[str, Any], key: str) -> None:
    unnamed = [token for token in _tokens(node, key) if line.get(token[0]) != token[1]]
    if unnamed:
        raise ValueError(
            f"{source}: {', '.join(f'{place}={name}' for place, name, _ in unnamed)} sends a token of your environment "
            f"to {', '.join(endpoints for *_, endpoints in unnamed)}; if it is meant for that, add "
            f"{_as_words({place: name for place, name, _ in unnamed})} to the command, so that it may be sent"
        )


def check_values(node: Any, key: str, source: Path) -> None:
    """Refuse interpolations in a plain config from the file ``source``: they read what the config does not say."""
    for name, child in _children(node, key):
        check_values(child, name, source)
    if isinstance(node, str) and "${" in node:
        raise ValueError(f"{source}: {key} is the interpolation {node!r}; the config of a run holds values only")


def to_name_again(config: Any) -> str:
    """Of a plain config, what a command line that finds it on disk has to name: words, or nothing."""
    code = {place: path for place, path in _code(config, "") if not is_ours(path)}
    return _as_words(code | {place: name for place, name, _ in _tokens(config, "")})


def _as_words(named: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(f"{place}={value}") for place, value in named.items())


def _code(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and dotted path of all that a plain config has imported."""
    if isinstance(node, Mapping) and TARGET in node:
        target = str(node[TARGET])
        yield f"{key}.{TARGET}".lstrip("."), target
        if target.startswith(_OF_PATH) and "path" in node:
            yield f"{key}.path".lstrip("."), str(node["path"])
    for name, child in _children(node, key):
        yield from _code(child, name)


def _tokens(node: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """Key and name of all variables of the environment whose token a plain config has sent, and to whom."""
    if isinstance(node, Mapping) and node.get(_TOKEN):
        yield f"{key}.{_TOKEN}".lstrip("."), str(node[_TOKEN]), str(node.get("endpoints", "its server"))
    for name, child in _children(node, key):
        yield from _tokens(child, name)


def _children(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield f"{key}.{name}".lstrip("."), child
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield f"{key}[{index}]", child


def _is_piece(path: str, packages: tuple[str, ...], place: str) -> bool:
    """Whether the module that it leads to, of one of the packages, defines it: a class, or a reward's function.

    ValueError, which begins with ``place``, where it is of one of the packages and there is none.
    """
    module = path.rpartition(".")[0]
    if not module.startswith(tuple(f"{package}." for package in packages)):
        return False
    found = find(path, place, "fastgrpo.models.sd3.StableDiffusion3")
    is_one = inspect.isclass(found) or (inspect.isfunction(found) and path.startswith(_REWARDS))
    return is_one and found.__module__ == module
