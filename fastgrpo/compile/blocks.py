"""How a model's repeated block runs: each piece is a function of a function that returns what runs it.

``Uncompiled`` is PyTorch as it is, ``CompiledBlocks`` is torch.compile with static shapes.  A block is a function of
its module and of tensors, so one compilation serves all blocks of a kind: weights are inputs of the graph.
What rollout and update run must be one graph.  In float32 the graphs with and without gradient round alike; in
bfloat16 they do not, since a fused kernel keeps its own intermediate results in float32 and they are fused otherwise.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch._inductor.config as inductor
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from fastgrpo.files.private_directory import make_private
from fastgrpo.resolution import MAX_RESOLUTIONS

P = ParamSpec("P")
R = TypeVar("R")

MODES = ("default", "max-autotune-no-cudagraphs")
# of one function in a resolution: 3 kinds of SD3.5's blocks, times sampling, lossy sampling, the branches without
# gradient, the first block and the others under gradient, times up to 4 batch sizes; other families have fewer kinds
# and up to 5 lengths of texts; dynamo's own 8 is for one shape
MAX_VARIANTS = 128 * MAX_RESOLUTIONS
_LINK_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Uncompiled:
    """PyTorch's own kernels, one by one."""

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        return function

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What runs ``function`` of tensors alone, the blocks and all around them, without gradient."""
        return function


@dataclass(frozen=True, kw_only=True)
class CompiledBlocks:
    """torch.compile, once for each kind, grad mode and shape; ``mode`` is torch.compile's.

    ``cache`` is a directory in which later processes find the kernels; nobody else may have access to it.  It and
    dynamo's limit of variants are settings of the process.  A function that cannot be compiled raises, and so does one
    that needs more than ``MAX_VARIANTS``: eager does not stand in.  The first call of each takes seconds to minutes,
    and a C++ compiler on a CPU.
    """

    mode: str = "default"
    cache: str = "~/.cache/fastgrpo/compile"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"compile.mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if torch._dynamo.config.disable:
            raise ValueError(
                "torch.compile is turned off by TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE; unset it, or use "
                "compile=eager"
            )
        directory = Path(self.cache).expanduser().absolute()
        make_private(directory, "compile.cache")
        _remove_unfinished(directory)
        # inductor and triton read it whenever they look something up; their own default is a guessable place in /tmp
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), MAX_VARIANTS))
        compiled = torch.compile(function, fullgraph=True, dynamic=False, options=_options(self.mode))

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return compiled(*args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise RuntimeError(
                    f"{function.__name__} was compiled {torch._dynamo.config.recompile_limit} times: its shapes or "
                    "settings change from call to call.  TORCH_LOGS=recompiles says which; compile=eager does without"
                ) from error

        return run

    def forward(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What runs ``function`` of tensors alone, the blocks and all around them, without gradient."""
        return function


def _options(mode: str) -> dict[str, Any]:
    """Inductor's of a mode, and ours: what is concatenated is written to its place by the kernels that compute it."""
    limits = ("max_pointwise_cat_inputs", "max_complex_pointwise_cat_inputs")
    return torch._inductor.list_mode_options(mode) | {limit: 0 for limit in limits if hasattr(inductor, limit)}


def _remove_unfinished(directory: Path) -> None:
    """Empty libraries, which a process leaves that is killed while it links: they are taken for finished ones."""
    for library in directory.rglob("*.so"):
        status = library.stat()
        # a younger one may still be linked by another process
        if status.st_size == 0 and time.time() - status.st_mtime > _LINK_SECONDS:
            library.unlink(missing_ok=True)


def num_compilations() -> int:
    """Graphs that torch.compile has made in this process so far, for anything, found on disk or not."""
    return int(counters["stats"]["unique_graphs"])
