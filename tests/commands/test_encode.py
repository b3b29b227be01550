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
        f"model.condition_cache={tmp_path / 'conditions'}",
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


def test_what_it_says_where_a_models_config_has_no_such_key_works(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    # as it is for a model of one's own
    words = [*arguments, "~model.condition_cache"]
    assert main(words) == BAD_INPUT
    (remedy,) = [word for word in capsys.readouterr().err.split() if word.startswith("+model.")]
    assert main([*words, remedy]) == 0
    assert len(list((tmp_path / "outputs/conditions").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prompts.path=nowhere.txt", "prompt file nowhere.txt does not exist; check prompts.path"),
        (
            "model.condition_cache=null",
            "model.condition_cache is null, so conditions would be lost; add model.condition_",
        ),
        (
            "model.weights=random",
            "conditions of model.weights=random are drawn, not encoded; give the weights of a model",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    changed = [a for a in arguments if change.split("=")[0] not in a]
    assert main([*changed, change]) == BAD_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastgrpo: ")
    assert message in error
