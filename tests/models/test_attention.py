"""Every backend computes attention: the real ones where they run, stand-ins of their packages where they do not.

A stand-in has the signature and the conventions of the real package's function and records its calls.
Letters: B samples, L tokens, H heads, D width of a head.
"""

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from fastgrpo.models import attention
from fastgrpo.models.attention import BACKENDS, Attention, attention_backend, why_not

# largest difference from float64, as a share of the largest value there
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
SMALL = {"tiny": (2, 26, 2, 16), "one token": (1, 1, 1, 8), "odd": (3, 77, 3, 64)}
FULL = {"sd35": (2, 1229, 24, 64), "flux": (1, 1536, 24, 128)}


def reference(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    scores_BHLL = torch.einsum("bihd,bjhd->bhij", q_BLHD, k_BLHD) / q_BLHD.shape[-1] ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores_BHLL.softmax(dim=-1), v_BLHD)


def make_qkv(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def outputs(attend: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """The result and the three gradients of a fixed weighting of it."""
    out = attend(*qkv)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), qkv)]


def assert_is_attention(attend: Attention, qkv: list[Tensor]) -> None:
    exact = outputs(reference, [part.detach().double().requires_grad_() for part in qkv])
    for found, expected in zip(outputs(attend, qkv), exact, strict=True):
        assert found.dtype == qkv[0].dtype
        assert found.shape == expected.shape
        difference = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert difference <= TOLERANCES[qkv[0].dtype]


def one_by_one(
    q_RHD: Tensor, k_RHD: Tensor, v_RHD: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What kernels for sequences end to end compute, R rows in all."""
    assert cu_q.dtype == torch.int32
    assert torch.equal(cu_q, cu_k)
    sizes = cu_q.diff().tolist()
    assert sum(sizes) == len(q_RHD)
    assert max(sizes) <= max_q == max_k
    parts = zip(*(part.split(sizes) for part in (q_RHD, k_RHD, v_RHD)), strict=True)
    return torch.cat([reference(*(one[None] for one in part))[0] if len(part[0]) else part[0] for part in parts])


def install_nothing(monkeypatch: pytest.MonkeyPatch) -> Attention:
    return attention_backend("sdpa")


def install_varlen(monkeypatch: pytest.MonkeyPatch) -> Attention:
    return lambda q, k, v, lengths=None, /: attention._packed(one_by_one, q, k, v, lengths)


def installed(install: Any, load: Any) -> Any:
    def made(monkeypatch: pytest.MonkeyPatch) -> Attention:
        install(monkeypatch, Calls())
        return load()

    return made


@pytest.mark.parametrize("name", ["sdpa", "packed", "flash", "flash3"])
@pytest.mark.parametrize("lengths", [(7, 3, 5), (7, 7, 7), (1, 7, 2)])
def test_a_sample_sees_its_own_tokens_alone(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend: Callable[..., Tensor] = {
        "sdpa": install_nothing,
        "packed": install_varlen,
        "flash": installed(install_flash, attention._load_flash),
        "flash3": installed(install_flash3, attention._load_flash3),
    }[name](monkeypatch)
    qkv = make_qkv((3, 7, 2, 8), torch.float64)
    weights = torch.randn(3, 7, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, length in enumerate(lengths):
        weights[row, length:] = 0
    out = attend(*qkv, torch.tensor(lengths, dtype=torch.int32))
    found = [out * (weights != 0), *torch.autograd.grad((out * weights).sum(), qkv)]
    expected = [torch.zeros_like(part) for part in found]
    for row, length in enumerate(lengths):
        alone = [part[row : row + 1, :length].detach().requires_grad_() for part in qkv]
        own = reference(*alone)
        grads = torch.autograd.grad((own * weights[row : row + 1, :length]).sum(), alone)
        for place, part in zip(expected, (own, *grads), strict=True):
            place[row, :length] = part[0]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flash", "flash3"])
def test_lengths_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    if why := why_not(name, device, torch.bfloat16):
        pytest.skip(why)
    attend: Callable[..., Tensor] = attention_backend(name, device=device, dtype=torch.bfloat16, has_lengths=True)
    lengths = torch.tensor([1229, 1100, 1024], dtype=torch.int32, device=device)
    qkv = make_qkv((3, 1229, 24, 64), torch.bfloat16, "cuda")
    for run in (attend, torch.compile(attend, fullgraph=True)):
        found = run(*qkv, lengths)
        for row, length in enumerate(lengths.tolist()):
            exact = reference(*(part[row : row + 1, :length].double() for part in qkv))[0]
            assert (found[row, :length].double() - exact).abs().max() <= TOLERANCES[torch.bfloat16] * exact.abs().max()


@pytest.mark.parametrize("name", ["cudnn", "xformers"])
def test_backends_without_lengths_say_so(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"runtime\.attention={name} cannot leave out the tokens that fill up the texts"
    ):
        attention_backend(name, device="cpu", has_lengths=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_sdpa_on_a_cpu_is_attention_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_is_attention(attention_backend("sdpa", device="cpu", dtype=dtype), make_qkv(shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FULL.values(), ids=FULL)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_backends_agree_at_full_size(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, compiled: bool, float32_is_exact: None
) -> None:
    if why := why_not(name, torch.device("cuda"), dtype):
        pytest.skip(why)
    attend = attention_backend(name, device="cuda", dtype=dtype)
    attend = torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend
    assert_is_attention(attend, make_qkv(shape, dtype, "cuda"))


class Calls(list[dict[str, Any]]):
    """What a stand-in was called with; it computes as the formula says."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **options: Any) -> Tensor:
        self.append({"shape": tuple(q.shape), "dtype": q.dtype, "scale": scale, **options})
        return reference(q.double(), k.double(), v.double()).to(q.dtype)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that says it has an H100 and the packages of this process; loaders start and end afresh."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    loaders = (attention._load_flash, attention._load_flash3, attention._load_xformers, attention._announce)
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None)
    module.__path__ = []
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def install_flash(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        assert (dropout_p, causal, window_size, softcap, return_attn_probs) == (0.0, False, (-1, -1), 0.0, False)
        assert alibi_slopes is None
        return calls(q, k, v, softmax_scale, deterministic=deterministic)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        assert (dropout_p, softmax_scale, causal) == (0.0, None, False)
        return one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    install(monkeypatch, "flash_attn", **functions)


def install_flash3(monkeypatch: pytest.MonkeyPatch, calls: Calls, *, compiles: bool = True) -> None:
    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        qv: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        sm_margin: int = 0,
        return_attn_probs: bool = False,
    ) -> Tensor:
        assert (causal, window_size, attention_chunk, softcap, num_splits) == (False, (-1, -1), 0, 0.0, 1)
        assert (qv, q_descale, k_descale, v_descale, pack_gqa) == (None,) * 5
        assert (sm_margin, return_attn_probs) == (0, False)
        return calls(q, k, v, softmax_scale, deterministic=deterministic)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor:
        assert (seqused_q, seqused_k, softmax_scale, causal) == (None, None, None, False)
        return one_by_one(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    install(monkeypatch, "flash_attn_interface", **functions)
    operators = ModuleType("flash_attn_3")
    if compiles:
        vars(operators)["_flash_attn_forward"] = object()
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)


