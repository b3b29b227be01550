"""What a dotted path names: ``my_rewards.redness`` in the working directory, or anywhere Python imports from.

Every mistake, also one in the user's file, becomes one ``ValueError`` that begins with the setting, ``key=path``.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from fastgrpo.own_code.raised_at import raised_at

_OURS = ("fastgrpo", "fastgrpo_kernels")
_MAX_NAMES = 5
OF_A_PROGRAM = (
    "is a function of the program that gave it, not of a module; give it from Python, as reward=FUNCTION of "
    "fastgrpo.train, evaluate, sample or run.resume, or put it into a file of its own and name that"
)


def find(path: str, key: str, example: str) -> Any:
    """What ``path`` leads to in its module; ``key`` is the setting that it stands in, ``example`` a path like it."""
    module_name, _, name = path.rpartition(".")
    if is_of_a_program(path):
        raise ValueError(f"{key}={path} {OF_A_PROGRAM}")
    if not is_dotted(path):
        raise ValueError(f"{key} is module.name, as in {example}, got {path!r}")
    place = f"{key}={path}"
    if not is_ours(path):
        _put_working_directory_first()
        _refuse_two_of_a_name(module_name.partition(".")[0], place)
    module = _import(module_name, place)
    if not hasattr(module, name):
        raise ValueError(f"{place}: {_file_of(module)} has no {name!r}{_others(module)}")
    return getattr(module, name)


def is_dotted(path: str) -> bool:
    """Whether it can be the path of something in a module."""
    return "." in path and all(part.isidentifier() for part in path.split("."))


def is_of_a_program(path: str) -> bool:
    """Whether it names what only the program has that made it: in a script, a notebook, a function, or a lambda."""
    return path.startswith("__main__.") or "<" in path


def is_ours(path: str) -> bool:
    """Whether it leads into fastgrpo."""
    return path.partition(".")[0] in _OURS


def _put_working_directory_first() -> None:
    # the console script does not put it on the path
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _refuse_two_of_a_name(name: str, place: str) -> None:
    """A module of the working directory that has an installed one's name would take its place everywhere, or it its."""
    own = PathFinder.find_spec(name, [os.getcwd()])
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()]
    other = PathFinder.find_spec(name, elsewhere)
    # a directory without __init__.py steps back by itself
    if own is None or other is None or other.origin is None or _is_one_file(own, other):
        return
    where = own.origin or os.path.join(os.getcwd(), name)
    raise ValueError(f"{place}: {where} has the name of {other.origin}, which other code means by it; rename yours")


def _is_one_file(own: ModuleSpec, other: ModuleSpec) -> bool:
    return own.origin is not None and other.origin is not None and os.path.samefile(own.origin, other.origin)


def _import(module_name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            remedy = f"put {module_name.replace('.', '/')}.py into {os.getcwd()}"
            raise ValueError(
                f"{place}: there is no module {module_name!r}; {'correct it' if is_ours(module_name) else remedy}"
            ) from error
        raise ValueError(
            f"{place}: {raised_at(error) or module_name} imports {error.name!r}, which is not installed; install it"
        ) from error
    # a file that calls sys.exit or parses the command line ends so
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        where = raised_at(error) or module_name
        raise ValueError(f"{place}: {where}: {type(error).__name__}: {said}; mend the file") from error


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"the module {module.__name__}"


def _others(module: ModuleType) -> str:
    """The functions and classes that the module defines, as the remedy for a name that it does not."""
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    names = ", ".join(f"{module.__name__}.{name}" for name in own[:_MAX_NAMES])
    return f"; it defines {names}" if own else "; define it there, or correct the path"
