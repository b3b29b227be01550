"""A path as a config writes it: ``~`` is the home directory, ``pkg://package/inside`` lies in an installed package."""

from importlib.resources import files
from pathlib import Path


def resolve_path(path: str) -> str:
    """Where the path is on this machine."""
    if not path.startswith("pkg://"):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(files(package) / inside)
