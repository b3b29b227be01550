"""Compile every kernel for each architecture, without a GPU: ``python compile_cubins.py``, not in the interpreter."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastgrpo_kernels.philox import _philox_normal_kernel
from fastgrpo_kernels.sde_log_prob import _sde_log_prob_backward_kernel, _sde_log_prob_kernel
from fastgrpo_kernels.sde_step import _sde_step_kernel

ARCHITECTURES = (80, 90, 100)
KERNELS = {
    _philox_normal_kernel: {"BLOCK": 256},
    _sde_step_kernel: {"BLOCK": 1024},
    _sde_log_prob_kernel: {"BLOCK": 1024, "HAS_REFERENCE": True},
    _sde_log_prob_backward_kernel: {"BLOCK": 1024, "HAS_REFERENCE": True},
}
HALF_PRECISION = {"x_ptr", "v_ptr", "x_next_ptr", "v_reference_ptr", "grad_v_ptr"}


def argument_type(name: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "scale" else "i32"
    if name.endswith("ids_ptr"):
        return "*i64"
    if "partial" in name:
        return "*fp64"
    return "*bf16" if name in HALF_PRECISION else "*fp32"


for kernel, constants in KERNELS.items():
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in kernel.arg_names}
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {} if kernel is _philox_normal_kernel else {"enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        print(f"{kernel.__name__} sm_{architecture} {len(compiled.asm['cubin'])} bytes")