def install_xformers(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, attn_bias: None = None, p: float = 0.0, scale: float | None = None):
        scores_BHLL = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / q.shape[-1] ** 0.5
        # padded, as its cutlass kernel does
        sums = torch.nn.functional.pad(scores_BHLL.logsumexp(-1).float(), (0, -q.shape[1] % 32), value=torch.inf)
        return calls(q, k, v, scale), sums

    def backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, ...]:
        assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
        q, k, v, g, out = (part.double() for part in (query, key, value, grad, output))
        scale = q.shape[-1] ** -0.5
        weights_BHLL = (torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse.double()[..., None]).exp()
        inner_BHL = torch.einsum("bihd,bihd->bhi", g, out)
        slopes_BHLL = weights_BHLL * (torch.einsum("bihd,bjhd->bhij", g, v) - inner_BHL[..., None]) * scale
        grads = (
            torch.einsum("bhij,bjhd->bihd", slopes_BHLL, k),
            torch.einsum("bhij,bihd->bjhd", slopes_BHLL, q),
            torch.einsum("bhij,bihd->bjhd", weights_BHLL, g),
        )
        # one storage for all three, as xformers may return them
        return tuple(torch.stack(grads).to(query.dtype).unbind())

    install(monkeypatch, "xformers")
    install(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
    )


INSTALL: dict[str, Any] = {"flash": install_flash, "flash3": install_flash3, "xformers": install_xformers}


