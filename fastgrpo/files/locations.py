"""A path as a config writes it: ``~`` is the home directory, ``pkg://package/inside`` lies in an installed package."""

import os
from importlib.resources import files


def resolve_path(path: str) -> str:
    """Where the path is on this machine."""
    if not path.startswith("pkg://"):
        # a home that is not there leaves the path as it is
        return os.path.expanduser(path)
    package, _, inside = path.removeprefix("pkg://").partition("/")
    return str(files(package) / inside)
