"""A frozen feed-forward under gradient, whose gelu is part of the products around it.

    forward      h = x W1^T + b1    a = gelu(h)      y = a W2^T + b2        one kernel writes a and h
    backward     dh = (dy W2) * gelu'(h)             dx = dh W1             one kernel reads dy, W2 and h, writes dh

As kernels of their own gelu reads and writes the widest activation of a block once more in each direction.  cuBLASLt
has epilogues for both, GELU_AUX_BIAS and DGELU, that PyTorch does not bind: they are called here, by its C interface.
gelu is in its tanh form, as theirs is.  https://docs.nvidia.com/cuda/cublas/#cublasltepilogue-t
Letters: M rows, I inputs, O hidden, C outputs.
"""

import ctypes
import sys
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn import functional as F

from fastgrpo.out_of_memory import is_out_of_memory

_GELU_AUX_BIAS, _DGELU = 32 | 128 | 4, 64 | 128
_TRANS_A, _EPILOGUE, _BIAS_POINTER, _AUX_POINTER, _AUX_LD = 3, 7, 8, 11, 12
_MAX_WORKSPACE = 1
_COMPUTE_32F = 68
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_ALIGNMENTS = (5, 6, 7, 8)
_WORKSPACE_BYTES = 32 << 20
_NOT_SUPPORTED, _ALLOC_FAILED = 15, 3
# of the leading dimension of what a forward product leaves for the backward one
_MULTIPLE = 8
# what an epilogue may differ from two kernels by, which round in between: a few units of bfloat16
_TOLERANCE = 2e-2


def frozen_feed_forward(first: nn.Linear, second: nn.Linear, x_BLI: Tensor) -> Tensor:
    """second(gelu(first(x))) with a gradient for x alone."""
    y_MC = _FeedForward.apply(x_BLI.flatten(0, -2), first.weight, first.bias, second.weight, second.bias)
    return y_MC.unflatten(0, x_BLI.shape[:-1])


def has_epilogues(first: nn.Linear, second: nn.Linear, x_BLI: Tensor) -> bool:
    """Whether both are to be had for these layers: tried out once a device and type, and said where they are not."""
    widths = (*first.weight.shape, len(second.weight))
    is_regular = first.bias is not None and not any(width % _MULTIPLE for width in widths)
    return is_regular and x_BLI.is_cuda and _on_device(x_BLI.device, x_BLI.dtype)


