"""Every kernel compiles for A100, H100 and B200 on a machine that has none of them, and moves the bytes it must."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_every_kernel_compiles_without_spilling_and_moves_the_bytes_of_its_case() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels.cubins"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=250)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    for architecture in (80, 90, 100):
        assert re.search(rf"^## sm_{architecture}$", done.stdout, flags=re.MULTILINE)
