"""Images a second of every reward, in each of the ways to compute it and in that of other codebases.

    python -m benchmarks.rewards                                        all of them, a result under benchmarks/results/
    python -m benchmarks.rewards --rewards pick_score --backends eager_float16 tensorrt_float16 --batch 128
    python -m benchmarks.rewards --miniature                            networks of two layers: does everything run?

Networks have their official size and random weights.  pil_one_by_one and pil_batched are flow_grpo's way.  On a GPU
time is taken by CUDA events; on a CPU only ratios mean something.
"""

import argparse
import gc
from collections.abc import Sequence

import torch

from benchmarks.kernels.timing import cuda_clock, host_clock
from benchmarks.report import write_report
from benchmarks.rewards.case import BACKENDS, REWARDS, make_case
from benchmarks.rewards.results import goals, summary, to_dict
from benchmarks.rewards.timing import run_case

_BATCH = {"cuda": 64, "cpu": 2}
_REPEATS = {"cuda": 20, "cpu": 3}


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--backends", nargs="*", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=_BATCH[device.type])
    parser.add_argument("--repeats", type=int, default=_REPEATS[device.type])
    parser.add_argument("--miniature", action="store_true", help="tiny networks, no report")
    arguments = parser.parse_args(arguments_of_shell)
    clock = cuda_clock if device.type == "cuda" else host_clock
    results = []
    for reward in arguments.rewards:
        case = make_case(reward, arguments.backends, arguments.batch, device, arguments.miniature)
        results.append(run_case(case, clock, arguments.repeats))
        print(summary(results[-1:]) + "\n", flush=True)
        # the next network may need the memory, and its shapes would count as recompilations
        del case
        if not arguments.miniature:
            gc.collect()
        torch._dynamo.reset()
    if arguments.miniature:
        print(f"{len(results)} rewards on {device}, networks in miniature: nothing here is a result")
        return
    aims = goals(results) if device.type == "cuda" else []
    body = "\n\n".join(["\n".join(f"- {line}" for line in aims), _legend(device, arguments.repeats), summary(results)])
    data = {"repeats": arguments.repeats, "threads": torch.get_num_threads(), "results": [to_dict(r) for r in results]}
    print(write_report("rewards", title=f"Rewards on a {device.type.upper()}", body=body, data=data))


def _legend(device: torch.device, repeats: int) -> str:
    where = (
        f"On {torch.get_num_threads()} thread of a CPU: ratios are what counts, absolute speeds are those of no GPU.  "
        if device.type == "cpu"
        else ""
    )
    return (
        f"{where}Median of {repeats} interleaved rounds and quartiles.  x: how many times as fast as flow_grpo's way, "
        "Pillow and its processor, with the network in float32 on one image at a time or on all at once.  Texts are "
        "encoded before, for all variants.  Preprocessing: its share of the variant's time, timed on its own.  "
        "Difference: the largest, from the scores one by one, of the largest score; weights are random, which makes "
        "scores of different images much alike.  MB: memory beyond images and weights."
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
