"""Attention without dropout, by the kernels that a machine has.

    out[b, i, h] = sum over j of softmax_j(q[b, i, h] . k[b, j, h] / sqrt(D)) v[b, j, h]

``BACKENDS`` is the table of implementations: differentiable functions of q, k and v [B, L, H, D], all usable inside
``torch.compile(fullgraph=True)``.  A backend that was asked for runs or raises: none stands in for another.  Where
samples have ``lengths``, only their first tokens are seen, and the output of the others means nothing.
Letters: B samples, L tokens, H heads, D width of a head.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn


class Attention(Protocol):
    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None, /) -> Tensor:
        """out [B, L, H, D]; ``lengths_B``, of integers, are how many tokens of each sample there are, None is all."""


_HALF = (torch.bfloat16, torch.float16)
_ANY = (torch.float64, torch.float32, *_HALF)
# earlier ones gave NaN gradients for lengths that 128 does not divide, such as SD3.5's 1229
_MIN_CUDNN = 91501


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a backend needs: a package and how to get it, types, and CUDA devices from one capability to another.

    is_deterministic: whether it can be told to compute the same gradient twice.  takes_lengths: whether samples of a
    batch may be of unlike lengths.
    """

    load: Callable[[], Attention]
    package: str = ""
    install: str = ""
    dtypes: tuple[torch.dtype, ...] = _HALF
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 0))
    runs_on_cpu: bool = False
    is_deterministic: bool = True
    takes_lengths: bool = True


def attention_backend(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, has_lengths: bool = False
) -> Attention:
    """The function of a name in ``BACKENDS``; ``auto`` takes the fastest for the device and type, and says which.

    ``has_lengths`` says that it will be given lengths.  ValueError, with what to install or to choose instead, if it
    cannot run there.
    """
    device = torch.device(device)
    if name == "auto":
        name = _fastest(device, dtype)
        # on a CPU there is nothing to choose
        if device.type == "cuda":
            _announce(name)
    if name not in BACKENDS:
        raise ValueError(f"runtime.attention must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
    if torch.are_deterministic_algorithms_enabled() and not BACKENDS[name].is_deterministic:
        raise ValueError(
            f"runtime.attention={name} may add up gradients in another order each time, which "
            "runtime.deterministic=true excludes; use runtime.attention=auto, sdpa, flash or flash3"
        )
    if has_lengths and not BACKENDS[name].takes_lengths:
        raise ValueError(
            f"runtime.attention={name} cannot leave out the tokens that fill up the texts of this model; use "
            "runtime.attention=auto, sdpa, flash or flash3"
        )
    if name == "sdpa" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return _masked
    if why := why_not(name, device, dtype):
        raise ValueError(f"runtime.attention={name} {why}, or use runtime.attention=auto")
    try:
        return BACKENDS[name].load()
    except ImportError as error:
        raise ValueError(
            f"runtime.attention={name}: {BACKENDS[name].package} is there but cannot be imported ({error}); build it "
            f"against this version of torch: {BACKENDS[name].install}, or use another runtime.attention"
        ) from error


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What a backend lacks to run on the device, with the remedy; empty if it can."""
    backend = BACKENDS[name]
    if device.type != "cuda":
        return "" if backend.runs_on_cpu else f"needs a CUDA device, got {device.type}: use runtime.device=cuda"
    if dtype not in backend.dtypes:
        return f"does not compute {str(dtype).removeprefix('torch.')}: use model.dtype=bfloat16"
    first, last = backend.capabilities
    capability = torch.cuda.get_device_capability(device)
    if not first <= capability <= last:
        return f"needs a GPU of compute capability {_range(first, last)}, this one has {'.'.join(map(str, capability))}"
    # asked of the finder alone: a package may be there and not load
    if backend.package and find_spec(backend.package) is None:
        return f"needs the package {backend.package}: {backend.install}"
    version = torch.backends.cudnn.version() or 0
    if name == "cudnn" and version < _MIN_CUDNN:
        return f"needs cuDNN 9.15.1, this is {version}: install a newer nvidia-cudnn"
    return ""


def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    # on an H100 FlashAttention-3 outruns cuDNN and FlashAttention-2 at widths 64 and 128 from 1024 tokens on
    # (arXiv:2407.08608, figures 5 and 6); without it PyTorch's own order is best: cuDNN on Hopper and Blackwell from
    # 9.15.1 on, elsewhere its copy of FlashAttention-2
    return "sdpa" if why_not("flash3", device, dtype) else "flash3"


@cache
def _announce(name: str) -> None:
    """Once a process: which backend ``auto`` took."""
    print(f"fastgrpo: runtime.attention=auto takes {name}", file=sys.stderr)


def _sdpa(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    if lengths_B is not None and q_BLHD.is_cuda and q_BLHD.dtype in _HALF:
        # a mask would leave PyTorch its slower kernels only
        return _packed(varlen_attn, q_BLHD, k_BLHD, v_BLHD, lengths_B)
    return _masked(q_BLHD, k_BLHD, v_BLHD, lengths_B)


def _masked(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    """PyTorch's own choice, on any device."""
    q_BHLD, k_BHLD, v_BHLD = (part.transpose(1, 2) for part in (q_BLHD, k_BLHD, v_BLHD))
    mask_B11L = None
    if lengths_B is not None:
        mask_B11L = torch.arange(k_BLHD.shape[1], device=lengths_B.device) < lengths_B[:, None, None, None]
    return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, mask_B11L).transpose(1, 2)


