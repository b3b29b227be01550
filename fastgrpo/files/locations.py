"""A path as a config writes it: ``~`` is the home directory, ``pkg://package/inside`` lies in an installed package."""

import os
from importlib.util import find_spec
from pathlib import Path


def resolve_path(path: str) -> str:
    """Where the path is on this machine; ValueError for a package that is not installed."""
    if not path.startswith("pkg://"):
        # a home that is not there leaves the path as it is
        return os.path.expanduser(path)
    package, _, inside = path.removeprefix("pkg://").partition("/")
    top, *below = package.split(".")
    # a config that was found on disk may name any package: none is imported for its files
    spec = find_spec(top) if top else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: there is no package {package!r}; install it, or correct it")
    places = [Path(place, *below) for place in spec.submodule_search_locations]
    return str(next((place for place in places if place.is_dir()), places[0]) / inside)