@pytest.mark.parametrize("name", INSTALL)
@pytest.mark.usefixtures("hopper")
def test_the_chosen_package_runs_and_is_called_as_it_wants(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    INSTALL[name](monkeypatch, calls)
    attend = attention_backend(name, device="cuda", dtype=torch.bfloat16)

    assert_is_attention(attend, make_qkv((2, 26, 3, 16), torch.bfloat16))

    (call,) = calls
    assert call["shape"] == (2, 26, 3, 16)
    assert call["dtype"] == torch.bfloat16
    # none is 1 / sqrt(D) to each of them
    assert call["scale"] is None


@pytest.mark.parametrize("name", ["flash", "flash3"])
@pytest.mark.usefixtures("hopper", "numerics_are_restored")
def test_flash_attention_is_deterministic_when_torch_is_told_to_be(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    INSTALL[name](monkeypatch, calls)
    attend = attention_backend(name, device="cuda", dtype=torch.bfloat16)
    qkv = make_qkv((1, 2, 1, 8), torch.bfloat16)
    attend(*qkv)
    torch.use_deterministic_algorithms(True)
    attend(*qkv)
    assert [call["deterministic"] for call in calls] == [False, True]


@pytest.mark.parametrize("name", ["cudnn", "xformers"])
@pytest.mark.usefixtures("hopper", "numerics_are_restored")
def test_attention_that_cannot_be_deterministic_is_refused_where_it_has_to_be(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ValueError, match=rf"runtime.attention={name} may add up .*use runtime.attention=auto, sdpa"):
        attention_backend(name, device="cuda", dtype=torch.bfloat16)


@pytest.mark.usefixtures("hopper")
def test_xformers_is_one_operator_of_a_compiled_graph(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    install_xformers(monkeypatch, calls)
    attend = attention_backend("xformers", device="cuda", dtype=torch.bfloat16)
    assert_is_attention(
        torch.compile(attend, fullgraph=True, backend="aot_eager"), make_qkv((2, 26, 3, 16), torch.half)
    )
    assert len(calls) == 1
    qkv = make_qkv((1, 5, 2, 8), torch.float32)
    torch.library.opcheck(attention._xformers_forward, tuple(qkv))


@pytest.mark.usefixtures("hopper")
def test_cudnn_is_its_own_operator_forward_and_backward_of_a_compiled_graph() -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = (node for node in graph.graph.nodes if "attention" in str(node.target))
        seen.extend((str(node.target), tuple(node.args[0].meta["val"].shape)) for node in calls)
        return make_boxed_func(graph)

    attend = attention_backend("cudnn", device="cuda", dtype=torch.bfloat16)
    attend = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    qkv = [torch.empty(2, 26, 3, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)]
    out_BLHD = attend(*qkv)
    grads = torch.autograd.grad(out_BLHD.sum(), qkv)
    assert out_BLHD.shape == (2, 26, 3, 64)
    assert [grad.shape for grad in grads] == [(2, 26, 3, 64)] * 3
    heads_first = (2, 3, 26, 64)
    assert seen == [
        ("aten._scaled_dot_product_cudnn_attention.default", heads_first),
        ("aten._scaled_dot_product_cudnn_attention_backward.default", heads_first),
    ]


@pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"sdpa"}))
def test_a_cpu_has_only_sdpa(name: str) -> None:
    with pytest.raises(ValueError, match=f"runtime.attention={name} needs a CUDA device, got cpu"):
        attention_backend(name, device="cpu")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("name", "remedy"),
    [("flash", r"fastgrpo\[flash-attn\]"), ("flash3", "hopper folder"), ("xformers", r"fastgrpo\[xformers\]")],
)
def test_a_missing_package_raises_with_what_to_install(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"needs the package .*{remedy}"):
        attention_backend(name, device="cuda", dtype=torch.bfloat16)


@pytest.mark.usefixtures("hopper")
def test_a_package_that_does_not_import_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    # as the namespace that another FlashAttention leaves behind
    install(monkeypatch, "flash_attn")
    with pytest.raises(ValueError, match=r"flash_attn is there but cannot be imported .*build it against"):
        attention_backend("flash", device="cuda", dtype=torch.bfloat16)


@pytest.mark.usefixtures("hopper")
def test_a_flash3_that_cannot_be_compiled_raises(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash3(monkeypatch, calls, compiles=False)
    with pytest.raises(ValueError, match="older than November 2025"):
        attention_backend("flash3", device="cuda", dtype=torch.bfloat16)


@pytest.mark.usefixtures("hopper")
def test_wrong_types_devices_and_versions_raise(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cudnn does not compute float32: use model.dtype=bfloat16"):
        attention_backend("cudnn", device="cuda", dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ValueError, match=r"needs cuDNN 9.15.1, this is 91002"):
        attention_backend("cudnn", device="cuda", dtype=torch.bfloat16)
    install_flash3(monkeypatch, calls)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 9.0, this one has 10.0"):
        attention_backend("flash3", device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8.0 and more, this one has 7.5"):
        attention_backend("cudnn", device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="auto or one of sdpa, flash, flash3, cudnn, xformers, got 'fa4'"):
        attention_backend("fa4")


@pytest.mark.usefixtures("hopper")
def test_auto_takes_flash3_where_it_is_and_says_so_once(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_flash3(monkeypatch, calls)
    for _ in range(2):
        attention_backend("auto", device="cuda", dtype=torch.bfloat16)(*make_qkv((1, 2, 1, 8), torch.bfloat16))
    assert len(calls) == 2
    assert capsys.readouterr().err == "fastgrpo: runtime.attention=auto takes flash3\n"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.half)])
def test_auto_takes_sdpa_elsewhere(device: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention_backend("auto", device=device, dtype=dtype) is attention._sdpa
    said = {"cpu": "", "cuda": "fastgrpo: runtime.attention=auto takes sdpa\n"}
    assert capsys.readouterr().err == said[device]
