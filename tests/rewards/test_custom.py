"""A user's reward in a file of the working directory."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgrpo import cli
from fastgrpo.rewards.custom import from_path

SOURCE = """
def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2))

class Scaled:
    def __call__(self, images, prompts):
        return 2 * redness(images, prompts)

class Silent:
    pass

class Needy:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, images, prompts):
        return self.scale * redness(images, prompts)

class Fragile:
    def __init__(self):
        self.table = open("nowhere.csv").read()

    __call__ = redness

def of_images_alone(images):
    return images.mean(dim=(1, 2, 3))

threshold = 0.5
"""
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "missing colon": (
        "import torch\n\ndef redness(images, prompts)\n    return images\n",
        r", line 3: SyntaxError: expected",
    ),
    "indentation": ("def redness(images, prompts):\nreturn 1\n", r", line 2: IndentationError: expected"),
    "a name": ("import torch\nTHRESHOLD = threshhold / 2\n", r", line 2: NameError: name 'threshhold' is not defined"),
    "raises": ("\n\nraise ValueError('no weights here')\n", r", line 3: ValueError: no weights here"),
    "from torch": ("from torch import nothing\n", r", line 1: ImportError: cannot import name 'nothing'"),
    "inside a library": ("import json\nX = json.loads('{')\n", r", line 2: JSONDecodeError: Expecting"),
    "exits": ("import sys\nsys.exit(3)\n", r", line 2: SystemExit: 3"),
    "not utf-8": (b"x = '\xff'\n", r"SyntaxError: \(unicode error\)"),
}
IMAGES = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "user_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    # what from_path adds is undone with the rest
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.endswith("_rewards"):
            del sys.modules[name]


@pytest.mark.parametrize(("path", "scale"), [("user_rewards.redness", 1.0), ("user_rewards.Scaled", 2.0)])
def test_a_function_and_a_class_of_a_users_file_are_rewards(path: str, scale: float) -> None:
    torch.testing.assert_close(from_path(path)(IMAGES, ["", ""]), scale * torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("redness", "is module.name, as in my_rewards.redness, got 'redness'"),
        ("./user_rewards.redness", "is module.name, as in my_rewards.redness, got './user_rewards.redness'"),
        (".user_rewards.redness", "is module.name, as in my_rewards.redness"),
        ("absent_rewards.redness", "no module 'absent_rewards'; put absent_rewards.py into"),
        ("user_rewards.py", "user_rewards.py has no 'py'; it defines user_rewards.redness, user_rewards.Scaled"),
        ("user_rewards.blueness", "user_rewards.py has no 'blueness'"),
        ("sys.redness", "the module sys has no 'redness'; it defines"),
        (
            "user_rewards.Needy",
            r"Needy\(\) raised TypeError: .*'scale'; mend it .it is made without arguments, so each needs",
        ),
        ("user_rewards.Fragile", r"Fragile\(\) raised FileNotFoundError: .*, at user_rewards.py, line 21; mend it"),
        ("user_rewards.of_images_alone", r"takes \(images\), but a reward is called as reward\(images, prompts\)"),
        ("user_rewards.threshold", "is a float and cannot be called"),
        ("user_rewards.Silent", "give its class a __call__"),
        ("broken_rewards.redness", "broken_rewards.py, line 1 imports 'a_package_nobody_has', which is not installed"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_to_do(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        from_path(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("reward.terms.NAME.path")


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_imported_is_one_line_with_the_place(how: str) -> None:
    source, message = BROKEN[how]
    Path("wrong_rewards.py").write_bytes(source if isinstance(source, bytes) else str(source).encode())
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=message) as raised:
        from_path("wrong_rewards.redness")
    assert str(raised.value).startswith("reward.terms.NAME.path=wrong_rewards.redness: wrong_rewards.py")
    assert str(raised.value).endswith("; mend the file")


def test_a_mistake_in_a_file_of_ones_own_that_it_imports_is_told_there() -> None:
    Path("first_rewards.py").write_text("from second_rewards import redness\n")
    Path("second_rewards.py").write_text("x = 1\nredness = undefined\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"second_rewards\.py, line 2: NameError"):
        from_path("first_rewards.redness")


def test_a_run_names_the_key_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong_rewards.py").write_text("def redness(images, prompts)\n")
    assert cli.main(["train", "runtime.device=cpu", "reward=custom", "reward.path=wrong_rewards.redness"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastgrpo: reward.path=wrong_rewards.redness: wrong_rewards.py, line 1: SyntaxError: ")
    assert said.count("\n") == 1
