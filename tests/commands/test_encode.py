"""fastgrpo encode: what lacks is encoded, what is there is not, and bad input is one line."""

from pathlib import Path

import pytest

from fastgrpo.cli import BAD_INPUT, main


@pytest.fixture
def arguments(tiny_weights: Path, tmp_path: Path) -> list[str]:
    return [
        "encode",
        "model=shapes",
        f"model.weights={tiny_weights}",
        "model.resolution=32",
        f"+model.condition_cache={tmp_path / 'conditions'}",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "runtime.device=cpu",
    ]


def test_a_second_run_encodes_only_what_is_new(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na red circle\n")
    assert main(arguments) == 0
    files = list((tmp_path / "conditions").rglob("*.safetensors"))
    # the two different prompts, and the empty one of guidance
    assert len(files) == 3
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    said = f"3 prompts: 0 were there, 3 encoded, {megabytes:.1f} MB written to {tmp_path / 'conditions'}"
    assert said in capsys.readouterr().out

    prompts.write_text("a red circle\na green triangle\n")
    files[0].unlink()
    assert main(arguments) == 0
    assert len(list((tmp_path / "conditions").rglob("*.safetensors"))) in (3, 4)
    assert main(arguments) == 0
    assert "3 prompts: 3 were there, 0 encoded, 0.0 MB written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompts.path=nowhere.txt", "prompt file nowhere.txt does not exist; check prompts.path"),
        ("model.condition_cache=null", "give model.condition_cache= a directory"),
        ("model.weights=random", "weights that are not random"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    changed = [a for a in arguments if change.split("=")[0] not in a]
    sign = "+" if change.startswith("model.condition_cache") else ""
    assert main([*changed, sign + change]) == BAD_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastgrpo: ")
    assert message in error