def _packed(varlen: Any, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor, **settings: Any) -> Tensor:
    """By a kernel for sequences end to end.  What fills a sample up is a sequence of its own, which nobody looks at.

    So the number of tokens stays what it is, and neither indices are made nor a length read back from the GPU.
    """
    num_samples, num_tokens = q_BLHD.shape[:2]
    starts_B = num_tokens * torch.arange(num_samples, dtype=torch.int32, device=lengths_B.device)
    inner = torch.stack([starts_B, starts_B + lengths_B.to(torch.int32)], dim=1).flatten()
    bounds = F.pad(inner, (0, 1), value=num_samples * num_tokens)
    rows = (part.flatten(0, 1) for part in (q_BLHD, k_BLHD, v_BLHD))
    return varlen(*rows, bounds, bounds, num_tokens, num_tokens, **settings).unflatten(0, (num_samples, num_tokens))


def _cudnn(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    q_BHLD, k_BHLD, v_BHLD = (part.transpose(1, 2) for part in (q_BLHD, k_BLHD, v_BLHD))
    # the operator itself: sdpa_kernel would set flags of the whole process around every call.  It keeps the sums of the
    # softmax also where there is no gradient, so that rollout and update run one kernel
    out_BHLD, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q_BHLD, k_BHLD, v_BHLD, None, True)
    return out_BHLD.transpose(1, 2)


@cache
def _load_flash() -> Attention:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func)


@cache
def _load_flash3() -> Attention:
    # not torch.nn.attention.activate_flash_attention_impl, which swaps the kernels of every model in the process
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
        raise ImportError("it is older than November 2025, when it learned to be compiled")
    return _flash(flash_attn_func, flash_attn_varlen_func)


def _flash(flash_attn_func: Any, flash_attn_varlen_func: Any) -> Attention:
    def flash(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        # both packages add up gradients by atomics unless they are told
        how = {"deterministic": torch.are_deterministic_algorithms_enabled()}
        if lengths_B is not None:
            return _packed(flash_attn_varlen_func, q_BLHD, k_BLHD, v_BLHD, lengths_B, **how)
        return flash_attn_func(q_BLHD, k_BLHD, v_BLHD, **how)

    return flash


@cache
def _load_xformers() -> Attention:
    import xformers.ops  # noqa: F401

    return _xformers


def _xformers(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lengths_B: Tensor | None = None) -> Tensor:
    return _xformers_forward(q_BLHD, k_BLHD, v_BLHD)[0]


# operators of our own around xformers: its choice of kernels, written in Python, breaks a compiled graph
@custom_op("fastgrpo::xformers_forward", mutates_args=())
def _xformers_forward(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    from xformers.ops import memory_efficient_attention_forward_requires_grad

    out_BLHD, log_sum_BHL = memory_efficient_attention_forward_requires_grad(q_BLHD, k_BLHD, v_BLHD)
    # some of its kernels pad the sums to a multiple of 32
    return out_BLHD.contiguous(), log_sum_BHL[..., : q_BLHD.shape[1]].contiguous()


@custom_op("fastgrpo::xformers_backward", mutates_args=())
def _xformers_backward(
    grad_BLHD: Tensor, out_BLHD: Tensor, log_sum_BHL: Tensor, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import memory_efficient_attention_backward

    grads = memory_efficient_attention_backward(grad_BLHD.contiguous(), out_BLHD, log_sum_BHL, q_BLHD, k_BLHD, v_BLHD)
    # views of one storage, which an operator may not return
    return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in grads)


@_xformers_forward.register_fake
def _(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    B, L, H, D = q_BLHD.shape
    return q_BLHD.new_empty(B, L, H, D), q_BLHD.new_empty(B, H, L, dtype=torch.float32)


@_xformers_backward.register_fake
def _(
    grad_BLHD: Tensor, out_BLHD: Tensor, log_sum_BHL: Tensor, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q_BLHD.new_empty(q_BLHD.shape), k_BLHD.new_empty(k_BLHD.shape), v_BLHD.new_empty(v_BLHD.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs)


def _gradients(ctx: Any, grad_BLHD: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _xformers_backward(grad_BLHD, *ctx.saved_tensors)


_xformers_forward.register_autograd(_gradients, setup_context=_keep)


def _range(first: tuple[int, int], last: tuple[int, int]) -> str:
    return f"{first[0]}.{first[1]}" + (" and more" if last[0] == 99 else f" to {last[0]}.{last[1]}" * (last != first))


BACKENDS = {
    "sdpa": Backend(load=lambda: _sdpa, dtypes=_ANY, capabilities=((0, 0), (99, 0)), runs_on_cpu=True),
    "flash": Backend(
        load=_load_flash, package="flash_attn", install="pip install --no-build-isolation 'fastgrpo[flash-attn]'"
    ),
    "flash3": Backend(
        load=_load_flash3,
        package="flash_attn_interface",
        install="build the hopper folder of Dao-AILab/flash-attention",
        capabilities=((9, 0), (9, 0)),
    ),
    # PyTorch itself leaves cuDNN out where it is to be deterministic, and xformers says nothing of it
    "cudnn": Backend(load=lambda: _cudnn, is_deterministic=False, takes_lengths=False),
    "xformers": Backend(
        load=_load_xformers,
        package="xformers",
        install="pip install 'fastgrpo[xformers]'",
        is_deterministic=False,
        takes_lengths=False,
    ),
}
