"""Nested dicts, lists, tuples, tensors and scalars as JSON and one flat dict of tensors: no pickle.

A tensor is named by its path; what JSON cannot say is marked with a dollar sign:

    {"state": {0: {"step": <tensor>}}, "betas": (0.9, 0.99)}
    <-> {"state": {"$items": [[0, {"step": {"$tensor": "state/0/step"}}]]}, "betas": {"$tuple": [0.9, 0.99]}}
        and the tensors {"state/0/step": <tensor>}

It reads back as what it was, integer keys and tuples included.
"""

from typing import Any

from torch import Tensor


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON, tensors by path).  ValueError for a leaf that is neither a tensor nor a JSON scalar."""
    tensors: dict[str, Tensor] = {}
    return _flatten(tree, "", tensors), tensors


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that ``flatten`` took apart, types of containers and keys included."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(unflatten(item, tensors) for item in items)
        case {"$items": items}:
            return {key: unflatten(item, tensors) for key, item in items}
    return {key: unflatten(item, tensors) for key, item in value.items()}


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        items = [[key, _flatten(item, f"{path}/{key}".lstrip("/"), tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$items": items}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{path}/{index}".lstrip("/"), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}; only tensors, numbers, strings and None can be saved")
