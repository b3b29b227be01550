"""fastgrpo doctor prompts=FILE: what it shows of a file, without a model, and where other commands point."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import cli
from fastgrpo.models.local_tokenizers import longest_in_tokens

ROWS: list[dict[str, Any]] = [
    {"prompt": "a [red] circle", "tag": "x", "resolution": 32},
    {"prompt": "two", "tag": "y"},
    {"prompt": "two", "tag": "y", "n": 1},
    {"prompt": "two", "tag": "y"},
    *({"prompt": f"number {n}", "tag": "z"} for n in range(4, 9)),
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # neither a model nor a reward is made
    monkeypatch.setattr("fastgrpo.models.pipeline_model.PipelineModel._configs", None)
    monkeypatch.setattr("fastgrpo.commands.doctor.golden_scores", None)
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "my rows.jsonl"


def shown(out: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_it_shows_what_is_read_of_a_file(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", f"prompts={path}", "runtime.device=cpu"]) == 0
    found = shown(capsys.readouterr().out)
    # the embedded model's tokenizers know words of the shapes world; other letters are tokens of their own
    counted = longest_in_tokens("pkg://fastgrpo.shapes/checkpoint", [str(row["prompt"]) for row in ROWS])
    assert set(counted) == {"tokenizer", "tokenizer_2"}
    assert found == {
        "prompts": "9, of the column prompt",
        "duplicates": "2 texts come again, 1 of them with all that their row says",
        "longest": "; ".join(f"{num} tokens by {name}" for name, num in counted.items()),
        "metadata": "tag, n (in 1)",
        "resolutions": "1 of 32, 8 of the own one",
        "prompt 1": "a [red] circle",
        "prompt 3": "two",
        "prompt 5": "number 4",
        "prompt 7": "number 6",
        "prompt 9": "number 8",
    }


def test_without_the_models_tokenizer_tokens_are_estimated_and_it_says_so(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("long.csv").write_text("Description,Negative Prompt\n" + "abcd" * 20 + ",blurry\nb,\n")
    words = ["doctor", "prompts=long.csv", "prompts.column=Description", "model=sd35_miniature", "runtime.device=cpu"]
    assert cli.main([*words, "model.guidance_scale=2.0"]) == 0
    out = capsys.readouterr().out
    found = shown(out)
    # each of a few once
    assert (out.count("│ prompt 1 "), out.count("│ prompt 2 ")) == (1, 1)
    assert found["longest"].startswith(
        "some 20 tokens, estimated by its bytes: the tokenizer of model.weights is not here"
    )
    assert found["negative prompts"] == "1"
    assert found["duplicates"] == "none"
    assert cli.main([*words, "model.guidance_scale=1.0"]) == cli.BAD_INPUT
    assert "prompts.path: long.csv:2: negative_prompt 'blurry'" in capsys.readouterr().err


def test_longest_is_counted_by_the_tokenizer_and_not_by_letters() -> None:
    texts = ["a red circle", "zzzzzzzzzzzz"]
    counts = longest_in_tokens("pkg://fastgrpo.shapes/checkpoint", texts)
    alone = [longest_in_tokens("pkg://fastgrpo.shapes/checkpoint", [text])["tokenizer"] for text in texts]
    assert counts["tokenizer"] == max(alone) > min(alone)
    assert longest_in_tokens("", texts) == {}
    assert longest_in_tokens("random", texts) == {}


@pytest.mark.parametrize(
    ("command", "key"), [("train", "prompts.path"), ("evaluate", "prompts.held_out"), ("submit", "prompts.path")]
)
def test_other_commands_say_where_a_file_goes(
    command: str, key: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "prompts=rows.tsv"]) == cli.BAD_INPUT
    assert f"prompts is one of shapes, shapes_hard; give a file as {key}=rows.tsv" in capsys.readouterr().err
