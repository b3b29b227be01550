"""Standard normal noise that is a function of its indices: Philox 4x32-10 and Box-Muller.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).  Four elements come from one block of four
32-bit integers:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (i div 4, candidate id, prompt id, stream)        ids by their low 32 bits
    w0..w3  = Philox4x32-10(counter, key)
    radius(w) = sqrt(-2 log((w + 1/2) 2^-32)),  angle(w) = w 2^-32 * 2 pi       in float32
    elements 4j, 4j+1 = radius(w0) * (cos, sin)(angle(w1)),  4j+2, 4j+3 = radius(w2) * (cos, sin)(angle(w3))

So element i of candidate k of prompt p never depends on what else is drawn, on the number of GPUs, or on numel.
Logarithm, cosine and sine are polynomials here: libraries round them differently, while sums, products and square
roots, rounded one by one (``enable_fp_fusion=False``), are equal on every device, and so are the normals, bit for bit.
They are within 1.2e-6 of the exact ones.  Letters: P prompts, K candidates, J blocks of four elements, B samples.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo_kernels.op import define_op

_LOW_32_BITS = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# -2 log(u) = exponent * -2 log(2) - 2 x + x^2 polynomial(x), u = 2^exponent (1 + x), 1 + x in [sqrt(1/2), sqrt(2))
_MINUS_TWO_LOG_TWO = tl.constexpr(-2.0 * math.log(2.0))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_MANTISSA_BITS = tl.constexpr(0x007FFFFF)
_LOG_0, _LOG_1, _LOG_2, _LOG_3 = map(tl.constexpr, (0.99999964, -0.66667867, 0.50005168, -0.39926955))
_LOG_4, _LOG_5, _LOG_6, _LOG_7 = map(tl.constexpr, (0.33103576, -0.29767367, 0.28853759, -0.17959057))
# sin(pi/2 y) = y polynomial(y^2), cos(pi/2 y) = 1 + y^2 polynomial(y^2), y in [-1/2, 1/2]
_SIN_0, _SIN_1, _SIN_2, _SIN_3 = map(tl.constexpr, (1.5707963, -0.64596307, 0.079676762, -0.0045941216))
_COS_0, _COS_1, _COS_2 = map(tl.constexpr, (-1.2336982, 0.25360999, -0.020436028))
_EIGHTH_TURN = tl.constexpr(1 << 29)
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)

# blocks of four that one program draws
QUADS = 512
NO_FUSION = {"enable_fp_fusion": False}

Words = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise that an op draws itself: that of `philox_normal`, by each sample's own prompt and sample id."""

    seed: int
    stream: int
    prompt_ids_B: Tensor
    sample_ids_B: Tensor

    def __post_init__(self) -> None:
        check_seed(self.seed, self.stream)
        check_ids("prompt_ids_B", self.prompt_ids_B, self.prompt_ids_B.shape[:1])
        check_ids("sample_ids_B", self.sample_ids_B, self.prompt_ids_B.shape, self.prompt_ids_B.device)

    def __getitem__(self, rows: slice) -> "PhiloxNoise":
        """The noise of some of the samples."""
        return PhiloxNoise(self.seed, self.stream, self.prompt_ids_B[rows], self.sample_ids_B[rows])


def philox_uint32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words (int64 tensors in [0, 2^32) that broadcast) under two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # an int64 product wraps, and its 64 bits are those of the unsigned product
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) ^ c1 ^ k0) & _LOW_32_BITS
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _LOW_32_BITS
        # the high halves are masked away where these are used, one round later
        c1, c3 = product2, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW_32_BITS, (k1 + _KEY_STEPS[1]) & _LOW_32_BITS
    return c0, c1 & _LOW_32_BITS, c2, c3 & _LOW_32_BITS


