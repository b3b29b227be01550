"""What a GPU would be given: an operator's own launchers run on CPU tensors, their kernels are compiled, none runs.

So signatures, constants, options, grids and the divisibility of arguments, which decides how wide accesses are, are
those of a real launch; there is no second list of them that could differ.
"""

import ast
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.library import CustomOpDef
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fastgrpo_kernels


@dataclass(frozen=True)
class Launch:
    """A kernel as it was compiled for one launch."""

    kernel: str
    num_programs: int
    compiled: CompiledKernel


class _Architecture:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, number: int) -> None:
        self._number = number

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        # compiled kernels are kept by device, and must not be mixed up between architectures
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(architecture: int) -> Iterator[list[Launch]]:
    """Operators called inside compile for ``architecture`` (90 is an H100) and add to the list; results are garbage."""
    if os.environ.get("TRITON_INTERPRET"):
        raise ValueError("kernels cannot be compiled under Triton's interpreter; unset TRITON_INTERPRET")
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_launch(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel.__name__, int(torch.tensor(grid).prod()), compiled))

    with ExitStack() as stack:
        for operator in _operators():
            # the operator's default implementation is its launcher
            stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        stack.enter_context(mock.patch.object(torch.cuda, "device", return_value=nullcontext()))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_launch))
        stack.enter_context(mock.patch.object(driver, "_active", _Architecture(architecture)))
        yield launches


def launched_kernels() -> set[str]:
    """Names of all kernels that some code of ``fastgrpo_kernels`` launches: those in ``kernel[grid](...)``."""
    names = set()
    for module in _modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                function = getattr(module, ast.unparse(node.func.value), None)
                if isinstance(function, JITFunction):
                    names.add(function.__name__)
    return names


def _operators() -> list[CustomOpDef]:
    found = [value for module in _modules() for value in vars(module).values() if isinstance(value, CustomOpDef)]
    # one that another module imports is found twice
    return list({id(operator): operator for operator in found}.values())


def _modules() -> list[ModuleType]:
    package = fastgrpo_kernels.__name__
    return [
        importlib.import_module(f"{package}.{info.name}") for info in pkgutil.iter_modules(fastgrpo_kernels.__path__)
    ]
