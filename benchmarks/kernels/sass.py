"""A compiled kernel's machine code, counted.

Counts are of what one thread runs in one program.  Code that is only called (the slow paths of divisions and square
roots) is left out; of a branch both sides are counted.  How often a loop runs cannot be read from machine code.
Triton's intermediate code says how many passes there are, and the scalars that a pass loads say how many of them the
compiler laid out in one body.  That fails where a loop loads tiles: how many instructions those are is what is asked.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_LOOP = re.compile(r"^( *)\S[^\n]*for %\w+ = %c0_\w+ to %c(\d+)_\w+ step %c1_.*?^\1}", re.MULTILINE | re.DOTALL)
_SCALAR_LOAD = re.compile(r"tt\.load .*: !tt\.ptr<")
_SCALAR_STORE = re.compile(r"tt\.store .*: !tt\.ptr<")
_TILE_LOAD = re.compile(r"(tt\.load|async_copy).*: tensor<")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")
# what the special function unit does
_SPECIAL = ("MUFU", "F2F", "F2I", "I2F")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def is_a(self, *names: str) -> bool:
        return self.name.split(".")[0] in names

    @property
    def target(self) -> int:
        """Where a branch or a call leads."""
        return int(self.operands.rpartition("0x")[2], 16)

    @property
    def width(self) -> int:
        """Bytes of a memory access."""
        return next((_WIDTHS[part] for part in self.name.split(".") if part in _WIDTHS), 4)


class Loop(NamedTuple):
    first: int
    last: int
    # how often its body runs; None where that is not known
    times: float | None


@dataclass(frozen=True)
class Accesses:
    """Accesses of one thread by their width in bytes."""

    counts: dict[int, float]

    @property
    def num_bytes(self) -> float:
        return sum(width * count for width, count in self.counts.items())

    def __str__(self) -> str:
        return " + ".join(f"{count:g} x {width}" for width, count in sorted(self.counts.items(), reverse=True)) or "-"


class Sass:
    def __init__(self, compiled: CompiledKernel) -> None:
        self.num_threads = 32 * compiled.metadata.num_warps
        self.shared_bytes = compiled.metadata.shared
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            self.instructions = _body(_dump("-sass", file.name))
            usage = _dump("-res-usage", file.name)
        self.registers, self.stack_bytes = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
        self._code = compiled.asm["ttgir"]

    @property
    def is_counted(self) -> bool:
        """Whether it is known how often each instruction runs."""
        return all(loop.times is not None for loop in self._loops)

    def num_run(self, *names: str) -> float:
        """Instructions, all or those of some names."""
        return sum(self._times(one) for one in self.instructions if not names or one.is_a(*names))

    @property
    def num_spills(self) -> float:
        """Loads and stores of registers that did not fit."""
        return self.num_run("LDL", "STL")

    @property
    def num_shared(self) -> float:
        """Loads and stores of shared memory: changes of layout and reductions."""
        return self.num_run("LDS", "STS", "LDSM", "STSM")

    @property
    def num_float64(self) -> float:
        return self.num_run(*_FLOAT64)

    @property
    def num_special(self) -> float:
        return self.num_run(*_SPECIAL)

    @property
    def loads(self) -> Accesses:
        """Of tiles, from global memory; the scalars that all threads read alike are left out."""
        return self._tile_accesses(_SCALAR_LOAD, "LDG", "LDGSTS")

    @property
    def stores(self) -> Accesses:
        return self._tile_accesses(_SCALAR_STORE, "STG")

    def _tile_accesses(self, scalar: re.Pattern[str], *names: str) -> Accesses:
        counts: Counter[int] = Counter()
        for one in self.instructions:
            if one.is_a(*names):
                counts[one.width] += self._times(one)  # type: ignore[assignment]
        num_scalars = len(scalar.findall(self._code))
        for loop in _LOOP.finditer(self._code):
            num_scalars += (int(loop[2]) - 1) * len(scalar.findall(loop[0]))
        # no scalar is wider than what the tiles are accessed in
        for width in sorted(counts):
            dropped = min(num_scalars, counts[width])
            counts[width], num_scalars = counts[width] - dropped, num_scalars - dropped
        return Accesses({width: count for width, count in counts.items() if count})

    def _times(self, instruction: Instruction) -> float:
        around = [loop for loop in self._loops if loop.first <= instruction.address <= loop.last]
        return 1 if not around else around[0].times or 1

    @cached_property
    def _loops(self) -> list[Loop]:
        back = [one for one in self.instructions if one.is_a("BRA") and one.target <= one.address]
        passes = list(_LOOP.finditer(self._code))
        loops = []
        for branch in back:
            inside = [one for one in self.instructions if branch.target <= one.address <= branch.address]
            times = None
            if len(back) == len(passes) == 1 and not _TILE_LOAD.search(passes[0][0]):
                num_loads = sum(one.is_a("LDG") for one in inside)
                times = int(passes[0][2]) * len(_SCALAR_LOAD.findall(passes[0][0])) / max(num_loads, 1)
            loops.append(Loop(branch.target, branch.address, times))
        return loops


def _body(listing: str) -> list[Instruction]:
    """Up to the last EXIT; behind that are subroutines, which end in RET, and padding."""
    instructions = [Instruction(int(address, 16), *rest) for address, *rest in _INSTRUCTION.findall(listing)]
    last = max(one.address for one in instructions if one.is_a("EXIT"))
    return [one for one in instructions if one.address <= last and not one.is_a("NOP")]


def _dump(what: str, path: str) -> str:
    done = subprocess.run([_CUOBJDUMP, what, path], capture_output=True, text=True, check=True)
    # -res-usage answers on either stream
    return done.stdout + done.stderr
