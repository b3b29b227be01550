"""Dynamics, against other forms of the same formulas, and by what they do to a Gaussian data distribution."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastgrpo.algorithm.dynamics import CPS, ODE, DanceSDE, FlowSDE
from fastgrpo.algorithm.schedule import LinearSchedule, SD3Schedule
from fastgrpo_kernels import GuidedVelocity, PhiloxNoise

SDES = [FlowSDE, DanceSDE, CPS]
X, V = 0.3, -1.1


def mean_of(step):
    return step.c_x * X + step.c_v * V


def log_prob_of(step, x_next, v=V):
    log_prob_B, _ = step.log_prob(torch.tensor([[X]]), torch.tensor([[v]]), torch.tensor([[x_next]]), None)
    return log_prob_B.item()


def final_marginal(dynamics, num_steps, center, spread):
    """Mean and variance at t = 0 for data N(center, spread^2): with the exact velocity, each step is linear in x."""
    grid = LinearSchedule(num_steps)()
    mean, variance = 0.0, 1.0
    for step in range(num_steps):
        t = grid[step]
        slope = (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)
        offset = -center - slope * (1 - t) * center
        c = dynamics(grid, step)
        mean = c.c_x * mean + c.c_v * (slope * mean + offset)
        variance = (c.c_x + c.c_v * slope) ** 2 * variance + c.std**2
    return mean, variance


@pytest.mark.parametrize(("dynamics", "scale"), [(FlowSDE(0.7), None), (DanceSDE(0.3), 0.3)])
@pytest.mark.parametrize("step", range(9))
def test_sdes_are_euler_maruyama_on_the_score(dynamics, scale, step):
    grid = SD3Schedule(10)()
    t, dt = grid[step], grid[step + 1] - grid[step]
    finite_t = grid[1] if step == 0 else t
    s = scale or 0.7 * (t / (1 - finite_t)) ** 0.5
    score = -(X + (1 - t) * V) / t
    c = dynamics(grid, step)
    assert mean_of(c) == pytest.approx(X + (V - 0.5 * s**2 * score) * dt)
    assert c.std == pytest.approx(s * (-dt) ** 0.5)
    assert c.kl_weight == pytest.approx(1 / (2 * s**2))
    assert c.log_prob_kind == "gaussian"
    z = 0.4
    log_density = math.log(math.exp(-0.5 * (z / c.std) ** 2) / (c.std * math.sqrt(2 * math.pi)))
    assert log_prob_of(c, mean_of(c) + z) == pytest.approx(log_density, rel=1e-5)


def test_flow_sde_first_step_by_hand():
    # linear grid of 4 steps: t = 1, dt = -1/4, s^2 = .49 * 1 / (1 - .75) = 1.96
    c = FlowSDE(0.7)(LinearSchedule(4)(), 0)
    assert (c.c_x, c.c_v, c.std) == pytest.approx((1 - 1.96 / 8, -0.25, 0.7))


def test_cps_by_hand():
    # t = .75 -> .5 with a third of a right angle: std = .5 sin 30 = .25, kept = .5 cos 30
    c = CPS(1 / 3)(LinearSchedule(4)(), 1)
    x0, eps = X - 0.75 * V, X + 0.25 * V
    assert mean_of(c) == pytest.approx(0.5 * x0 + 0.5 * 0.8660254 * eps)
    assert c.std == pytest.approx(0.25)
    assert (c.log_prob_kind, c.kl_weight) == ("cps", pytest.approx(8.0))


def test_cps_ratio_is_the_difference_of_squared_distances():
    c = CPS(0.8)(LinearSchedule(4)(), 1)
    x_next = mean_of(c) + 0.05
    moved = V + 0.02 / c.c_v
    assert log_prob_of(c, x_next, moved) - log_prob_of(c, x_next) == pytest.approx(0.0025 - 0.0009, abs=1e-7)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("step", range(10))
def test_without_noise_every_sde_is_the_ode(sde, step):
    grid = SD3Schedule(10)()
    ode, limit = ODE()(grid, step), sde(1e-5)(grid, step)
    assert (limit.c_x, limit.c_v) == pytest.approx((ode.c_x, ode.c_v), abs=1e-8)
    assert limit.std < 1e-4


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(0.7), DanceSDE(0.3), DanceSDE(1.0)])
def test_more_steps_bring_the_marginal_to_the_data(dynamics):
    center, spread = 0.8, 0.5
    errors = []
    for num_steps in (20, 200, 2000):
        mean, variance = final_marginal(dynamics, num_steps, center, spread)
        errors.append(abs(mean - center) + abs(variance - spread**2))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2e-3


@pytest.mark.parametrize("noise_level", [0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_exactly(noise_level):
    # with one data point x0hat and epshat are exact, and any number of steps ends on it
    assert final_marginal(CPS(noise_level), 3, 0.8, 0.0) == pytest.approx((0.8, 0.0), abs=1e-12)
    c, t_next = CPS(noise_level)(LinearSchedule(4)(), 1), 0.5
    x0, eps = 2.0, 3.0
    t = 0.75
    kept = c.c_x * ((1 - t) * x0 + t * eps) + c.c_v * (eps - x0) - (1 - t_next) * x0
    assert (kept / eps) ** 2 + c.std**2 == pytest.approx(t_next**2)


@pytest.mark.parametrize("dynamics", [ODE(), CPS(0.8)])
def test_a_deterministic_step_has_no_log_prob(dynamics):
    c = dynamics((1.0, 0.5, 0.0), 1)
    assert (c.c_x, c.c_v) == pytest.approx((1.0, -0.5))
    assert (c.std, c.kl_weight) == (0, 0)
    with pytest.raises(ValueError, match="no likelihood to train; use algorithm/dynamics=flow_sde"):
        c.step(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))


def test_a_step_and_its_replay_compile_into_one_graph():
    dynamics = CPS(0.8)
    grid, ids = SD3Schedule(10)(), torch.arange(4)
    x, v, v_uncond = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))

    def step(x, v, v_uncond):
        velocity, coefficients = GuidedVelocity(v, v_uncond, 4.5), dynamics(grid, 1)
        x_next, log_prob_B = coefficients.step(x, velocity, PhiloxNoise(3, 1001, ids, ids))
        again_B, kl_B = coefficients.log_prob(x, velocity, x_next, GuidedVelocity(v_uncond, v, 4.5))
        return ODE()(grid, 2).mean(x_next, velocity), log_prob_B, again_B, kl_B

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, v, v_uncond)
    for result, expected in zip(compiled, step(x, v, v_uncond), strict=True):
        assert torch.equal(result, expected)
    assert torch.equal(compiled[1], compiled[2])


def test_coefficients_of_fake_tensors_are_not_kept_for_real_ones() -> None:
    coefficients, shape = FlowSDE(0.7)(SD3Schedule(4)(), 1), (2, 4, 3, 3)
    for _ in range(2):
        with FakeTensorMode():
            fake = torch.zeros(shape)
            assert isinstance(coefficients.mean(fake, fake), FakeTensor)
        real = torch.ones(shape)
        assert torch.allclose(coefficients.mean(real, real), torch.tensor(coefficients.c_x + coefficients.c_v))
