"""The forward process: its values, its noise, and the kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo_kernels import PhiloxNoise, add_noise, philox_normal
from fastgrpo_kernels.add_noise import _add_noise_triton, add_noise_reference
from fastgrpo_kernels.noise import noise_arguments
from tests.kernels.parameters import ALL_CHECKS, BACKEND, DEVICES, DTYPES, QUICK_CHECKS, covering

SHAPES = [(3, 1), (2, 7), (2, 1024), (3, 1025), (2, 16, 8, 8), (2, 65, 16), (0, 4)]


def make(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", drawn: bool = False) -> dict[str, Any]:
    """The arguments of `add_noise` by name, with a t for each sample."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    t_B, ids_B = torch.rand(shape[0], generator=generator).to(device), torch.arange(shape[0], device=device)
    return {
        "x_0": x_0,
        "noise": PhiloxNoise(2**40 + 3, 1002, ids_B + 5, 2**32 - 1 - ids_B) if drawn else noise,
        "t": t_B,
    }


def op_arguments(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of the operator, from those of the public function."""
    x_0 = arguments["x_0"]
    return (x_0, *noise_arguments("x_0", x_0, arguments["noise"]), arguments["t"], dtype)


def test_values_by_hand() -> None:
    x_0, noise = torch.tensor([[1.0, 2.0], [4.0, -2.0]]), torch.tensor([[3.0, -6.0], [0.0, 2.0]])
    # 3/4 of (1, 2) and 1/4 of (3, -6)
    assert add_noise(x_0, noise, 0.25)[0].tolist() == [1.5, 0.0]
    assert add_noise(x_0, noise, torch.tensor([0.5, 0.75])).tolist() == [[2.0, -2.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_at_time_0_it_is_the_image_and_at_time_1_the_noise(dtype: torch.dtype) -> None:
    arguments = make(3, 4, 5, dtype=dtype)
    assert torch.equal(add_noise(**{**arguments, "t": 0.0}), arguments["x_0"])
    assert torch.equal(add_noise(**{**arguments, "t": 1.0}), arguments["noise"])


@given(t=st.floats(0, 1))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_is_the_straight_line_from_image_to_noise(t: float) -> None:
    arguments = make(2, 9)
    line = torch.lerp(arguments["x_0"].double(), arguments["noise"].double(), t)
    torch.testing.assert_close(add_noise(**{**arguments, "t": t}).double(), line, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_computed_in_float32_and_rounded_once(device: str) -> None:
    arguments = make(3, 50, dtype=torch.bfloat16, device=device)
    exact = add_noise(**arguments, dtype=torch.float32)
    wide = {name: value.float() for name, value in arguments.items()}
    assert exact.dtype == torch.float32
    assert torch.equal(exact, add_noise(**wide))
    assert torch.equal(add_noise(**arguments), exact.bfloat16())
    assert torch.equal(add_noise(**wide, dtype=torch.float16), exact.half())


@pytest.mark.parametrize("shape", [(6, 16, 8, 8), (6, 65, 16), (6, 7)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_drawn_noise_is_that_of_philox_normal_whatever_the_batch(shape: tuple[int, ...], device: str) -> None:
    arguments = make(*shape, device=device, drawn=True)
    drawn = arguments["noise"]
    noise = philox_normal(
        drawn.seed, drawn.stream, drawn.prompt_ids_B, drawn.sample_ids_B[:, None], arguments["x_0"][0].numel()
    )
    expected = add_noise(**{**arguments, "noise": noise.view(shape)})
    assert torch.equal(add_noise(**arguments), expected)
    part = {name: value[2:5] for name, value in arguments.items()}
    assert torch.equal(add_noise(**part), expected[2:5])


@pytest.mark.parametrize(
    ("shape", "dtype", "result_dtype", "drawn"), covering(SHAPES, DTYPES, DTYPES, [False, True]), ids=str
)
@pytest.mark.usefixtures("poisoned_outputs")
def test_kernel_equals_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, result_dtype: torch.dtype, drawn: bool, kernel_device: str
) -> None:
    arguments = op_arguments(make(*shape, dtype=dtype, device=kernel_device, drawn=drawn), result_dtype)
    result = _add_noise_triton(*arguments)
    assert result.shape == shape
    assert torch.equal(result, add_noise_reference(*arguments))


def test_kernel_takes_any_layout(kernel_device: str) -> None:
    arguments = make(3, 4, 5, device=kernel_device)
    other = {name: arguments[name].mT.contiguous().mT for name in ("x_0", "noise")}
    other["t"] = arguments["t"].repeat_interleave(2)[::2]
    expected = add_noise_reference(*op_arguments(arguments, torch.float32))
    for run in (_add_noise_triton, add_noise_reference):
        result = run(*op_arguments(other, torch.float32))
        assert result.is_contiguous()
        assert torch.equal(result, expected)
    # ids that lie apart
    drawn = make(3, 4, 5, device=kernel_device, drawn=True)
    ids_B2 = torch.stack([drawn["noise"].prompt_ids_B, drawn["noise"].sample_ids_B], dim=1)
    strided = {**drawn, "noise": PhiloxNoise(drawn["noise"].seed, drawn["noise"].stream, *ids_B2.unbind(1))}
    expected = _add_noise_triton(*op_arguments(drawn, torch.float32))
    assert torch.equal(_add_noise_triton(*op_arguments(strided, torch.float32)), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drawn", [False, True])
def test_operator_is_well_formed(drawn: bool, device: str) -> None:
    arguments = op_arguments(make(3, 2, 5, dtype=torch.bfloat16, device=device, drawn=drawn), torch.float32)
    checks = ALL_CHECKS if drawn else QUICK_CHECKS
    torch.library.opcheck(torch.ops.fastgrpo.add_noise.default, arguments, test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device: str) -> None:
    arguments = make(3, 2, 5, device=device, drawn=True)

    def doubled(**arguments: Any) -> Tensor:
        return 2 * add_noise(**arguments)

    compiled = torch.compile(doubled, fullgraph=True, backend=BACKEND)
    assert torch.equal(compiled(**arguments), doubled(**arguments))


def test_wrong_input_is_refused_with_the_remedy() -> None:
    arguments = make(3, 2, 5)
    ids = torch.arange(2)
    for change, message in (
        ({"x_0": torch.zeros(3)}, r"x_0 must be \[B, ...\] with elements, got \(3,\); add a batch dimension"),
        ({"noise": torch.zeros(3, 2, 4)}, r"noise is \(3, 2, 4\) .* x_0 \(3, 2, 5\) .*; pass the same shape"),
        ({"noise": PhiloxNoise(0, 0, ids, ids)}, r"noise has 2 ids on cpu and x_0 is \(3, 2, 5\) on cpu; give every"),
        ({"x_0": torch.zeros(3, 2, 5, requires_grad=True)}, r"x_0 requires one; pass x_0.detach\(\)"),
        ({"noise": torch.zeros(3, 2, 5, requires_grad=True)}, r"noise requires one; pass noise.detach\(\)"),
        ({"t": torch.zeros(3, requires_grad=True)}, r"add_noise has no gradient and t requires one; pass t.detach\(\)"),
        ({"t": torch.zeros(3, 1)}, r"t must be float32 of shape \(3,\) .*; pass a number, or one number per sample"),
        ({"t": 500}, r"t must lie in \[0, 1\], got 500; 1 is noise, and a timestep in \[0, 1000\] is 1000 t"),
        ({"t": torch.tensor([0.5, -0.5, 0.5])}, r"t must lie in \[0, 1\], got \[0.5, -0.5, 0.5\]"),
        ({"t": float("nan")}, r"t must lie in \[0, 1\], got nan"),
        ({"dtype": torch.int64}, "dtype must be floating point, got torch.int64; pass that of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            add_noise(**{**arguments, **change})
