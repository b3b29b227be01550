"""Devices and dtypes over which the kernel tests run."""

import pytest
import torch

# of a public function, which takes the reference on a CPU and the kernel on a GPU
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# of a kernel: Triton's interpreter truncates float32 to bfloat16, a GPU rounds
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
