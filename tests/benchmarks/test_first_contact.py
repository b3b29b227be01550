"""``python -m benchmarks.first_contact``: what fits is run, what hangs costs one step, the next machine goes on.

Steps are processes, as on a machine with a GPU, of a line of Python each.
"""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.first_contact import iteration, wheels
from benchmarks.first_contact.__main__ import main
from benchmarks.first_contact.one_of_each import _covering
from benchmarks.first_contact.runner import run
from benchmarks.first_contact.steps import STEPS, Step
from benchmarks.flow_grpo import __main__ as flow_grpo
from benchmarks.flow_grpo.pipeline import MINIATURE
from benchmarks.flow_grpo.recipe import Job, our_config
from benchmarks.flow_grpo.setting import Setting
from fastgrpo.config import load_config
from tests.processes import lives, wait_until

_GPU = {"gpu": "H100", "no_gpu": None, "cpu": "8 cores", "unfit": {}, "versions": {"torch": "2.11.0"}}


def step(name: str, code: str, **facts: Any) -> Step:
    return Step(name=name, tells=name, **{"seconds": 20.0, "command": ("-c", code), **facts})


def environment(**found: Any) -> Step:
    told = json.dumps({**_GPU, **found})
    code = f"import os; open(os.environ['BENCHMARK_RESULTS'] + '/environment.json', 'w').write({told!r})"
    return step("environment", code, rehearsal=("-c", code), each_machine=True)


