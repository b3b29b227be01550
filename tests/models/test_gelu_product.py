"""gelu inside the products of a frozen feed-forward: values, the gradient, and what cuBLASLt is asked to compute."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgrpo.models import gelu_product
from fastgrpo.models.blocks import feed_forward as module
from fastgrpo.models.lora import LoRA


def make_layers(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return tuple(nn.Linear(*size).to(dtype).requires_grad_(False) for size in ((6, 20), (20, 6)))  # type: ignore[return-value]


def inputs() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    return second(F.gelu(first(x), approximate="tanh"))


def test_value_and_gradient_are_those_of_two_layers_and_a_gelu() -> None:
    first, second = make_layers()
    x = inputs().requires_grad_()
    ours, theirs = gelu_product.frozen_feed_forward(first, second, x), plain(first, second, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    cotangent = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=theirs.dtype)
    (found,), (expected,) = (torch.autograd.grad(y, x, cotangent) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_its_operators_keep_their_contracts() -> None:
    first, second = make_layers()
    x_MI = inputs().flatten(0, 1)
    torch.library.opcheck(gelu_product.gelu_product, (x_MI, first.weight, first.bias))
    _, h_MO = gelu_product.gelu_product(x_MI, first.weight, first.bias)
    torch.library.opcheck(gelu_product.gelu_product_backward, (x_MI, second.weight, h_MO))


@pytest.mark.parametrize(
    ("with_gradient", "has_epilogues", "is_frozen", "is_used"),
    [(True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)],
)
def test_it_runs_where_there_is_a_gradient_for_nothing_but_the_input(
    with_gradient: bool, has_epilogues: bool, is_frozen: bool, is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_layers()
    second.weight.requires_grad_(not is_frozen)
    called = []
    feed_forward = gelu_product.frozen_feed_forward
    monkeypatch.setattr(module, "has_epilogues", lambda *layers: has_epilogues)

    def count(*layers: Any) -> Tensor:
        called.append(1)
        return feed_forward(*layers)

    monkeypatch.setattr(module, "frozen_feed_forward", count)
    ff = nn.Module()
    ff.net = nn.ModuleList([nn.ModuleDict({"proj": first}), nn.Identity(), second])
    ff.net[0].proj = first
    with torch.set_grad_enabled(with_gradient):
        found = module.gelu_feed_forward(ff, inputs())
    torch.testing.assert_close(found, plain(first, second, inputs()), rtol=0, atol=1e-13)
    assert bool(called) == is_used


def test_adapted_feed_forwards_do_without() -> None:
    block = nn.ModuleDict({"ff": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    LoRA(rank=2, targets=("a",))(block)
    assert not module._is_frozen(block["ff"]["a"])  # type: ignore[index]


class OnGPU:
    """Half precision that says it is on a GPU."""

    is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(
    ("widths", "with_bias", "has"),
    [
        ((8, 32, 16), True, True),
        ((8, 32, 16), False, False),
        ((8, 30, 16), True, False),
        ((4, 32, 16), True, False),
        ((8, 32, 12), True, False),
    ],
)
def test_epilogues_are_for_a_gpu_a_bias_and_widths_that_eight_divides(
    widths: tuple[int, int, int], with_bias: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = nn.Linear(widths[0], widths[1], bias=with_bias), nn.Linear(widths[1], widths[2])
    assert not gelu_product.has_epilogues(first, second, torch.ones(1, 2, widths[0], dtype=torch.bfloat16))
    monkeypatch.setattr(gelu_product, "_tried_out", lambda device, dtype: True)
    x: Any = OnGPU()
    assert gelu_product.has_epilogues(first, second, x) == has
    x.dtype = torch.float32
    assert not gelu_product.has_epilogues(first, second, x)


class Lt:
    """cuBLASLt as its manual has it: column-major D = epilogue(op(A) op(B)), over float32 memory at addresses."""

    def __init__(self) -> None:
        self.attributes: dict[int, Any] = {}
        self.limits: dict[int, int] = {}
        self.layouts: list[tuple[int, ...]] = []
        self.made = self.destroyed = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        assert name.endswith(("Create", "Destroy")), name
        if name.endswith("Destroy"):
            self.destroyed += 1
        else:
            self.made += 1
        return lambda *_: 0

    def cublasLtMatmulDescCreate(self, description: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0)
        self.made += 1
        return 0

    def cublasLtMatmulDescSetAttribute(self, _: Any, key: Any, value: Any, size: Any) -> int:
        held = value._obj
        # what the header says of each: trans and epilogue have 4 bytes, pointers and the leading dimension 8
        assert size.value == ctypes.sizeof(held) == (4 if key.value in (3, 7) else 8)
        self.attributes[key.value] = held.value
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, _: Any, key: Any, value: Any, size: Any) -> int:
        held = value._obj
        assert size.value == ctypes.sizeof(held) == (8 if key.value == 1 else 4)
        self.limits[key.value] = held.value
        return 0

    def cublasLtMatrixLayoutCreate(self, layout: Any, kind: Any, rows: Any, columns: Any, stride: Any) -> int:
        layout._obj.value = len(self.layouts) + 1
        self.layouts.append((kind.value, rows.value, columns.value, stride.value))
        self.made += 1
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        arguments[-1]._obj.value = 1
        return 0

    def matrix(self, address: int, layout: tuple[int, ...]) -> Tensor:
        kind, rows, columns, stride = layout
        assert kind == 0
        memory = (ctypes.c_float * (stride * columns)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(columns, stride)[:, :rows].T

    def cublasLtMatmul(self, handle: Any, description: Any, *arguments: Any) -> int:
        alpha, a, a_layout, b, b_layout, beta, _, c_layout, d, d_layout, *_ = arguments
        assert (alpha._obj.value, beta._obj.value, c_layout.value) == (1, 0, d_layout.value)
        left, right, out = (
            self.matrix(address.value, self.layouts[layout.value - 1])
            for address, layout in ((a, a_layout), (b, b_layout), (d, d_layout))
        )
        product = (left.T if self.attributes[3] == 1 else left) @ right
        aux = self.matrix(self.attributes[11], (0, *out.shape, self.attributes[12]))
        if self.attributes[7] == 32 | 128 | 4:
            bias = self.matrix(self.attributes[8], (0, len(out), 1, len(out)))
            aux.copy_(product + bias)
            out.copy_(F.gelu(aux, approximate="tanh"))
        else:
            assert self.attributes[7] == 64 | 128
            out.copy_(torch.ops.aten.gelu_backward(product, aux.clone(), approximate="tanh"))
        return 0


@pytest.fixture
def lt(monkeypatch: pytest.MonkeyPatch) -> Lt:
    library = Lt()
    monkeypatch.setattr(gelu_product, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    return library


def test_what_cublaslt_is_asked_for_forward_is_that_product(lt: Lt) -> None:
    first, _ = make_layers(torch.float32)
    x_MI = inputs().float().flatten(0, 1)
    a_MO, h_MO = torch.full((10, 20), torch.nan), torch.full((10, 20), torch.nan)
    code = gelu_product._GELU_AUX_BIAS
    gelu_product._multiply(code, first.weight, x_MI, a_MO, aux=h_MO, bias=first.bias, is_transposed=True)
    torch.testing.assert_close(h_MO, first(x_MI))
    torch.testing.assert_close(a_MO, F.gelu(first(x_MI), approximate="tanh"))
    for key, operand in ((5, first.weight), (6, x_MI), (7, a_MO), (8, a_MO)):
        alignment = lt.limits[key]
        assert operand.data_ptr() % alignment == 0
        assert alignment == 256 or operand.data_ptr() % (2 * alignment) > 0
    assert lt.made == lt.destroyed == 5


def test_what_cublaslt_is_asked_for_backward_is_that_product(lt: Lt) -> None:
    _, second = make_layers(torch.float32)
    generator = torch.Generator().manual_seed(3)
    grad_MC, h_MO = torch.randn(10, 6, generator=generator), torch.randn(10, 20, generator=generator)
    out_MO = torch.full((10, 20), torch.nan)
    code = gelu_product._DGELU
    gelu_product._multiply(code, second.weight, grad_MC, out_MO, aux=h_MO, bias=None, is_transposed=False)
    expected = torch.ops.aten.gelu_backward(grad_MC @ second.weight, h_MO, approximate="tanh")
    torch.testing.assert_close(out_MO, expected)


def test_a_status_is_raised_and_nothing_is_left_behind(lt: Lt) -> None:
    lt.cublasLtMatmul = lambda *_: 3  # type: ignore[method-assign]
    _, second = make_layers(torch.float32)
    with pytest.raises(RuntimeError, match="cublasLtMatmul: CUBLAS_STATUS_ALLOC_FAILED"):
        gelu_product._multiply(
            192, second.weight, torch.ones(10, 6), torch.ones(10, 20), aux=torch.ones(10, 20), bias=None,
            is_transposed=False,
        )  # fmt: skip
    assert lt.made == lt.destroyed == 5


@pytest.mark.parametrize(("status", "count"), [(15, 1), (0, 0)], ids=["not supported", "none found"])
def test_sizes_without_a_kernel_are_computed_by_two_and_said_once(
    status: int, count: int, lt: Lt, capsys: pytest.CaptureFixture[str]
) -> None:
    def heuristic(*arguments: Any) -> int:
        arguments[-1]._obj.value = count
        return status

    lt.cublasLtMatmulAlgoGetHeuristic = heuristic  # type: ignore[method-assign]
    _, second = make_layers(torch.float32)
    rows, out = torch.ones(10 + status, 6), torch.ones(10 + status, 20)
    for _ in range(2):
        assert not gelu_product._multiplied(192, second.weight, rows, out, aux=out, bias=None, is_transposed=False)
    assert capsys.readouterr().err.count("gelu runs as a kernel of its own") == 1


def test_a_device_without_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gelu_product, "gelu_product", product)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            gelu_product._tried_out(torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("fault", ["raises", "is off", "is nan"])
def test_a_device_that_computes_something_else_does_without_and_says_so(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        if fault == "raises":
            raise RuntimeError("cublasLtMatmul: status 15")
        h = F.linear(x, weight, bias)
        # the other form of gelu, of another slope
        return (F.silu(h) if fault == "is off" else h * torch.nan), h

    device = torch.device("cpu")
    assert gelu_product._tried_out.__wrapped__(device, torch.bfloat16)
    monkeypatch.setattr(gelu_product, "gelu_product", product)
    assert not gelu_product._tried_out.__wrapped__(device, torch.bfloat16)
    assert "gelu runs as a kernel of its own" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuBLASLt needs a CUDA device")
@pytest.mark.parametrize("rows", [9216, 1845, 1], ids=str)
def test_on_a_gpu_both_epilogues_are_two_kernels_but_for_rounding(rows: int) -> None:
    place = {"device": "cuda", "dtype": torch.bfloat16}
    generator = torch.Generator("cuda").manual_seed(0)
    x, first, bias = (torch.randn(size, generator=generator, **place) for size in ((rows, 1536), (6144, 1536), (6144,)))  # type: ignore[call-overload]
    first /= 40
    second = torch.randn(1536, 6144, generator=generator, **place) / 80  # type: ignore[call-overload]
    a, h = gelu_product.gelu_product(x, first, bias)
    expected = F.linear(x.float(), first.float(), bias.float())
    assert (h.float() - expected).abs().max() <= 2**-7 * expected.abs().max()
    gelu = F.gelu(expected, approximate="tanh")
    assert (a.float() - gelu).abs().max() <= 2**-7 * gelu.abs().max()
    found = gelu_product.gelu_product_backward(x, second, h)
    gradient = torch.ops.aten.gelu_backward(x.float() @ second.float(), h.float(), approximate="tanh")
    assert (found.float() - gradient).abs().max() <= 2**-6 * gradient.abs().max()
    assert gelu_product._on_device(x.device, torch.bfloat16)
