"""The search of a command: read from its config, shown while it runs, and what is said of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from omegaconf import DictConfig

from fastgrpo.algorithm.algorithm import Algorithm
from fastgrpo.algorithm.image_search import NoSearch, planned
from fastgrpo.algorithm.making import Search
from fastgrpo.image_search import ImageSearch
from fastgrpo.parts import read_search
from fastgrpo.records.search_bar import search_bar
from fastgrpo.rewards.weighted_sum import Rewards
from fastgrpo.sampler import Sampler
from fastgrpo.search_portion import Cost


def wanted_search(config: DictConfig, num_steps: int) -> Search | None:
    """The group ``search`` of a config, None for no search.

    ValueError for a budget that cannot be enough, or for learned noise beside a search.
    """
    search = read_search(config)
    if isinstance(search, NoSearch):
        return None
    if config.proposal not in ("auto", "none"):
        raise ValueError(f"a search begins with plain noise, got proposal={config.proposal}; use proposal=none")
    # guidance, which is known with the model, may take twice as much
    planned(search, budget=config.budget, num_steps=num_steps)
    return search


@contextmanager
def begun_search(
    search: Search, config: DictConfig, sampler: Sampler, rewards: Rewards, algorithm: Algorithm, num_images: int
) -> Iterator[ImageSearch]:
    """The search on its model, with a bar of ``num_images`` while it runs."""
    begun = ImageSearch(
        sampler=sampler,
        rewards=rewards,
        search=search,
        budget=config.budget,
        estimate_grid=algorithm.estimate_grid,
    )
    with search_bar(num_images, begun.plan.velocities * begun.cost_of_velocity) as watch:
        yield replace(begun, watch=watch)


def account(search: ImageSearch, cost: Cost, num_images: int) -> dict[str, Any]:
    """What was searched for, by which method and at what cost an image."""
    method: Any = search.search
    return {
        "method": type(method).__name__,
        "settings": asdict(method) if is_dataclass(type(method)) else {},
        "maximized": dict(search.rewards.weights),
        "budget": search.budget,
        "candidates": search.plan.candidates,
        "evaluations_per_image": cost.evaluations / num_images,
        "scored_per_image": cost.scored / num_images,
    }


def in_words(account: dict[str, Any]) -> str:
    """The same as a line."""
    total = " + ".join(f"{weight:g} * {name}" for name, weight in account["maximized"].items())
    return (
        f"each the best of {account['candidates']} that {account['method']} found by {total}: "
        f"{account['evaluations_per_image']:g} network evaluations an image of budget={account['budget']}, "
        f"{account['scored_per_image']:g} images scored"
    )