def contact(output: Path, steps: Sequence[Step], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the steps on record and the report."""
    code = main(["--output", str(output), "--scratch", str(output.parent / "scratch"), *words], steps)
    record = json.loads((output / "state.json").read_text())["steps"]
    return code, record, (output / "report.md").read_text()


WRITES = "import os; open(os.environ['BENCHMARK_RESULTS'] + '/found.md', 'w').write('# Found\\n\\n42 TFLOP/s\\n')"


def test_what_crashes_and_what_hangs_costs_its_own_step(tmp_path: Path) -> None:
    steps = [
        environment(),
        step("crashes", "import os; print('on the way', flush=True); os.abort()"),
        step("refuses", "raise SystemExit('a case was refused')"),
        step("hangs", "import time; print('waiting', flush=True); time.sleep(600)", seconds=1.0),
        step("breaks_off", "import os; open(os.environ['BENCHMARK_RESULTS'] + '/a.json', 'w').write('{'); os.abort()"),
        step("works", WRITES),
    ]
    begun = time.monotonic()
    code, record, report = contact(tmp_path / "out", steps)
    assert time.monotonic() - begun < 60
    assert code == 1
    assert {name: one["status"] for name, one in record.items()} == {
        "environment": "complete", "crashes": "failed", "refuses": "failed", "hangs": "timed out",
        "breaks_off": "failed", "works": "complete",
    }  # fmt: skip
    assert record["crashes"]["reason"] == "killed by SIGABRT"
    assert record["refuses"]["reason"] == "exit code 1"
    assert record["hangs"]["seconds"] < 20
    # the figures, and of what went wrong the last that it said
    assert "42 TFLOP/s" in report
    assert "### Found" in report
    assert "a case was refused" in report
    assert "on the way" in report
    assert "waiting" in report
    assert "Every step had its turn." in report
    # few enough for a lent machine to give back
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"state.json", "report.md", "log.txt"}


def test_the_findings_of_a_step_without_a_page_are_the_last_that_it_printed(tmp_path: Path) -> None:
    prints = "print(*range(100), sep='\\n'); print('fast: the same work: ratio off by 1.0e-07'); print('12 passed')"
    data = "import os; open(os.environ['BENCHMARK_RESULTS'] + '/found.json', 'w').write('{}'); print('7 passed')"
    steps = [
        environment(),
        step("prints", prints),
        step("data", data),
        step("page", f"{WRITES}; print('as on the page')"),
    ]
    code, record, report = contact(tmp_path / "out", steps)
    assert code == 0
    found = "99\nfast: the same work: ratio off by 1.0e-07\n12 passed"
    assert record["prints"]["log"].endswith(found)
    assert f"{found}\n```" in report
    assert "\n50\n" not in report
    assert "7 passed" in report
    # what a page says is not said again
    assert record["page"]["log"] == ""
    assert "as on the page" not in report


def test_the_next_machine_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    mark = f"open({str(tmp_path / 'ran.txt')!r}, 'a').write"
    steps = [
        environment(),
        step("first", f"{mark}('first ')"),
        step("fails", f"{mark}('fails '); raise SystemExit(1)"),
        step("long", f"{mark}('long ')", seconds=3000.0),
        step("last", f"{mark}('last ')"),
    ]
    code, record, report = contact(tmp_path / "out", steps, "--minutes", "1")
    assert code == 1
    # begun is only what could end
    assert record["long"]["status"] == "not reached"
    assert record["long"]["reason"].startswith("it may take 3000 s, and ")
    assert "- long: it may take 3000 s" in report
    assert (tmp_path / "ran.txt").read_text() == "first fails last "

    code, record, report = contact(tmp_path / "out", steps, "--minutes", "60")
    assert (tmp_path / "ran.txt").read_text() == "first fails last long "
    assert [record[name]["machine"] for name in ("environment", "first", "long")] == [1, 0, 1]
    assert report.count("- machine ") == 2

    contact(tmp_path / "out", steps, "--minutes", "60", "--again")
    assert (tmp_path / "ran.txt").read_text() == "first fails last long fails "


def test_what_failed_stays_on_record_where_it_cannot_be_tried_again(tmp_path: Path) -> None:
    steps = [environment(), step("fails", "raise SystemExit('why')", seconds=300.0)]
    contact(tmp_path / "out", steps)
    code, record, report = contact(tmp_path / "out", steps, "--again", "--minutes", "2")
    assert code == 1
    assert record["fails"]["status"] == "failed"
    assert "why" in report


def test_a_step_that_was_cut_off_with_its_machine_is_begun_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    peek = f"import shutil; shutil.copy({str(output / 'state.json')!r}, {str(tmp_path / 'seen.json')!r})"
    steps = [environment(), step("cut", peek)]
    contact(output, steps)
    # what the machine leaves behind if it is taken away now
    (output / "state.json").write_bytes((tmp_path / "seen.json").read_bytes())
    assert json.loads((tmp_path / "seen.json").read_text())["steps"]["cut"]["status"] == "begun"
    (tmp_path / "seen.json").unlink()
    _, record, _ = contact(output, steps)
    assert record["cut"]["status"] == "complete"
    assert (tmp_path / "seen.json").exists()


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [environment(gpu=None, no_gpu="torch sees no GPU"), step("works", WRITES)]
    code, record, _ = contact(tmp_path / "out", steps)
    assert code == 2
    assert "no GPU to ask: torch sees no GPU" in capsys.readouterr().out
    assert list(record) == ["environment"]


@pytest.mark.parametrize("ending", ["raise SystemExit(1)", "import time; time.sleep(600)"])
@pytest.mark.parametrize("has_written", [True, False])
def test_an_environment_step_that_fails_or_hangs_costs_itself(tmp_path: Path, ending: str, has_written: bool) -> None:
    found = environment(unfit={"diffusers": "missing"}).command[1] + "; " if has_written else ""
    steps = [
        step("environment", found + ending, seconds=2.0, each_machine=True),
        step("trains", WRITES, needs=("diffusers",)),
        step("works", WRITES),
    ]
    code, record, report = contact(tmp_path / "out", steps)
    assert code == 1
    assert record["environment"]["status"] in ("failed", "timed out")
    assert record["works"]["status"] == "complete"
    # what it wrote before is known, and nothing else
    assert record["trains"]["status"] == ("not reached" if has_written else "complete")
    assert ("- machine 1: H100; 8 cores" in report) == has_written


def test_what_the_machine_is_is_written_before_nvidia_smi_is_asked(tmp_path: Path) -> None:
    hangs = tmp_path / "bin" / "nvidia-smi"
    hangs.parent.mkdir()
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o755)
    directory = tmp_path / "results"
    directory.mkdir()
    told = {
        **os.environ,
        "BENCHMARK_RESULTS": str(directory),
        "PATH": os.pathsep.join([str(hangs.parent), os.environ["PATH"]]),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.first_contact.environment"],
        cwd=wheels.ROOT, env=told, stdout=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "- gpu: " in "".join(process.stdout.readline() for _ in range(3))
        found = json.loads((directory / "environment.json").read_text())
        assert "unfit" in found
        assert "nvidia_smi" not in found
        assert (directory / "environment.md").exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_step_waits_for_what_was_not_carried(tmp_path: Path) -> None:
    steps = [
        environment(unfit={"diffusers": "missing", "peft": "0.1, not >=0.21"}),
        step("trains", WRITES, needs=("diffusers", "peft")),
        step("adapts", WRITES, needs=("peft",)),
        step("compares", "", needs_checkout=True),
    ]
    code, record, report = contact(tmp_path / "out", steps)
    assert code == 0
    assert record["trains"]["reason"] == "it needs diffusers, and no wheel of it was carried"
    assert record["adapts"]["status"] == "complete"
    assert "- compares: it needs --checkout of flow_grpo" in report
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train_sd3.py").touch()
    code, record, _ = contact(tmp_path / "out", steps, "--checkout", str(tmp_path))
    assert record["compares"]["status"] == "complete"


def test_a_checkout_that_is_none_is_said_before_anything_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--checkout", str(tmp_path)]
    assert main(words, [environment()]) == 2
    said = capsys.readouterr().err
    assert said == f"first_contact: --checkout {tmp_path} is no checkout of flow_grpo: it lacks scripts/train_sd3.py\n"
    assert not (tmp_path / "out").exists()


def test_chosen_steps_and_a_rehearsal(tmp_path: Path) -> None:
    fails_on_a_gpu = step("a", "raise SystemExit(1)", rehearsal=("-c", ""))
    steps = [environment(gpu=None), fails_on_a_gpu, step("b", ""), step("c", "")]
    code, record, report = contact(tmp_path / "out", steps, "--rehearse", "--steps", "a,b")
    assert code == 0
    assert {name: (one["status"], one["reason"]) for name, one in record.items()} == {
        "environment": ("complete", ""), "a": ("complete", ""), "b": ("not reached", "it needs a GPU"),
    }  # fmt: skip
    assert "nothing here is a result" in report
    assert "- c: its turn did not come" in report


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    # it ignores the request, and its parent does not wait for it
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {deaf!r}], stdout=subprocess.PIPE); "
        "child.stdout.readline(); print(child.pid)"
    )
    outcome = run(
        ["-c", parent], seconds=20, log=tmp_path / "log.txt", directory=tmp_path, environment=dict(os.environ)
    )
    assert outcome.status == "complete"
    wait_until(lambda: not lives(int((tmp_path / "log.txt").read_text())))


def test_a_step_ends_with_what_ran_it(tmp_path: Path) -> None:
    hangs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    caller = (
        "from benchmarks.first_contact.__main__ import main; from benchmarks.first_contact.steps import Step; "
        f"hangs = Step(name='hangs', tells='', seconds=500, command=('-c', {hangs!r}), rehearsal=('-c', {hangs!r})); "
        f"main(['--rehearse', '--output', {str(tmp_path / 'out')!r}, '--scratch', {str(tmp_path)!r}], [hangs])"
    )
    process = subprocess.Popen([sys.executable, "-c", caller])
    said = tmp_path / "logs" / "hangs.txt"
    wait_until(lambda: said.exists() and said.read_text().endswith("\n"))
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    wait_until(lambda: not lives(int(said.read_text())))
    assert json.loads((tmp_path / "out" / "state.json").read_text())["steps"]["hangs"]["status"] == "begun"


def _wheel(directory: Path, name: str, value: int) -> None:
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VALUE = {value}\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_of_what_lacks_are_installed_for_the_steps_and_this_checkout_is_importable(tmp_path: Path) -> None:
    carried = tmp_path / "wheels"
    carried.mkdir()
    _wheel(carried, "carried_along", 7)
    # torch is there, whatever wheel of it was carried
    _wheel(carried, "numpy", 0)
    code = (
        "import carried_along, numpy, fastgrpo_kernels, fastgrpo_configs; "
        "assert carried_along.VALUE == 7; assert not hasattr(numpy, 'VALUE'); "
        f"from importlib.metadata import version; assert version('fastgrpo') == {wheels._project()['version']!r}"
    )
    _, record, report = contact(tmp_path / "out", [environment(), step("imports", code)], "--wheels", str(carried))
    assert record["imports"]["status"] == "complete", report


def test_wheels_that_are_not_there_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output", str(tmp_path), "--scratch", str(tmp_path / "scratch"), "--wheels", str(tmp_path / "none")]
    assert main(arguments, [environment()]) == 2
    assert "is no directory" in capsys.readouterr().err


def test_versions_are_those_of_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "version", {"torch": "2.11.0+cu130", "diffusers": "0.41.0"}.__getitem__)
    assert wheels.unfit(["torch", "diffusers"]) == {"diffusers": "0.41.0, not <0.43,>=0.42"}
    monkeypatch.undo()
    assert wheels.unfit(["no-such-distribution"]) == {"no-such-distribution": "missing"}


def test_a_state_that_is_none_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.json").write_text('{"steps": {')
    assert main(["--output", str(tmp_path), "--scratch", str(tmp_path / "scratch")], [environment()]) == 2
    assert "move it away to begin anew" in capsys.readouterr().err
    assert (tmp_path / "state.json").read_text() == '{"steps": {'


_STEP = {"status": "complete"}
_MACHINE: dict[str, Any] = {"gpu": "H100", "no_gpu": None, "cpu": "8 cores", "commit": "c0ffee", "versions": {}}


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"machines": []},
        {"machines": [], "steps": []},
        {"machines": {}, "steps": {}},
        {"machines": [7], "steps": {}},
        {"machines": [{"gpu": "H100"}], "steps": {}},
        {"machines": [{**_MACHINE, "versions": None}], "steps": {}},
        {"machines": [], "steps": {"kernels": None}},
        {"machines": [], "steps": {"kernels": {}}},
        {"machines": [], "steps": {"kernels": {**_STEP, "results": None}}},
        {"machines": [], "steps": {"kernels": {**_STEP, "results": {"a.md": 7}}}},
        {"machines": [], "steps": {"kernels": {**_STEP, "seconds": "7"}}},
        {"machines": [], "steps": {"kernels": {**_STEP, "colour": "red"}}},
        b"\x80\x00\xff",
    ],
    ids=str,
)
def test_a_state_of_wrong_types_is_refused_in_a_sentence(
    told: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(told if isinstance(told, bytes) else json.dumps(told).encode())
    before = path.read_bytes()
    assert main(["--output", str(tmp_path), "--scratch", str(tmp_path / "scratch")], [environment()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"first_contact: {path} is no state of first_contact (")
    assert said.count("\n") == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("output", ["file", "file/below", "holds_a_directory"])
def test_an_output_that_cannot_be_written_is_said(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "holds_a_directory" / "state.tmp").mkdir(parents=True)
    words = ["--output", str(tmp_path / output), "--scratch", str(tmp_path / "scratch")]
    assert main(words, [environment()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("first_contact: ")
    assert str(tmp_path / output) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", ["--minutes", "--slowness"])
@pytest.mark.parametrize("value", ["-3", "0", "nan", "inf", "many"])
def test_minutes_are_a_number_above_0(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--output", str(tmp_path / "out"), f"{option}={value}"], [environment()])
    assert raised.value.code == 2
    assert f"argument {option}: must be a number above 0, got {value}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class _Case:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_one_of_each_has_every_parameter_in_the_fewest_cases() -> None:
    cases: list[Any] = [_Case(f"t.py::test[{size}-{dtype}]") for size in (1, 7, 64) for dtype in ("half", "single")]
    # 3 sizes need 3 cases, and by then both dtypes have been met
    assert [case.nodeid[11:-1] for case in _covering(cases)] == ["1-half", "7-single", "64-half"]
    only: Any = _Case("t.py::test_alone")
    assert _covering([only]) == [only]


def test_one_of_each_covers_with_cases_that_are_run(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('size', [1, 7, 64])\n"
        "@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])\n"
        "def test_it(device, size): pass\n"
    )
    words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "benchmarks.first_contact.one_of_each", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(wheels.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *words, "-v", "."],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "3 passed, 3 deselected" in done.stdout, done.stdout + done.stderr


def test_the_table_of_steps() -> None:
    names = [one.name for one in STEPS]
    assert len(set(names)) == len(names)
    # environment tells what each of the others may expect
    assert STEPS[0].each_machine
    assert not any(one.each_machine for one in STEPS[1:])
    # what a first contact is for fits into one lease of 12 minutes even if every step takes all that it may
    until_full = sum(one.seconds for one in STEPS[: names.index("full") + 1])
    assert until_full <= 12 * 60 - 10


@pytest.mark.parametrize("command", [one.command for one in STEPS] + [one.rehearsal for one in STEPS if one.rehearsal])
def test_the_arguments_of_every_step_are_understood(command: tuple[str, ...], tmp_path: Path) -> None:
    _, module, *words = command
    if module == "benchmarks.first_contact.iteration":
        arguments = iteration.parse(words)
        config = load_config("train", [*iteration.overrides(arguments, tmp_path), f"output={tmp_path}"])
        assert bool(config.runtime.profile) == ("--profile" in words)
    elif module == "benchmarks.flow_grpo":
        arguments = flow_grpo._parse(words)
        job = Job(
            recipe=arguments.recipes[0],
            pipeline="random",
            size=MINIATURE,
            prompts=str(tmp_path),
            batches=arguments.batches,
            device="cpu",
            threads=1,
        )
        for text in arguments.ours:
            our_config(job, [*text.split(), f"output={tmp_path}"])
        for text in arguments.theirs or ():
            Setting.parse(text)


def test_real_steps_are_rehearsed_and_leave_their_figures(tmp_path: Path) -> None:
    code, record, report = contact(tmp_path / "out", STEPS, "--rehearse", "--steps", "ceilings", "--commit", "c0ffee")
    assert code == 0
    assert record["ceilings"]["status"] == "complete"
    (figures,) = (one for name, one in record["ceilings"]["results"].items() if name.endswith(".json"))
    # a sixteenth of each dimension
    assert figures["products"]["large, float32"]["shape"] == [512, 512, 512]
    assert "### Ceilings" in report
    machine = json.loads((tmp_path / "out" / "state.json").read_text())["machines"][0]
    assert machine["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine["unfit"] == {}