def philox_normal_reference(
    seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_PK: Tensor, numel: int, dtype: torch.dtype
) -> Tensor:
    """The operator on the CPU, and what the tests compare the kernel with."""
    blocks_J = torch.arange(triton.cdiv(numel, 4), device=prompt_ids_P.device)
    # broadcasting keeps the first rounds small: a word depends on all of p, k and j only from the third on
    counter = (
        blocks_J[None, None, :],
        candidate_ids_PK[:, :, None] & _LOW_32_BITS,
        prompt_ids_P[:, None, None] & _LOW_32_BITS,
        torch.full_like(blocks_J[:1], stream)[None, None, :],
    )
    w0, w1, w2, w3 = philox_uint32(counter, (seed & _LOW_32_BITS, seed >> 32))
    normals_PKJ4 = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return normals_PKJ4.flatten(2)[..., :numel].to(dtype).contiguous()


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    bits = radius_word.float().add_(0.5).view(torch.int32).sub_(_SQRT_HALF_BITS.value)
    exponent = (bits >> 23).sub_(32).float()
    x = bits.bitwise_and_(_MANTISSA_BITS.value).add_(_SQRT_HALF_BITS.value).view(torch.float32).sub_(1.0)
    log_coefficients = (_LOG_0, _LOG_1, _LOG_2, _LOG_3, _LOG_4, _LOG_5, _LOG_6, _LOG_7)
    square = (
        _polynomial(x, log_coefficients).mul_(x * x).sub_(x.mul_(2.0)).add_(exponent.mul_(_MINUS_TWO_LOG_TWO.value))
    )
    # a vector library's square root may be off by one unit; of a float64 one the nearest float32 is exact
    radius = square.double().sqrt_().float()

    quarter = (angle_word + _EIGHTH_TURN.value) >> 30
    # the distance to that quarter turn, in quarter turns: an integer of 30 bits and a sign, shifted to the top
    y = ((angle_word << 34) >> 32).float().mul_(_TWO_TO_MINUS_32.value)
    y2 = y * y
    sine = _polynomial(y2, (_SIN_0, _SIN_1, _SIN_2, _SIN_3)).mul_(y)
    cosine = _polynomial(y2, (_COS_0, _COS_1, _COS_2)).mul_(y2).add_(1.0)
    swap = (quarter & 1).bool()
    first, second = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    first_sign, second_sign = 1.0 - ((quarter + 1) & 2).float(), 1.0 - (quarter & 2).float()
    return first.mul_(first_sign).mul_(radius), second.mul_(second_sign).mul_(radius)


def _polynomial(x: Tensor, coefficients: tuple[tl.constexpr, ...]) -> Tensor:
    """Horner's rule, lowest coefficient first, every product and sum rounded."""
    y = torch.full_like(x, coefficients[-1].value)
    for coefficient in coefficients[-2::-1]:
        y.mul_(x).add_(coefficient.value)
    return y


