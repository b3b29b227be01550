"""Index arithmetic beyond 2^31 elements: kernels are launched on a few columns of three rows of 2^30.

Memory that nothing touches costs nothing on a CPU; a GPU must have it.
"""

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import philox_normal
from fastgrpo_kernels.add_noise import _add_noise_kernel
from fastgrpo_kernels.matching_loss import _matching_loss_kernel
from fastgrpo_kernels.matching_loss_backward import _matching_loss_backward_kernel
from fastgrpo_kernels.ode_step import _ode_step_kernel
from fastgrpo_kernels.philox import _philox_normal_kernel
from fastgrpo_kernels.refit_moments import _refit_moments_kernel
from fastgrpo_kernels.sample_candidates import _sample_candidates_kernel
from fastgrpo_kernels.sde_log_prob import _sde_log_prob_kernel
from fastgrpo_kernels.sde_log_prob_backward import _sde_log_prob_backward_kernel
from fastgrpo_kernels.sde_step import _sde_step_kernel

ROWS, D, BLOCK = 3, 2**30, 16


@pytest.fixture(autouse=True)
def _enough_memory(kernel_device: str) -> None:
    if kernel_device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")


def huge(device: str, *values: float) -> Tensor:
    """Three rows whose first block has one value each; the rest is not touched."""
    rows = torch.empty(ROWS, D, dtype=torch.float16, device=device)
    for row, value in zip(rows, values, strict=False):
        row[:BLOCK] = value
    return rows


def block_of(rows: Tensor) -> list[list[float]]:
    return rows.view(ROWS, D)[:, :BLOCK].tolist()


def rows_of(*values: float) -> list[list[float]]:
    return [[value] * BLOCK for value in values]


def test_ode_step(kernel_device: str) -> None:
    x, v, x_next = huge(kernel_device, 1, 2, 3), huge(kernel_device, 2, 4, 8), huge(kernel_device)
    one_B = torch.ones(ROWS, device=kernel_device)
    _ode_step_kernel[(ROWS, 1)](x_next, x, v, v, one_B, one_B, 1.0, D, GUIDED=False, BLOCK=BLOCK)
    assert block_of(x_next) == rows_of(3, 6, 11)


def test_sde_step(kernel_device: str) -> None:
    x, v, x_next = huge(kernel_device, 2, 2, 2), huge(kernel_device, 1, 2, 3), huge(kernel_device)
    one_B = torch.ones(ROWS, device=kernel_device)
    ids_B, partial = torch.arange(ROWS, device=kernel_device), one_B.double()
    _sde_step_kernel[(ROWS, 1)](
        x_next, partial, partial, x, v, v, x, ids_B, ids_B, one_B, one_B, one_B, 1.0, 0, 0, D,
        GUIDED=False, DRAWN=False, RETURN_MEAN=False, BLOCK=BLOCK,
    )  # fmt: skip
    # 2 + v + 1 * noise, the noise being x
    assert block_of(x_next) == rows_of(5, 6, 7)


def test_sde_log_prob(kernel_device: str) -> None:
    x, v, x_next = (huge(kernel_device, *values) for values in ((2, 2, 2), (1, 1, 1), (3, 4, 6)))
    one_B = torch.ones(ROWS, device=kernel_device)
    partial = one_B.double()
    _sde_log_prob_kernel[(ROWS, 1)](
        partial, partial, x, v, v, x_next, v, v, one_B, one_B, 1.0, D, GUIDED=False, HAS_REFERENCE=False, BLOCK=BLOCK
    )
    assert partial.tolist() == [0, 1 * BLOCK, 9 * BLOCK]


def test_sde_log_prob_backward(kernel_device: str) -> None:
    x, v, x_next = (huge(kernel_device, *values) for values in ((2, 2, 2), (1, 1, 1), (3, 4, 6)))
    grad_v, one_B = huge(kernel_device), torch.ones(ROWS, device=kernel_device)
    _sde_log_prob_backward_kernel[(ROWS, 1)](
        grad_v, one_B, one_B, x, v, v, x_next, v, v, one_B, one_B, one_B, one_B, 1.0, 2.0, D,
        GAUSSIAN=False, GUIDED=False, HAS_REFERENCE=False, BLOCK=BLOCK,
    )  # fmt: skip
    # 2 (x_next - mean)
    assert block_of(grad_v) == rows_of(0, 2, 6)


