"""What the kernels compile to for sm_80, sm_90 and sm_100, on a machine that needs no GPU.

    python -m benchmarks.kernels.cubins            prints tables, and fails on what is wrong
    python -m benchmarks.kernels.cubins --write    also keeps them under benchmarks/results/

Every case of ``benchmarks.kernels`` for sm_90, and for the others of each kernel the case of most registers.  Wrong is:
a register that spills, a kernel that no case launches, or accesses in the machine code that do not add up to the bytes
that a case must move.  The last cannot be said of `group_advantage` and `preprocess_images`, whose programs share
inputs and whose loops load tiles, nor of `grpo_loss`, whose one block is larger than its batch.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from triton.compiler import CompiledKernel

from benchmarks.kernels.case import Case, compiled_size
from benchmarks.kernels.cases import cases
from benchmarks.kernels.compile_only import compile_only, launched_kernels
from benchmarks.kernels.model import modelled_seconds
from benchmarks.kernels.sass import Sass
from benchmarks.report import table, write_report

_WHOLE = 90
_OTHERS = (80, 100)
# once a sample, they read a few float64 a block of elements: not among the bytes of a case
_PER_SAMPLE = ("_finish_kernel", "_finish_errors_kernel")
_SASS: dict[str, Sass] = {}
_HEADER = [
    "kernel",
    "case",
    "registers",
    "spills",
    "stack",
    "shared",
    "instructions",
    "read",
    "written",
    "loads",
    "stores",
]
_HEADER += ["ps memory", "ps instructions"]
_LEGEND = """\
Instructions that one thread runs, and bytes of global memory read and written, are per element of the case, counted
in the machine code; loads and stores are those of a thread, number x bytes.  ps is *modelled*, not measured:
picoseconds an element that an H100 needs at least for the bytes and for the instructions, by
`benchmarks/kernels/model.py`.  A dash: loops that load tiles hide how often their instructions run; loads and stores
are then those of one pass."""


@dataclass(frozen=True)
class Compiled:
    """A launch of a case, compiled for an architecture."""

    architecture: int
    case: Case
    kernel: str
    num_programs: int
    sass: Sass

    def per_element(self, run_by_a_thread: float) -> float:
        return run_by_a_thread * self.sass.num_threads * self.num_programs / self.case.num_elements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="also write a result")
    arguments = parser.parse_args()
    compiled = compile_cases(cases(compiled_size), _WHOLE)
    for architecture in _OTHERS:
        compiled += compile_cases(_of_most_registers(compiled), architecture)
    body = _body(compiled)
    print(body)
    if arguments.write:
        data = {"kernels": [_facts(one) for one in compiled]}
        print(write_report("kernels.cubins", title="What the kernels compile to", body=body, data=data))
    wrong = problems(compiled)
    if wrong:
        raise SystemExit("\n".join(wrong))


def compile_cases(chosen: Iterable[Case], architecture: int) -> list[Compiled]:
    """What Triton's variant of each case launches."""
    compiled: list[Compiled] = []
    with compile_only(architecture) as launches:
        for case in chosen:
            inputs = case.make(torch.device("cpu"), 0)
            # making the inputs may launch kernels too
            launches.clear()
            case.variants["triton"].run(inputs)
            compiled += [
                Compiled(architecture, case, launch.kernel, launch.num_programs, _sass(launch.compiled))
                for launch in launches
            ]
    return compiled


def problems(compiled: list[Compiled]) -> list[str]:
    """One line for each thing that is wrong."""
    wrong = [
        f"{one.kernel} spills registers on sm_{one.architecture} in {one.case.label}"
        for one in compiled
        if one.sass.num_spills or one.sass.stack_bytes
    ]
    for architecture in (_WHOLE, *_OTHERS):
        missing = launched_kernels() - {one.kernel for one in compiled if one.architecture == architecture}
        wrong += [f"{kernel} is launched and no case compiles it for sm_{architecture}" for kernel in sorted(missing)]
    for (architecture, case), group in groupby(compiled, key=lambda one: (one.architecture, one.case)):
        launches = [one for one in group if one.kernel not in _PER_SAMPLE]
        if not case.streams:
            continue
        if not all(one.sass.is_counted for one in launches):
            wrong.append(f"{case.op} {case.label}: a loop on sm_{architecture} hides how many bytes it moves")
            continue
        read, written = (sum(_bytes(one)[kind] for one in launches) for kind in range(2))
        if (read, written) != (case.read_bytes, case.written_bytes):
            wrong.append(
                f"{case.op} {case.label} reads {read:.0f} and writes {written:.0f} bytes on sm_{architecture}, "
                f"and must read {case.read_bytes} and write {case.written_bytes}"
            )
    return wrong


def _sass(compiled: CompiledKernel) -> Sass:
    """Disassembling takes longer than compiling, and cases share kernels."""
    if compiled.hash not in _SASS:
        _SASS[compiled.hash] = Sass(compiled)
    return _SASS[compiled.hash]


def _of_most_registers(compiled: list[Compiled]) -> list[Case]:
    """A case for each kernel, without repetition."""
    whole = [one for one in compiled if one.architecture == _WHOLE]
    most = {one.kernel: one for one in sorted(whole, key=lambda one: one.sass.registers)}
    return list({one.case.op + one.case.label: one.case for one in most.values()}.values())


def _bytes(one: Compiled) -> tuple[float, float]:
    """Read and written, as counted in the machine code."""
    scale = one.sass.num_threads * one.num_programs
    return one.sass.loads.num_bytes * scale, one.sass.stores.num_bytes * scale


def _facts(one: Compiled) -> dict[str, Any]:
    sass, facts = one.sass, {"architecture": one.architecture, "case": f"{one.case.op} {one.case.label}"}
    facts |= {"kernel": one.kernel, "registers": sass.registers, "spills": sass.num_spills, "stack": sass.stack_bytes}
    facts |= {"shared_bytes": sass.shared_bytes, "loads": str(sass.loads), "stores": str(sass.stores)}
    if not sass.is_counted:
        return facts
    seconds = modelled_seconds(sass, one.num_programs)
    return facts | {
        "instructions": one.per_element(sass.num_run()),
        "read": one.per_element(sass.loads.num_bytes),
        "written": one.per_element(sass.stores.num_bytes),
        "modelled_memory": seconds.memory * 1e12 / one.case.num_elements,
        "modelled_instructions": seconds.instructions * 1e12 / one.case.num_elements,
    }


def _body(compiled: list[Compiled]) -> str:
    parts = [_LEGEND]
    for architecture, group in groupby(compiled, key=lambda one: one.architecture):
        shown: dict[int, Compiled] = {}
        for one in group:
            # a kernel that several cases launch is shown once
            shown.setdefault(id(one.sass), one)
        # the model is of an H100
        header = _HEADER if architecture == _WHOLE else _HEADER[:-2]
        rows = [_row(_facts(one))[: len(header)] for one in shown.values()]
        parts.append(f"## sm_{architecture}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _row(facts: dict[str, Any]) -> list[str]:
    counted = ("instructions", "read", "written", "modelled_memory", "modelled_instructions")
    numbers = [f"{facts[name]:.{3 if facts[name] < 1000 else 4}g}" if name in facts else "-" for name in counted]
    resources = [f"{facts[name]:g}" for name in ("registers", "spills", "stack", "shared_bytes")]
    return [facts["kernel"], facts["case"], *resources, *numbers[:3], facts["loads"], facts["stores"], *numbers[3:]]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
