"""Bytes of the tensors that are alive, counted without a GPU and, over FakeTensors, without memory or arithmetic.

Every storage that an operation makes is counted from then on until its last owner, the autograd graph included, lets
go of it.  What a kernel allocates for itself and returns is not seen, nor is the rounding of an allocator.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered: ``live`` bytes of storages that were made inside, and the ``peak`` of that."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # an input that is not known yet was there before, and so were the results that share its storage
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, is_new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._meet(tensor, is_new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _meet(self, tensor: object, *, is_new: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes() if is_new else 0
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._forget, key, num_bytes))
        self.live += num_bytes

    def _forget(self, key: int, num_bytes: int, _: object) -> None:
        del self._storages[key]
        self.live -= num_bytes


class LargestTensor(TorchDispatchMode):
    """While it is entered: ``num_elements`` of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


class WithoutData(FakeTensorMode):
    """Inside, tensors have shapes but no data.  Whoever reads a number gets 1: positive, finite, and true."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(function, types, args, kwargs)
