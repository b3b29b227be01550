"""What no kernel of this machine can exceed: matrix products by dtype and shape, copies by size.

    FLOPs of a product of [M, K] and [K, N]: 2 M K N.  Bytes of a copy: read and written.

M is the rows of SD3.5-medium at 512x512 for 18 sequences, 1024 image and 205 text tokens each.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.kernels.timing import cuda_clock, host_clock, quartiles
from benchmarks.report import table, write_report

_ROUNDS = 10
# in one measurement, so that a short kernel is not taken for its launch
_REPEATS = 10
_ROWS, _WIDTH = 18 * (1024 + 205), 1536
_LORA_COLUMNS = 32
_PRODUCTS = {
    "large": (8192, 8192, 8192),
    "attention projection": (_ROWS, _WIDTH, _WIDTH),
    "feed-forward": (_ROWS, _WIDTH, 4 * _WIDTH),
    "LoRA, down": (_ROWS, _WIDTH, _LORA_COLUMNS),
}
_COPIES = {"64 MiB": 2**26, "1 GiB": 2**30}
# on a CPU, where nothing is a result, so much smaller
_SHRUNK = 16


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shrunk = 1 if device.type == "cuda" else _SHRUNK
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,)
    torch.backends.cuda.matmul.allow_tf32 = True
    products = {
        f"{label}, {str(dtype).removeprefix('torch.')}": _product([n // shrunk for n in shape], dtype, device)
        for label, shape in _PRODUCTS.items()
        for dtype in dtypes
    }
    copies = {label: _copy(size // shrunk**2, device) for label, size in _COPIES.items()}
    body = "\n\n".join(
        [
            f"Medians of {_ROUNDS} times {_REPEATS}, of random numbers; float32 products in TF32.",
            table(["product", "[M, K, N]", "TFLOP/s"], [_row(label, one) for label, one in products.items()]),
            table(["copy", "GB/s read and written"], [[k, f"{v / 1e9:.4g}"] for k, v in copies.items()]),
        ]
    )
    data = {"products": products, "copies_bytes_per_second": copies}
    print(write_report("first_contact.ceilings", title="Ceilings", body=body, data=data).read_text(encoding="utf-8"))


def _row(label: str, product: dict[str, Any]) -> list[str]:
    return [label, str(product["shape"]), f"{product['flops'] / 1e12:.4g}"]


def _product(shape_MKN: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    m, k, n = shape_MKN
    first, second = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return {"shape": shape_MKN, "flops": 2 * m * k * n / _seconds(partial(torch.mm, first, second), device)}


def _copy(size: int, device: torch.device) -> float:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _seconds(partial(target.copy_, source), device)


def _seconds(work: partial[Any], device: torch.device) -> float:
    clock = cuda_clock if device.type == "cuda" else host_clock

    def repeated() -> None:
        for _ in range(_REPEATS):
            work()

    repeated()
    return quartiles([clock(repeated) / _REPEATS for _ in range(_ROUNDS)]).median


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