@triton.jit
def _box_muller_kernel(radius_word, angle_word):
    bits = (radius_word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True) - _SQRT_HALF_BITS
    exponent = ((bits >> 23) - 32).to(tl.float32)
    x = ((bits & _MANTISSA_BITS) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    log = (((_LOG_7 * x + _LOG_6) * x + _LOG_5) * x + _LOG_4) * x + _LOG_3
    log = ((log * x + _LOG_2) * x + _LOG_1) * x + _LOG_0
    radius = tl.sqrt_rn(log * (x * x) - 2.0 * x + exponent * _MINUS_TWO_LOG_TWO)

    quarter = (angle_word + _EIGHTH_TURN) >> 30
    y = (angle_word << 2).to(tl.int32, bitcast=True).to(tl.float32) * _TWO_TO_MINUS_32
    y2 = y * y
    sine = (((_SIN_3 * y2 + _SIN_2) * y2 + _SIN_1) * y2 + _SIN_0) * y
    cosine = ((_COS_2 * y2 + _COS_1) * y2 + _COS_0) * y2 + 1.0
    swap = (quarter & 1) != 0
    first_sign, second_sign = ((quarter + 1) & 2) << 30, (quarter & 2) << 30
    first = tl.where(swap, sine, cosine).to(tl.uint32, bitcast=True) ^ first_sign
    second = tl.where(swap, cosine, sine).to(tl.uint32, bitcast=True) ^ second_sign
    return first.to(tl.float32, bitcast=True) * radius, second.to(tl.float32, bitcast=True) * radius


@triton.jit
def normal_quads(seed, stream, prompt_id, candidate_id, block, QUADS: tl.constexpr):
    """Elements 4j, 4j + 1, 4j + 2 and 4j + 3 of one candidate's noise, QUADS blocks j of it; compile with NO_FUSION."""
    c0 = (block * QUADS + tl.arange(0, QUADS)).to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = zero + candidate_id.to(tl.uint32), zero + prompt_id.to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    n0, n1 = _box_muller_kernel(w0, w1)
    n2, n3 = _box_muller_kernel(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def interleave_quads(n0, n1, n2, n3):
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def normal_block(seed, stream, prompt_id, candidate_id, block, QUADS: tl.constexpr):
    """Elements [4 QUADS block, 4 QUADS (block + 1)) of one candidate's noise; compile with NO_FUSION."""
    n0, n1, n2, n3 = normal_quads(seed, stream, prompt_id, candidate_id, block, QUADS)
    return interleave_quads(n0, n1, n2, n3)


@triton.jit(do_not_specialize=["seed", "stream"])
def _philox_normal_kernel(
    out_ptr, prompt_ids_ptr, candidate_ids_ptr, seed, stream, prompt_stride, K, D, QUADS: tl.constexpr
):  # fmt: skip
    block, k, p = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    candidate_id = tl.load(candidate_ids_ptr + p * prompt_stride + k)
    normals = normal_block(seed, stream, tl.load(prompt_ids_ptr + p), candidate_id, block, QUADS)
    cols = block * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    tl.store(out_ptr + (p * K + k) * D + cols, normals.to(out_ptr.dtype.element_ty), mask=cols < D)


def _philox_normal_triton(
    seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_PK: Tensor, numel: int, dtype: torch.dtype
) -> Tensor:
    P, K = candidate_ids_PK.shape
    out_PKD = torch.empty(P, K, numel, dtype=dtype, device=prompt_ids_P.device)
    candidate_ids_PK, prompt_stride = rows_of_ids(candidate_ids_PK)
    if out_PKD.numel() > 0:
        _philox_normal_kernel[(triton.cdiv(numel, 4 * QUADS), K, P)](
            out_PKD, prompt_ids_P.contiguous(), candidate_ids_PK, seed, stream, prompt_stride, K, numel,
            QUADS=QUADS, **NO_FUSION,
        )  # fmt: skip
    return out_PKD


def _philox_normal_fake(
    seed: int, stream: int, prompt_ids_P: Tensor, candidate_ids_PK: Tensor, numel: int, dtype: torch.dtype
) -> Tensor:
    return prompt_ids_P.new_empty(*candidate_ids_PK.shape, numel, dtype=dtype)


_philox_normal = define_op(
    "philox_normal", triton=_philox_normal_triton, reference=philox_normal_reference, fake=_philox_normal_fake
)


def philox_normal(
    seed: int,
    stream: int,
    prompt_ids_P: Tensor,
    candidate_ids: Tensor,
    numel: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [P, K, numel] on the device of the ids, drawn in float32 and rounded to ``dtype``.

    Element (p, k, i) is a function of (seed, stream, prompt_ids_P[p], id of candidate k, i) alone, equal bit for bit on
    every device.  Ids are int64 and count by their low 32 bits; ``candidate_ids`` are [K] for all prompts or [P, K].
    Raises ValueError for a seed outside [0, 2^63), a stream outside [0, 2^32), a numel outside [1, 2^31) or ids of
    another dtype, shape or device.
    """
    check_seed(seed, stream)
    check_numel(numel)
    candidate_ids_PK = check_candidate_ids(prompt_ids_P, candidate_ids)
    return _philox_normal(seed, stream, prompt_ids_P, candidate_ids_PK, numel, dtype)


def rows_of_ids(candidate_ids_PK: Tensor) -> tuple[Tensor, int]:
    """Ids whose rows a kernel can index, and the stride of a row: 0 where all prompts share one."""
    if candidate_ids_PK.shape[1] > 1 and candidate_ids_PK.stride(1) != 1:
        candidate_ids_PK = candidate_ids_PK.contiguous()
    return candidate_ids_PK, candidate_ids_PK.stride(0)


def check_seed(seed: int, stream: int) -> None:
    """Raise ValueError unless they are the two words of a key and one of a counter."""
    for name, value, bits in (("seed", seed, 63), ("stream", stream, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}; reduce it modulo 2^{bits}")


def check_numel(numel: int) -> None:
    """Raise ValueError unless it is a number of elements that int32 can index."""
    if not 1 <= numel < 2**31:
        raise ValueError(f"numel must be in [1, 2^31), got {numel}; pass the number of elements of one latent")


def check_candidate_ids(prompt_ids_P: Tensor, candidate_ids: Tensor) -> Tensor:
    """Ids [P, K], those of [K] repeated without a copy; ValueError for other dtypes, shapes or devices."""
    check_ids("prompt_ids_P", prompt_ids_P, prompt_ids_P.shape[:1])
    if candidate_ids.dim() == 2:
        check_ids("candidate_ids", candidate_ids, (len(prompt_ids_P), candidate_ids.shape[1]), prompt_ids_P.device)
        return candidate_ids
    check_ids("candidate_ids", candidate_ids, candidate_ids.shape[:1], prompt_ids_P.device)
    return candidate_ids.expand(len(prompt_ids_P), -1)


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> None:
    """Raise ValueError unless they are int64 of this shape and on this device."""
    if ids.dtype != torch.int64 or ids.shape != shape or len(shape) == 0 or ids.device != (device or ids.device):
        raise ValueError(
            f"{name} must be int64 of shape {tuple(shape) or '[number of ids]'} on {device or ids.device}, got "
            f"{ids.dtype} of shape {tuple(ids.shape)} on {ids.device}; pass torch.tensor([...], dtype=torch.int64)"
        )
