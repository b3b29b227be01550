"""``pytest -p benchmarks.first_contact.one_of_each``: of each test the fewest cases that have each parameter once.

A kernel's test runs over all combinations of sizes, dtypes and options; a mistake in one of them mostly shows whatever
the others are.  Cases without ids, and tests of one case, are kept.
"""

from collections import defaultdict

import pytest


# after -m has taken its share: a case that is not run covers nothing
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_test[item.nodeid.partition("[")[0]].append(item)
    kept = {item for cases in by_test.values() for item in _covering(cases)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _covering(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Greedily, the case with most that is new; of equals the first, so that every process keeps the same."""
    values = {case: _parameters(case) for case in cases}
    missing = set().union(*values.values())
    kept: list[pytest.Item] = []
    while missing:
        kept.append(max(cases, key=lambda case: len(missing & values[case])))
        missing -= values[kept[-1]]
    return kept or cases[:1]


def _parameters(case: pytest.Item) -> set[tuple[int, str]]:
    """The parts of its id, which is written with a dash between parameters."""
    return set(enumerate(case.nodeid.partition("[")[2].rstrip("]").split("-")))
