"""What a run sets for its whole process is as before when it is over: the process is the program's, not the run's.

Threads, deterministic kernels, how products are summed, variables of the environment, loading bars, loggers, and the
memory of its model.  Signal handlers are put back by ``StopRequest``, Hydra's state by ``load_config``.  Where several
threads are inside, the last to leave puts back what the first one found.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

from fastgrpo.known_warnings import known_warnings_hidden
from fastgrpo.models.quiet import loading_bars_hidden

# which fastgrpo.numerics, compile and distributed.slurm set
_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCHINDUCTOR_CACHE_DIR",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_lock = Lock()
_inside: list[ExitStack] = []


@contextmanager
def as_before() -> Iterator[None]:
    """Around what may set any of these."""
    with _lock:
        stack = _inside[0] if _inside else _noted()
        _inside.append(stack)
    try:
        yield
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                stack.close()
        # a model is in circles of references, and the next one would find its memory taken
        gc.collect()


def _noted() -> ExitStack:
    """What puts everything back when it is closed."""
    stack = ExitStack()
    stack.enter_context(loading_bars_hidden())
    stack.enter_context(known_warnings_hidden())
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    is_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    stack.callback(torch.use_deterministic_algorithms, is_deterministic, warn_only=is_lenient)
    matmul: Any = torch.backends.cuda.matmul
    for owner, names in (
        (torch.backends.cudnn, ("deterministic",)),
        (torch.utils.deterministic, ("fill_uninitialized_memory",)),  # type: ignore[attr-defined]
        (matmul, ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")),
    ):
        for name in names:
            stack.callback(setattr, owner, name, getattr(owner, name))
    for name in _VARIABLES:
        stack.callback(_variable(name))
    return stack


def _variable(name: str) -> Callable[[], object]:
    before = os.environ.get(name)

    def put_back() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    return put_back