@torch.compiler.assume_constant_result
def _on_device(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16) and _tried_out(device, dtype)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, first_OI: Tensor, first_O: Tensor, second_CO: Tensor, second_C: Tensor
    ) -> Tensor:
        a_MO, h_MO = gelu_product(x_MI, first_OI, first_O)
        ctx.save_for_backward(h_MO, first_OI, second_CO)
        return F.linear(a_MO, second_CO, second_C)

    @staticmethod
    def backward(ctx: Any, grad_MC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_MO, first_OI, second_CO = ctx.saved_tensors
        return gelu_product_backward(grad_MC, second_CO, h_MO) @ first_OI, None, None, None, None


@custom_op("fastgrpo::gelu_product", mutates_args=())
def gelu_product(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(h), h) of h = x W^T + b."""
    if x_MI.is_cuda:
        x_MI, weight_OI = x_MI.contiguous(), weight_OI.contiguous()
        a_MO, h_MO = (x_MI.new_empty(len(x_MI), len(weight_OI)) for _ in range(2))
        if _multiplied(_GELU_AUX_BIAS, weight_OI, x_MI, a_MO, aux=h_MO, bias=bias_O, is_transposed=True):
            return a_MO, h_MO
    h_MO = F.linear(x_MI, weight_OI, bias_O)
    return F.gelu(h_MO, approximate="tanh"), h_MO


@custom_op("fastgrpo::gelu_product_backward", mutates_args=())
def gelu_product_backward(grad_MC: Tensor, weight_CO: Tensor, h_MO: Tensor) -> Tensor:
    """(dy W) * gelu'(h)."""
    if grad_MC.is_cuda:
        grad_MC, weight_CO, out_MO = grad_MC.contiguous(), weight_CO.contiguous(), torch.empty_like(h_MO)
        if _multiplied(_DGELU, weight_CO, grad_MC, out_MO, aux=h_MO, bias=None, is_transposed=False):
            return out_MO
    return torch.ops.aten.gelu_backward(grad_MC @ weight_CO, h_MO, approximate="tanh")


@gelu_product.register_fake
def _(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
    return x_MI.new_empty(len(x_MI), len(weight_OI)), x_MI.new_empty(len(x_MI), len(weight_OI))


@gelu_product_backward.register_fake
def _(grad_MC: Tensor, weight_CO: Tensor, h_MO: Tensor) -> Tensor:
    return torch.empty_like(h_MO)


@cache
def _tried_out(device: torch.device, dtype: torch.dtype) -> bool:
    # no two widths are alike, and gelu is asked where it is not yet straight
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (192, 64), "first": (256, 64), "bias": (256,), "second": (128, 256), "grad": (192, 128)}
    rows = {name: torch.randn(size, generator=generator) / 3 for name, size in sizes.items()}
    rows = {name: row.to(dtype).float() for name, row in rows.items()}
    x, first, bias, second, grad = (row.to(device, dtype) for row in rows.values())
    h32 = rows["x"] @ rows["first"].T + rows["bias"]
    grad_h = torch.ops.aten.gelu_backward(rows["grad"] @ rows["second"], h32, approximate="tanh")
    expected = [F.gelu(h32, approximate="tanh"), h32, grad_h]
    try:
        a, h = gelu_product(x, first, bias)
        pairs = zip([a, h, gelu_product_backward(grad, second, h)], expected, strict=True)
        errors = [(one.float().cpu() - other).abs().max() / other.abs().max() for one, other in pairs]
    except (OSError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return _do_without(f"cuBLASLt's epilogues for gelu do not run ({str(error).splitlines()[0]})")
    largest = torch.stack(errors).max()
    # written so that nan is refused too
    if not largest <= _TOLERANCE:
        return _do_without(f"cuBLASLt's epilogues for gelu are off by {largest:.2g} of the largest value")
    return True


def _do_without(why: str) -> bool:
    print(f"fastgrpo: {why}; gelu runs as a kernel of its own", file=sys.stderr)
    return False


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL:
    """PyTorch's own cuBLASLt."""
    loaded = ctypes.CDLL(None)
    if not hasattr(loaded, "cublasLtMatmul"):
        loaded = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")
    return loaded


class _NoKernel(RuntimeError):
    """cuBLASLt has none for these sizes."""


def _call(function: str, *arguments: Any) -> None:
    """RuntimeError with cuBLAS's status if it is not success."""
    status = getattr(_library(), function)(*arguments)
    if status == _NOT_SUPPORTED:
        raise _NoKernel(f"{function}: CUBLAS_STATUS_NOT_SUPPORTED")
    if status != 0:
        # so named, a failed allocation is taken for one
        name = "CUBLAS_STATUS_ALLOC_FAILED" if status == _ALLOC_FAILED else f"status {status}"
        raise RuntimeError(f"{function}: {name}")


@cache
def _say_once(sizes: str, why: str) -> None:
    _do_without(f"cuBLASLt has no epilogue for gelu of {sizes} ({why})")


def _multiplied(epilogue: int, weight: Tensor, rows: Tensor, out_MO: Tensor, **kwargs: Any) -> bool:
    """Whether ``_multiply`` has a kernel for it."""
    try:
        _multiply(epilogue, weight, rows, out_MO, **kwargs)
    except _NoKernel as error:
        _say_once(f"{list(rows.shape)} x {list(weight.shape)}", str(error))
        return False
    return True


def _multiply(
    epilogue: int,
    weight: Tensor,
    rows: Tensor,
    out_MO: Tensor,
    *,
    aux: Tensor,
    bias: Tensor | None,
    is_transposed: bool,
) -> None:
    """out = epilogue(rows W^T), or of rows W unless ``is_transposed``; all tensors are contiguous.

    cuBLASLt's matrices are column by column: it computes the transposed out from W and the transposed rows.
    """
    (num_rows, width), depth, kind = out_MO.shape, rows.shape[1], _TYPES[out_MO.dtype]
    with torch.cuda.device(out_MO.device):
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        handle = c_void_p(torch.cuda.current_blas_handle())
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=out_MO.device)
    description, preference = c_void_p(), c_void_p()
    layouts = [c_void_p() for _ in range(3)]
    try:
        _call("cublasLtMatmulDescCreate", byref(description), c_int(_COMPUTE_32F), c_int(_TYPES[torch.float32]))
        attributes = [
            (_TRANS_A, c_int32(is_transposed)),
            (_EPILOGUE, c_uint32(epilogue)),
            (_AUX_POINTER, c_void_p(aux.data_ptr())),
            (_AUX_LD, c_int64(width)),
            *([] if bias is None else [(_BIAS_POINTER, c_void_p(bias.data_ptr()))]),
        ]
        for key, value in attributes:
            size = c_size_t(ctypes.sizeof(value))
            _call("cublasLtMatmulDescSetAttribute", description, c_int(key), byref(value), size)
        shapes = [(depth, width) if is_transposed else (width, depth), (depth, num_rows), (width, num_rows)]
        for layout, (height, columns) in zip(layouts, shapes, strict=True):
            sizes = (c_int(kind), c_uint64(height), c_uint64(columns), c_int64(height))
            _call("cublasLtMatrixLayoutCreate", byref(layout), *sizes)
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        operands = (weight, rows, out_MO, out_MO)
        limits: list[tuple[int, Any]] = [(_MAX_WORKSPACE, c_size_t(_WORKSPACE_BYTES))]
        # the largest power of two that an address is a multiple of, of which cuBLASLt assumes 256
        addresses = [operand.data_ptr() for operand in operands]
        limits += [(key, c_uint32(min(256, at & -at))) for key, at in zip(_ALIGNMENTS, addresses, strict=True)]
        for key, limit in limits:
            size = c_size_t(ctypes.sizeof(limit))
            _call("cublasLtMatmulPreferenceSetAttribute", preference, c_int(key), byref(limit), size)
        a, b, c = layouts
        found, count = _Heuristic(), c_int()
        wanted = (handle, description, a, b, c, c, preference, c_int(1), byref(found), byref(count))
        _call("cublasLtMatmulAlgoGetHeuristic", *wanted)
        if count.value < 1:
            raise _NoKernel("cublasLtMatmulAlgoGetHeuristic: none found")
        one, zero, out = c_float(1), c_float(0), c_void_p(out_MO.data_ptr())
        left, right = c_void_p(weight.data_ptr()), c_void_p(rows.data_ptr())
        matrices = (byref(one), left, a, right, b, byref(zero), out, c, out, c)
        memory = (c_void_p(workspace.data_ptr()), c_size_t(_WORKSPACE_BYTES), stream)
        _call("cublasLtMatmul", handle, description, *matrices, byref(found.algorithm), *memory)
    finally:
        for layout in layouts:
            _library().cublasLtMatrixLayoutDestroy(layout)
        _library().cublasLtMatmulPreferenceDestroy(preference)
        _library().cublasLtMatmulDescDestroy(description)
