"""Solvers against solutions written down, against Euler's steps in a loop, and against each other."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastgrpo.algorithm.dynamics import ODE
from fastgrpo.algorithm.schedule import SD3Schedule
from fastgrpo.algorithm.solver import AdamsBashforth, CachedGuidance, Euler, visited
from fastgrpo_kernels import GuidedVelocity

GRID = SD3Schedule(10)()
UNEVEN = (1.0, 0.9, 0.6, 0.5, 0.1, 0.0)


def start() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def swirl(x: Tensor, t: float, _: Tensor | None) -> Tensor:
    return torch.sin(3 * x) + t * x


def test_a_stride_counts_from_the_end_and_keeps_where_the_steps_begin() -> None:
    grid = tuple(range(100, 89, -1))
    assert visited(grid, range(0, 10), 1) == grid
    assert visited(grid, range(0, 10), 2) == (100, 98, 96, 94, 92, 90)
    assert visited(grid, range(3, 10), 2) == (97, 96, 94, 92, 90)
    assert visited(grid, range(0, 10), 4) == (100, 98, 94, 90)
    assert visited(grid, range(2, 4), 8) == (98, 96)
    assert visited(grid, range(10, 10), 2) == (90,)


def test_euler_takes_the_steps_of_the_ode_bit_for_bit() -> None:
    x = start()
    for step in range(2, 9):
        x = ODE()(GRID, step).mean(x, swirl(x, GRID[step], None))
    assert torch.equal(Euler()(start(), GRID, range(2, 9), swirl), x)


@pytest.mark.parametrize("solver", [Euler(), Euler(stride=2), AdamsBashforth(), CachedGuidance()], ids=repr)
def test_no_step_leads_nowhere(solver) -> None:
    def never(x: Tensor, t: float, unconditional: Tensor | None) -> Tensor:
        raise AssertionError("there is no step to take")

    assert torch.equal(solver(start(), GRID, range(10, 10), never), start())


def test_a_velocity_used_twice_is_one_step_of_twice_the_size() -> None:
    x = start()
    for step in range(0, 10, 2):
        v = swirl(x, GRID[step], None)
        for half in (step, step + 1):
            x = ODE()(GRID, half).mean(x, v)
    torch.testing.assert_close(Euler(stride=2)(start(), GRID, range(10), swirl), x, rtol=1e-6, atol=1e-6)


def test_adams_bashforth_is_exact_where_the_velocity_is_linear_in_time_but_for_its_first_step() -> None:
    def linear(x: Tensor, t: float, _: Tensor | None) -> Tensor:
        return torch.full_like(x, 2.0 + 6.0 * t)

    # by hand: Euler from 1 to .9 with v = 8, then the integral of 2 + 6 t from .9 to 0, which is -(1.8 + 2.43)
    expected = start() - 0.8 - 4.23
    torch.testing.assert_close(AdamsBashforth(stride=1)(start(), UNEVEN, range(5), linear), expected)


def test_adams_bashforth_extrapolates_by_the_ratio_of_uneven_steps() -> None:
    seen = iter([1.0, 2.0, -1.0])

    def scripted(x: Tensor, t: float, _: Tensor | None) -> Tensor:
        return torch.full_like(x, next(seen))

    # h: -.1, -.3, -.1; x: 0 - .1 * 1, then v = 2 + 3/2 * (2 - 1) = 3.5, then v = -1 + 1/6 * (-1 - 2) = -1.5
    x = AdamsBashforth(stride=1)(torch.zeros(1, 1, 1, 1), UNEVEN, range(3), scripted)
    assert x.item() == pytest.approx(-0.1 - 0.3 * 3.5 + 0.1 * 1.5, abs=1e-6)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (AdamsBashforth(stride=1), 2)], ids=["euler", "adams"])
def test_the_error_falls_with_the_order_of_the_solver(solver, order: int) -> None:
    def error(num_steps: int) -> float:
        grid = [1 - i / num_steps for i in range(num_steps + 1)]
        x = solver(torch.ones(1, 1), grid, range(num_steps), lambda x, t, _: x * t)
        # x(0) = x(1) exp(-1/2)
        return abs(x.item() - math.exp(-0.5))

    for coarse, fine in pairwise([error(n) for n in (20, 40, 80)]):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_adams_bashforth_in_half_the_steps_is_nearer_the_solution_than_euler_is() -> None:
    def velocity(x: Tensor, t: float, _: Tensor | None) -> Tensor:
        # of Gaussian data with deviation 1/2: E[eps - x_0 | x_t = x]
        return x * (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4)

    solution = Euler()(start(), torch.linspace(1, 0, 2001).tolist(), range(2000), velocity)

    def error(solver) -> float:
        return (solver(start(), GRID, range(10), velocity) - solution).square().mean().sqrt().item()

    assert error(AdamsBashforth(stride=1)) < error(Euler()) / 2
    assert error(AdamsBashforth(stride=2)) < error(Euler(stride=2)) / 2


class Guided:
    """Two branches of which the second is computed only where it is not given; counts how often."""

    def __init__(self, difference) -> None:
        self.difference = difference
        self.computed: list[float] = []

    def __call__(self, x: Tensor, t: float, unconditional: Tensor | None) -> GuidedVelocity:
        conditional = swirl(x, t, None)
        if unconditional is None:
            self.computed.append(t)
            unconditional = conditional - self.difference(t)
        return GuidedVelocity(conditional, unconditional, 4.5)


@pytest.mark.parametrize(("every", "places"), [(2, (3, 5, 7, 9)), (3, (3, 6, 9))])
def test_the_unconditional_branch_is_computed_on_some_steps_only(every: int, places: tuple[int, ...]) -> None:
    velocity = Guided(lambda t: 0.3)
    CachedGuidance(every=every)(start(), GRID, range(3, 10), velocity)
    assert velocity.computed == [GRID[place] for place in places]


def test_cached_guidance_is_exact_where_the_branches_differ_by_a_constant() -> None:
    cached = CachedGuidance()(start(), GRID, range(10), Guided(lambda t: 0.3))
    torch.testing.assert_close(cached, Euler()(start(), GRID, range(10), Guided(lambda t: 0.3)), rtol=1e-5, atol=1e-5)


def test_cached_guidance_keeps_the_difference_of_the_step_before() -> None:
    cached = CachedGuidance()(start(), GRID, range(4), Guided(lambda t: t))
    held = {GRID[0]: GRID[0], GRID[1]: GRID[0], GRID[2]: GRID[2], GRID[3]: GRID[2]}
    expected = Euler()(start(), GRID, range(4), Guided(lambda t: held[t]))
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cached, Euler()(start(), GRID, range(4), Guided(lambda t: t)), atol=1e-2)


def test_what_cannot_be_solved_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"solver\.stride must be at least 1, got 0; solver=euler is exact"):
        AdamsBashforth(stride=0)
    with pytest.raises(ValueError, match=r"solver\.every must be at least 2, got 1"):
        CachedGuidance(every=1)
    with pytest.raises(ValueError, match=r"guidance_scale is 1.*use solver=adams_bashforth"):
        CachedGuidance()(start(), GRID, range(3), swirl)
