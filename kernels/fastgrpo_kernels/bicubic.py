"""Antialiased bicubic resampling, V image U^T: the weights of an axis, and the kernel.

    V[i, j] = k((j + 1/2 - (i + 1/2) r) / max(r, 1)), each row divided by its sum,    r = inputs / resized
    k(x)    = 3/2 |x|^3 - 5/2 |x|^2 + 1 up to |x| = 1,    -1/2 |x|^3 + 5/2 |x|^2 - 4 |x| + 2 up to 2,    then 0

k is Keys' cubic (IEEE TASSP 29(6), 1981) with a = -1/2.  Pillow and torch (antialias=True) both mean this map; Pillow
rounds weights to 22 binary places and, after the pass along rows and again after the other, values to bytes.

V and U are bands: a tile of outputs reads one short window of inputs.  So a program multiplies its window by two dense
blocks of weights, on tensor cores.  The gradient is the same kernel with V and U transposed.
Letters: B images, C channels, H, W inputs and N, M outputs along the two axes.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# outputs of one tile
TILE = 32
# windows start at multiples of it, so that rows of an image are read in vectors
_ALIGNMENT = tl.constexpr(8)
# a byte weight is 4096 high + low, two integers that float16 holds
_HIGH_ONE = tl.constexpr(4096)
# a float32 plus and minus this is the nearest integer, ties to even
_ROUNDER = tl.constexpr(1.5 * 2**23)


@lru_cache(maxsize=64)
def bicubic_weights(num_inputs: int, num_resized: int, num_outputs: int) -> Tensor:
    """The central rows of V: float64 [num_outputs, num_inputs]."""
    ratio = num_inputs / num_resized
    first = (num_resized - num_outputs) // 2
    outputs = torch.arange(first, first + num_outputs, dtype=torch.float64, device="cpu")
    inputs = torch.arange(num_inputs, dtype=torch.float64, device="cpu")
    x = (inputs - ((outputs + 0.5) * ratio)[:, None] + 0.5).abs() / max(ratio, 1.0)
    outer = torch.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0)
    weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, outer)
    return weights / weights.sum(dim=1, keepdim=True)


def to_22_places(weights: Tensor) -> Tensor:
    """Rounded to 22 binary places, half away from zero."""
    return (weights.abs() * 2**22 + 0.5).floor().copysign(weights) / 2**22


class Table(NamedTuple):
    """The weights of one axis by tiles: weights [tiles, TILE, window], read in chunks, of inputs from starts on."""

    starts: Tensor
    weights: Tensor
    window: int
    chunk: int


@lru_cache(maxsize=64)
def resampling_table(
    num_inputs: int, num_resized: int, num_outputs: int, match: str, transposed: bool, device: torch.device
) -> Table:
    weights = bicubic_weights(num_inputs, num_resized, num_outputs)
    weights = weights.mT if transposed else weights
    num_tiles = triton.cdiv(weights.shape[0], TILE)
    padded = weights.new_zeros(num_tiles * TILE, weights.shape[1])
    padded[: weights.shape[0]] = weights
    used = (padded != 0).view(num_tiles, TILE, -1).any(dim=1).int()
    starts = used.argmax(dim=1) // _ALIGNMENT.value * _ALIGNMENT.value
    # a tile that the crop drops has no weights, and may have any window
    length = int((used.shape[1] - used.flip(1).argmax(dim=1) - starts).where(used.any(dim=1), 1).max())
    # tl.dot takes no less than 16, and 64 costs twice the registers of 32
    chunk = 32 if length > 16 else 16
    window = triton.cdiv(length, chunk) * chunk
    columns = (starts.repeat_interleave(TILE)[:, None] + torch.arange(window, device="cpu")).clamp(max=used.shape[1])
    blocks = torch.nn.functional.pad(padded, (0, 1)).gather(1, columns)
    if match == "pil":
        fixed = to_22_places(blocks) * 2**22
        high = (fixed / _HIGH_ONE.value).round()
        table = torch.stack([high, fixed - _HIGH_ONE.value * high]).half()
    else:
        table = blocks.float()
    return Table(starts.int().to(device), table.to(device), window, chunk)


@triton.jit
def _load_weights(ptr, tile, first, WINDOW: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """[TILE, CHUNK] of one tile's block; tables hold whole tiles and whole chunks, so nothing is masked."""
    outputs = tile * TILE + tl.arange(0, TILE)
    return tl.load(ptr + outputs[:, None] * WINDOW + first + tl.arange(0, CHUNK)[None, :])


