"""Where does a search pay in training?  Bands of prompts by the base model's success, groups, recipes and searches.

    python -m benchmarks.rare_success --out OUT
    python -m benchmarks.rare_success ... --methods "nft" "nft, retries" --groups 8 --seeds 0 1 2

A run that is in --out is not made again: a stopped measurement goes on, and a further one adds seeds to it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from benchmarks.apart import run_apart
from benchmarks.rare_success.cell import NUM_IMAGES, NUM_JUDGED
from benchmarks.rare_success.methods import METHODS
from benchmarks.rare_success.tables import map_of
from benchmarks.report import write_report


def main(arguments_of_shell: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bands", type=Path, default=Path(__file__).with_name("bands.json"), help="name -> prompts")
    parser.add_argument("--only", nargs="+", help="of the bands")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--groups", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, a run")
    parser.add_argument("--every", type=float, default=12.0, help="seconds of training between evaluations")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--out", type=Path, required=True, help="keeps the runs")
    arguments = parser.parse_args(arguments_of_shell)
    bands: dict[str, list[str]] = json.loads(arguments.bands.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    asked = [
        (band, group, method, seed)
        for seed, band, group, method in product(
            arguments.seeds, arguments.only or bands, arguments.groups, arguments.methods
        )
    ]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        list(pool.map(lambda cell: _make(arguments, bands[cell[0]], *cell), asked))
    # all that is there, of this measurement and of those before it
    runs = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("*.json"))]
    body = (
        f"{NUM_IMAGES} images an iteration, strict reward, trained and judged on the prompts of a band "
        f"({', '.join(f'{name}: {len(texts)}' for name, texts in bands.items())}) with at least {NUM_JUDGED} images "
        "from plain noise; CPU seconds of training, one thread.  A band is named by the base model's success.\n\n"
        + map_of(runs, list(bands))
    )
    path = write_report(
        "rare_success", title="Where a search pays in training", body=body, data={"runs": runs, "bands": bands}
    )
    print(path.read_text())


def _make(arguments: argparse.Namespace, prompts: list[str], band: str, group: int, method: str, seed: int) -> None:
    """One run, unless it is there."""
    name = f"{band}_{group}_{method}_{seed}_{arguments.seconds:g}s"
    path = arguments.out / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"
    if path.exists():
        return
    file = path.with_suffix(".txt")
    file.write_text("\n".join(prompts) + "\n")
    command = [
        *(sys.executable, "-m", "benchmarks.rare_success.cell", "--prompts", str(file), "--band", band),
        *("--method", method),
        *("--group", str(group), "--seed", str(seed), "--seconds", str(arguments.seconds)),
        *("--every", str(arguments.every), "--out", str(path)),
    ]
    run_apart(name, command, path)


if __name__ == "__main__":
    main()
