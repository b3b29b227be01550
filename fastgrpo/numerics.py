"""How exactly a process computes: the settings of PyTorch that hold for all of it, made in this one place."""

import os

import torch

# the sizes that cuBLAS documents as deterministic where several streams are used
_WORKSPACE, _WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def set_numerics(*, deterministic: bool) -> None:
    """Sums of products in float32 throughout and, if asked for, every kernel of a GPU the same from run to run.

    cuBLAS may cut a long sum, as those over all tokens of a batch in the gradients of adapters are, and by PyTorch's
    default adds the pieces up in bfloat16 or float16.  Here they are added in float32.

    ``deterministic``: kernels that add by atomics, as attention's backward pass does, are replaced by others where
    there are such, and raise where not, from here to the end of the process.  To be called before it first multiplies
    on a GPU.  ValueError if the environment forbids it.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    if not deterministic:
        return
    if os.environ.setdefault(_WORKSPACE, _WORKSPACES[0]) not in _WORKSPACES:
        raise ValueError(
            f"runtime.deterministic=true needs {_WORKSPACE} to be {' or '.join(_WORKSPACES)}, and the environment has "
            f"{os.environ[_WORKSPACE]!r}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # every output of our kernels is written: filling memory first would find nothing, and takes a kernel each time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
