"""What the README's first command does: ``fastgrpo train`` as it is, timed from outside.

python -m benchmarks.default_run
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import RESULTS, table, write_report
from fastgrpo.files.run_directory import RunDirectory
from fastgrpo.records.json_lines import read_rows

STAGES = ("encode", "search", "rollout", "reward", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/default_run"), help="a new run directory")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    start = time.perf_counter()
    command = [sys.executable, "-m", "fastgrpo.train", f"output={arguments.out}", *arguments.overrides]
    subprocess.run(command, check=True)
    wall = time.perf_counter() - start
    run = RunDirectory(arguments.out)
    rows = read_rows(run.metrics)
    trained = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval/shapes_strict" in row]
    seconds = {stage: sum(row[f"seconds/{stage}"] for row in trained) for stage in (*STAGES, "iteration", "checkpoint")}
    evaluating = sum(row["seconds/evaluate"] for row in evaluations)
    first, last = evaluations[0]["eval/shapes_strict"], evaluations[-1]["eval/shapes_strict"]
    data = {
        "wall_seconds": wall,
        "seconds": seconds,
        "evaluate_seconds": evaluating,
        "outside_stages": 1 - sum(seconds[stage] for stage in STAGES) / seconds["iteration"],
        "outside_everything": 1 - (seconds["iteration"] + seconds["checkpoint"] + evaluating) / wall,
        "max_ratio_deviation": max(row["ratio_deviation"] for row in trained),
        "evaluations": [
            {key: row[key] for key in ("seconds", "eval/shapes", "eval/shapes_strict")} for row in evaluations
        ],
    }
    shares = ", ".join(f"{stage} {seconds[stage] / seconds['iteration']:.0%}" for stage in STAGES)
    facts = [
        ["strict accuracy on held-out prompts, before -> after", f"{first:.3f} -> {last:.3f}"],
        ["share of the error that is left", f"{(1 - last) / (1 - first):.2f}"],
        ["training time", f"{rows[-1]['seconds']:.0f} s, {trained[-1]['images']} images in {len(trained)} iterations"],
        ["whole command", f"{wall:.0f} s, evaluations {evaluating:.0f} s of it"],
        ["stages of an iteration", f"{shares}; outside of them {data['outside_stages']:.1%}"],
        ["start, end, logs and all else of the whole command", f"{data['outside_everything']:.1%}"],
        ["largest ratio_deviation", f"{data['max_ratio_deviation']:g}"],
    ]
    body = table(["what", "measured"], facts)
    path = write_report("default_run", title="fastgrpo train, as it is", body=body, data=data)
    for picture in (run.curves, run.images / "before_after.png"):
        shutil.copy(picture, RESULTS / f"{path.stem}_{picture.name}")
    print(path.read_text())


if __name__ == "__main__":
    main()
