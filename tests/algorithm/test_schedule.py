from itertools import pairwise

import pytest

from fastgrpo.algorithm.schedule import FewSteps, Flux2Schedule, FluxSchedule, GivenTimes, LinearSchedule, SD3Schedule
from fastgrpo.config import load_config
from fastgrpo.pieces import build


def test_sd3_grid_is_the_published_one():
    published = (1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0)
    assert SD3Schedule(10)() == pytest.approx(published, abs=1e-5)


@pytest.mark.parametrize("num_steps", [2, 10, 40])
def test_sd3_grid_is_that_of_diffusers(num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    assert SD3Schedule(num_steps)() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.1, 3.0, 3.157])
def test_a_grid_begins_at_exactly_one(shift):
    # 1 + (.1 - 1) is not .1, and a time above 1 has no noise scale
    assert LinearSchedule(4, shift)()[0] == SD3Schedule(4, shift)()[0] == 1.0


def test_linear_grid_with_and_without_a_shift():
    assert LinearSchedule(4)() == pytest.approx((1, 0.75, 0.5, 0.25, 0))
    # 3 u / (1 + 2 u) at u = 3/4, 1/2, 1/4
    assert LinearSchedule(4, shift=3.0)() == pytest.approx((1, 0.9, 0.75, 0.5, 0))


@pytest.mark.parametrize("num_steps", [4, 28])
@pytest.mark.parametrize(("resolution", "num_tokens"), [(256, 256), (512, 1024), (1024, 4096), ([512, 768], 32 * 48)])
def test_flux_grid_is_that_of_diffusers(num_steps, resolution, num_tokens):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = calculate_shift(num_tokens)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
    assert FluxSchedule(num_steps, resolution)() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_flux_shifts_more_at_a_larger_resolution():
    # exp(.5) and exp(1.15) at u = 1/2
    assert FluxSchedule(2, 256)()[1] == pytest.approx(0.6224593)
    assert FluxSchedule(2, 1024)()[1] == pytest.approx(0.7595109)


@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("resolution", [256, 512, 1328])
def test_qwen_images_grid_is_that_of_diffusers(num_steps, resolution):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        # of one step there is nothing to stretch, and diffusers makes NaN of it
        shift_terminal=0.02 if num_steps > 1 else None,
    )
    config = scheduler.config
    lengths = (config.base_image_seq_len, config.max_image_seq_len)
    mu = calculate_shift((resolution // 16) ** 2, *lengths, config.base_shift, config.max_shift)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
    overrides = ["algorithm/schedule=qwen_image", f"algorithm.schedule.num_steps={num_steps}"]
    schedule = build(load_config("train", [*overrides, f"model.resolution={resolution}"]).algorithm.schedule)
    assert schedule() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert num_steps == 1 or schedule()[-2] == pytest.approx(0.02)


@pytest.mark.parametrize("num_steps", [4, 50])
@pytest.mark.parametrize("resolution", [512, 1024, 1536])
def test_flux_2s_grid_is_that_of_diffusers(num_steps, resolution):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = compute_empirical_mu((resolution // 16) ** 2, num_steps)
    scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
    assert Flux2Schedule(num_steps, resolution)() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_z_images_grid_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

    schedule = build(load_config("train", ["algorithm/schedule=z_image"]).algorithm.schedule)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=schedule.shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(schedule.num_steps))
    assert schedule() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_given_times_are_taken_as_they_are_and_have_no_other_number_of_steps():
    schedule = GivenTimes((1, 0.9, 0.5, 0))
    assert schedule() == schedule.evaluated(3) == (1.0, 0.9, 0.5, 0.0)
    # between .9 and .5: .7 / .3
    assert schedule.shift == pytest.approx(7 / 3)
    assert GivenTimes((1, 0.75, 0)).shift == pytest.approx(3)
    with pytest.raises(
        ValueError, match=r"times are 3 steps, and an evaluation of 10 was asked for; use evaluate\.num_s"
    ):
        schedule.evaluated(10)


@pytest.mark.parametrize("times", [(1,), (0.9, 0), (1, 0.5), (1, 0.5, 0.5, 0), (1, 0.2, 0.5, 0), (1, float("nan"), 0)])
def test_given_times_must_fall_from_one_to_zero(times):
    with pytest.raises(
        ValueError, match=r"^algorithm\.schedule\.times must fall from 1 to 0, as in \[1,\.9,\.5,0\], got"
    ):
        GivenTimes(times)


@pytest.mark.parametrize("times", ["1,0", 4, ("a", 0)])
def test_given_times_are_numbers(times):
    with pytest.raises(ValueError, match=r"^algorithm\.schedule\.times is a list of numbers"):
        GivenTimes(times)


@pytest.mark.parametrize("schedule", [LinearSchedule, SD3Schedule])
def test_grids_fall_from_one_to_zero(schedule):
    for num_steps in (1, 2, 7):
        grid = schedule(num_steps)()
        assert len(grid) == num_steps + 1
        assert (grid[0], grid[-1]) == (1.0, 0.0)
        assert all(t > t_next for t, t_next in pairwise(grid))


def test_few_steps_are_all_of_use_and_are_judged_on_the_grid_of_sd3():
    # 3 u / (1 + 2 u) at u = 3/4, 1/2, 1/4
    assert FewSteps(4)() == pytest.approx((1, 0.9, 0.75, 0.5, 0))
    assert FewSteps(4).evaluated(10) == SD3Schedule(10)()
    assert FewSteps(4, shift=2.0).evaluated(7) == SD3Schedule(7, 2.0)()


@pytest.mark.parametrize("schedule", [LinearSchedule(4, 2.0), SD3Schedule(4, 2.0), FluxSchedule(4, 512)])
def test_other_schedules_are_judged_on_their_own_grid(schedule):
    assert schedule.evaluated(4) == schedule()
    assert len(schedule.evaluated(9)) == 10