@triton.jit
def _round_to_byte(high, low):
    # floor((4096 high + low) / 2^22 + 1/2) of integers below 2^24, so exactly, and NaN stays NaN
    carry = tl.floor((low + 2097152.0) * 2.0**-12)
    return tl.clamp(tl.floor((high + carry) * 2.0**-10), 0.0, 255.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _resample_kernel(
    x_ptr, out_ptr, row_starts_ptr, row_weights_ptr, column_starts_ptr, column_weights_ptr, scale_ptr, shift_ptr,
    byte_scale, byte_shift, C, H, W, N, M,
    x_stride_b, x_stride_c, x_stride_h, x_stride_w, out_stride_b, out_stride_c, out_stride_n, out_stride_m,
    TO_BYTES: tl.constexpr, ROWS: tl.constexpr, ROW_CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMN_CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # the channels of a tile are neighbours: where they lie interleaved in memory they share its sectors
    program = tl.program_id(0)
    c = program % C
    column_tile = program // C % tl.cdiv(M, TILE)
    row_tile = program // C // tl.cdiv(M, TILE) % tl.cdiv(N, TILE)
    b = (program // C // tl.cdiv(M, TILE) // tl.cdiv(N, TILE)).to(tl.int64)
    row_start = tl.load(row_starts_ptr + row_tile)
    column_start = tl.multiple_of(tl.load(column_starts_ptr + column_tile), _ALIGNMENT)
    low_rows = row_weights_ptr + tl.cdiv(N, TILE) * TILE * ROWS
    low_columns = column_weights_ptr + tl.cdiv(M, TILE) * TILE * COLUMNS
    x_ptr += b * x_stride_b + c.to(tl.int64) * x_stride_c
    out_high = tl.zeros([TILE, TILE], tl.float32)
    out_low = tl.zeros([TILE, TILE], tl.float32)
    for r in range(0, ROWS, ROW_CHUNK):
        rows = (row_start + r + tl.arange(0, ROW_CHUNK))[:, None]
        row_high = tl.zeros([ROW_CHUNK, TILE], tl.float32)
        row_low = tl.zeros([ROW_CHUNK, TILE], tl.float32)
        for k in range(0, COLUMNS, COLUMN_CHUNK):
            columns = (column_start + k + tl.arange(0, COLUMN_CHUNK))[None, :]
            offsets = rows.to(tl.int64) * x_stride_h + columns.to(tl.int64) * x_stride_w
            x = tl.load(x_ptr + offsets, mask=(rows < H) & (columns < W), other=0.0).to(tl.float32)
            high = _load_weights(column_weights_ptr, column_tile, k, COLUMNS, COLUMN_CHUNK, TILE)
            if TO_BYTES:
                x = tl.clamp(x * byte_scale + byte_shift, 0.0, 255.0, propagate_nan=tl.PropagateNan.ALL)
                x = x + _ROUNDER - _ROUNDER
                low = _load_weights(low_columns, column_tile, k, COLUMNS, COLUMN_CHUNK, TILE)
                row_low = tl.dot(x.to(low.dtype), tl.trans(low), row_low)
            row_high = tl.dot(x.to(high.dtype), tl.trans(high), row_high, input_precision="tf32x3")
        high = _load_weights(row_weights_ptr, row_tile, r, ROWS, ROW_CHUNK, TILE)
        if TO_BYTES:
            row_high = _round_to_byte(row_high, row_low)
            low = _load_weights(low_rows, row_tile, r, ROWS, ROW_CHUNK, TILE)
            out_low = tl.dot(low, row_high.to(low.dtype), out_low)
        out_high = tl.dot(high, row_high.to(high.dtype), out_high, input_precision="tf32x3")
    if TO_BYTES:
        out_high = _round_to_byte(out_high, out_low)
    out = out_high * tl.load(scale_ptr + c) + tl.load(shift_ptr + c)
    rows = (row_tile * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    columns = (column_tile * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    out_ptr += b * out_stride_b + c.to(tl.int64) * out_stride_c
    offsets = rows * out_stride_n + columns * out_stride_m
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(rows < N) & (columns < M))


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def resample(
    x: Tensor,
    out: Tensor,
    rows: Table,
    columns: Table,
    affine: list[list[float]],
    to_bytes: tuple[float, float] | None = None,
) -> Tensor:
    """Write V x U^T into out, [B, C, N, M], times and plus the affine [scale, shift] of its channel.

    to_bytes is (scale, shift) from x to bytes, for tables of "pil"; None for those of "torch".
    """
    (B, C, N, M), (H, W) = out.shape, x.shape[-2:]
    if B == 0:
        return out
    scale_C, shift_C = (_constants(tuple(values), x.device) for values in affine)
    # four warps would multiply every product twice, and a third stage takes all 255 registers; left to itself, the
    # assembler that comes with Triton 3.8 spills two of 168
    _resample_kernel[(B * C * triton.cdiv(N, TILE) * triton.cdiv(M, TILE),)](
        x, out, rows.starts, rows.weights, columns.starts, columns.weights, scale_C, shift_C,
        *(to_bytes or (1.0, 0.0)), C, H, W, N, M, *x.stride(), *out.stride(),
        TO_BYTES=to_bytes is not None, ROWS=rows.window, ROW_CHUNK=rows.chunk,
        COLUMNS=columns.window, COLUMN_CHUNK=columns.chunk, TILE=TILE,
        enable_fp_fusion=False, num_warps=2, num_stages=2, maxnreg=240,
    )  # fmt: skip
    return out
