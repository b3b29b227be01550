"""Times every operator of ``fastgrpo_kernels`` on a GPU, beside plain PyTorch, torch.compile and a device copy.

    python -m benchmarks.kernels                       all cases, a result under benchmarks/results/
    python -m benchmarks.kernels --ops sde_step --quick
    python -m benchmarks.kernels --check               no timings: do all variants of all cases agree?

A case whose variants disagree is refused.  Without a GPU only --check runs, in miniature and on the operators'
references: it shows that the cases are right, and nothing about speed.
"""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.kernels.case import Case, check, full, miniature
from benchmarks.kernels.cases import OPS, cases
from benchmarks.kernels.results import Result, goals, tables
from benchmarks.kernels.timing import (
    WORKING_SET_BYTES,
    Clock,
    Variant,
    cuda_clock,
    host_clock,
    input_sets,
    measure,
    with_copy,
)
from benchmarks.report import write_report

_ROUNDS = 25
_QUICK_ROUNDS = 5
_LARGE_COPY_BYTES = 2**30
_LEGEND = """\
`us`: microseconds a call, median [quartiles], as the replay of a CUDA graph, without launches, but where it says
"called" because there was no graph (the .json says why); `us called`: with launches.
GB/s: of the bytes that must move, each input read once and each output written once.  `of copy`: its share of what a
device copy of as many bytes reached beside it, `of large copy`: of a copy of 1 GiB.  `x eager`: how many times faster
than plain PyTorch.  MB: memory of one call beyond its inputs.  `limit` is what to expect: drawing is arithmetic, and
launch means that the kernels are shorter than their launches."""


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds instead of {_ROUNDS}")
    parser.add_argument("--check", action="store_true", help="compare the variants only")
    arguments = parser.parse_args(arguments_of_shell)
    if arguments.check:
        _check(arguments.ops)
    elif torch.cuda.is_available():
        _time(arguments.ops, _QUICK_ROUNDS if arguments.quick else _ROUNDS)
    else:
        raise SystemExit("no timings: there is no GPU here; --check runs every case in miniature on the CPU")


def _check(ops: Sequence[str]) -> None:
    """Everything but the timings: of the runner too, by the host's clock, whose figures are thrown away."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    # in miniature some cases are one
    chosen = {case.op + case.label: case for case in cases(full if on_gpu else miniature, tuple(ops))}
    results = [run_case(case, device, host_clock, rounds=2, working_set=0) for case in chosen.values()]
    for result in results:
        variants = ", ".join(result.case.variants)
        print(f"{result.case.op} {result.case.label}: {result.refused or f'{variants} agree'}")
    print(f"{len(results)} cases on {device}{'' if on_gpu else ', in miniature'}; nothing was timed")
    if any(result.refused for result in results):
        raise SystemExit("some variants disagree")


def _time(ops: Sequence[str], rounds: int) -> None:
    device = torch.device("cuda")
    large_copy = _large_copy(device, rounds)
    print(f"a copy of 1 GiB: {large_copy / 1e9:.0f} GB/s read and written", flush=True)
    results = []
    for case in cases(full, tuple(ops)):
        results.append(run_case(case, device, cuda_clock, rounds=rounds))
        print(tables(results[-1:], large_copy), flush=True)
    body = "\n\n".join(["\n".join(f"- {line}" for line in goals(results)), _LEGEND, tables(results, large_copy)])
    data = {"large_copy_bytes_per_second": large_copy, "rounds": rounds, "cases": [one.to_dict() for one in results]}
    print(write_report("kernels", title="The kernels on a GPU", body=body, data=data).read_text())
    if any(result.refused for result in results):
        raise SystemExit("some cases were refused")


def run_case(
    case: Case, device: torch.device, clock: Clock, *, rounds: int, working_set: int = WORKING_SET_BYTES
) -> Result:
    """Check, then time; a case that fails is refused with the reason, and the others go on."""
    try:
        sets = input_sets(case, device, working_set=working_set)
        check(case, sets[0])
        return Result(case, measure(with_copy(case, sets, device), sets, clock, rounds))
    except (AssertionError, RuntimeError, ValueError) as error:
        return Result(case, refused=" ".join(f"{type(error).__name__}: {error}".split()))
    finally:
        # shapes of other cases would count as recompilations
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _large_copy(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written."""
    sets = [{"copied": torch.zeros(_LARGE_COPY_BYTES, dtype=torch.uint8, device=device)} for _ in range(2)]
    copy = {"copy": Variant(lambda inputs: (inputs["copied"].clone(),))}
    return 2 * _LARGE_COPY_BYTES / measure(copy, sets, cuda_clock, rounds)["copy"].kernels.median


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
