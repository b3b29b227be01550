"""What a waiting submit shows of its job, and what it leaves behind."""

import time
from pathlib import Path

import pytest

from fastgrpo.commands import job_output
from fastgrpo.commands.job_output import followed, remove_empty


def test_the_lines_of_the_first_rank_are_shown_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_output, "_LOOK_EVERY_SECONDS", 0.01)
    with followed(tmp_path):
        job = tmp_path / "31"
        job.mkdir()
        (job / "31_1_log.out").write_text("of another rank\n")
        log = job / "31_0_log.out"
        log.write_text("one\ntw")
        shown = ""
        until = time.monotonic() + 20
        while "one" not in shown and time.monotonic() < until:
            shown += capsys.readouterr().out
        assert shown.endswith("one\n")
        log.write_text("one\ntwo\nthe end, without a newline")
    shown += capsys.readouterr().out
    assert shown.splitlines() == [
        "the job waits for its turn",
        f"job 31 runs; errors of rank R are in {job}/31_R_log.err",
        "one",
        "two",
        "the end, without a newline",
    ]


def test_directories_that_nothing_was_written_into_are_removed(tmp_path: Path) -> None:
    for name in ("%j", "0", "1/2", "31"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "31/31_0_log.out").write_text("")
    remove_empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["31"]