def test_add_noise(kernel_device: str) -> None:
    x_0, noise, x_t = huge(kernel_device, 1, 2, 3), huge(kernel_device, 5, 4, 7), huge(kernel_device)
    t_B = torch.full((ROWS,), 0.5, device=kernel_device)
    ids_B = torch.arange(ROWS, device=kernel_device)
    _add_noise_kernel[(ROWS, 1)](x_t, x_0, noise, ids_B, ids_B, t_B, 0, 0, D, DRAWN=False, BLOCK=BLOCK)
    assert block_of(x_t) == rows_of(3, 3, 5)


def test_matching_loss(kernel_device: str) -> None:
    v, v_old, x_0, noise = (huge(kernel_device, *values) for values in ((2, 2, 2), (1, 0, 1), (1, 1, 1), (0, 1, 2)))
    ids_B, partial = torch.arange(ROWS, device=kernel_device), torch.empty(7, ROWS, device=kernel_device).double()
    _matching_loss_kernel[(ROWS, 1)](
        partial, v, v_old, x_0, noise, ids_B, ids_B, x_0, 0, 0, 1.0, D,
        HAS_OLD=True, DRAWN=False, HAS_REFERENCE=True, BLOCK=BLOCK,
    )  # fmt: skip
    # u = noise - x_0 = (-1, 0, 1), v - u = (3, 2, 1), v- = (0, -2, 0) and v- - u = (1, -2, -1)
    plus, abs_plus, minus, abs_minus, old, drift, reference = (partial / BLOCK).tolist()
    assert (plus, abs_plus, minus, abs_minus) == ([9, 4, 1], [3, 2, 1], [1, 4, 1], [1, 2, 1])
    assert (old, drift, reference) == ([4, 0, 0], [1, 4, 1], [1, 1, 1])


def test_matching_loss_backward(kernel_device: str) -> None:
    v, v_old, x_0, noise = (huge(kernel_device, *values) for values in ((2, 2, 2), (1, 0, 1), (1, 1, 1), (0, 1, 2)))
    grad_v, ids_B = huge(kernel_device), torch.arange(ROWS, device=kernel_device)
    # of plus alone, of minus and drift, of reference
    grad = torch.zeros(7, ROWS, device=kernel_device)
    grad[0, 0] = grad[1, 1] = grad[5, 1] = grad[6, 2] = 1
    _matching_loss_backward_kernel[(ROWS, 1)](
        grad_v, grad, v, v_old, x_0, noise, ids_B, ids_B, x_0, 0, 0, 1.0, 2.0, 2.0, ROWS, D,
        HAS_OLD=True, DRAWN=False, HAS_REFERENCE=True, BLOCK=BLOCK,
    )  # fmt: skip
    # 2 (v+ - u), -2 (v- - u) + 2 (v - v_old), 2 (v - v_reference), the reference being x_0
    assert block_of(grad_v) == rows_of(6, 8, 2)


def test_philox_normal(kernel_device: str) -> None:
    out, ids = huge(kernel_device), torch.arange(ROWS, device=kernel_device)
    _philox_normal_kernel[(1, ROWS, 1)](out, ids, ids, 7, 1, 0, ROWS, D, QUADS=BLOCK // 4)
    expected = philox_normal(7, 1, torch.tensor([0]), torch.arange(ROWS), BLOCK, torch.float16)
    assert block_of(out) == expected[0].tolist()


def test_sample_candidates(kernel_device: str) -> None:
    out, mean, zero = huge(kernel_device), huge(kernel_device, 5), torch.zeros(1, device=kernel_device)
    ids = torch.arange(ROWS, device=kernel_device)
    _sample_candidates_kernel[(1, 1, 1)](
        out, mean, zero, ids, ids, 0, 0, 0, ROWS, D, STD_PER_PROMPT=True, CANDIDATES=4, QUADS=BLOCK // 4
    )
    assert block_of(out) == rows_of(5, 5, 5)


def test_refit_moments(kernel_device: str) -> None:
    mean, refit_mean, refit_std = huge(kernel_device, 1, 2, 3), huge(kernel_device), huge(kernel_device)
    ids, one_P = torch.arange(ROWS, device=kernel_device), torch.ones(ROWS, device=kernel_device)
    # one elite of no spread around each mean, and a floor
    _refit_moments_kernel[(1, ROWS)](
        refit_mean, refit_std, one_P.double(), mean, 0 * one_P, ids, ids, one_P, 0, 0, 0.0, 0.5, D,
        STD_PER_PROMPT=True, T=1, QUADS=BLOCK // 4,
    )  # fmt: skip
    assert block_of(refit_mean) == rows_of(1, 2, 3)
    assert block_of(refit_std) == rows_of(0.5, 0.5, 0.5)
