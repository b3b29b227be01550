"""An engine that TensorRT built, run on torch tensors by TensorRT's own API: no copies, no wait for the GPU.

``tensorrt`` and ``tensorrt_rtx`` have this API in common.  Letters: B images.
"""

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


def load_library(name: str, extra: str) -> Any:
    """Import a package of the ``extra``; ValueError that names the extra where the package is missing."""
    try:
        return importlib.import_module(name)
    # a package that is there without the libraries that it links to raises OSError
    except (ImportError, OSError) as error:
        raise ValueError(
            f"{name} cannot be imported ({error}); install it with pip install 'fastgrpo[{extra}]', or use "
            "reward_backend=inductor or eager"
        ) from error


def require_gpu() -> None:
    """ValueError where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise ValueError(
            "reward_backend=tensorrt runs on NVIDIA GPUs, and torch sees none; use reward_backend=inductor or eager"
        )


def make_logger(library: Any) -> Any:
    """A logger for TensorRT that logs its warnings as information, and keeps what is worse in ``errors``."""

    class Messages(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.errors.append(message)
            # of an int64 input, for one, it says with every engine that it must be bound as int64
            elif severity == library.ILogger.WARNING:
                _log.info("%s", message)

    return Messages()


class Engine:
    """Inputs [B, ...] on ``device``, B in the engine's profile -> the engine's one output [B].

    It works on the current stream, on which the inputs must be ready, and allocates its output there.
    """

    def __init__(self, library: Any, plan: bytes, names: Sequence[str], device: torch.device) -> None:
        """Raises ValueError with TensorRT's own words for a plan that this GPU, or this version, cannot load."""
        self._device, self._names = device, tuple(names)
        self._logger = make_logger(library)
        with torch.cuda.device(device):
            self._runtime = library.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise ValueError(f"TensorRT cannot load the engine: {'; '.join(self._logger.errors)}")
            self._context = self._engine.create_execution_context()
            # TensorRT waits for the GPU whenever it is called on the default stream
            self._own_stream = torch.cuda.Stream(device)
        found = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        outputs = [name for name in found if self._engine.get_tensor_mode(name) == library.TensorIOMode.OUTPUT]
        if len(outputs) != 1 or {*found} - {*outputs} != {*names}:
            raise ValueError(f"the engine has tensors {found}, of which outputs {outputs}; expected inputs {names}")
        self._output = outputs[0]
        self._dtypes = {name: _DTYPES[self._engine.get_tensor_dtype(name).name] for name in found}

    def __call__(self, *inputs: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        if current != torch.cuda.default_stream(self._device):
            return self._enqueue(inputs, current)
        self._own_stream.wait_stream(current)
        with torch.cuda.stream(self._own_stream):
            output = self._enqueue(inputs, self._own_stream)
        current.wait_stream(self._own_stream)
        # memory may be given away when its own stream is done with it; these are used on another one as well
        for part in inputs:
            part.record_stream(self._own_stream)
        output.record_stream(current)
        return output

    def _enqueue(self, inputs: Sequence[Tensor], stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.device(self._device):
            ready = [part.contiguous() for part in inputs]
            for name, part in zip(self._names, ready, strict=True):
                if part.dtype != self._dtypes[name] or part.device != self._device:
                    raise ValueError(
                        f"the engine's input {name} is {self._dtypes[name]} on {self._device}, got {part.dtype} on "
                        f"{part.device}"
                    )
                if not self._context.set_input_shape(name, tuple(part.shape)):
                    raise ValueError(f"the engine takes no {name} of shape {list(part.shape)}: {self._last_error()}")
                self._context.set_tensor_address(name, part.data_ptr())
            shape = tuple(self._context.get_tensor_shape(self._output))
            output = torch.empty(shape, dtype=self._dtypes[self._output], device=self._device)
            self._context.set_tensor_address(self._output, output.data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ValueError(f"TensorRT could not run the engine: {self._last_error()}")
            return output

    def _last_error(self) -> str:
        return self._logger.errors[-1] if self._logger.errors else "it gave no reason"
