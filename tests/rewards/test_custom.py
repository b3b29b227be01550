"""A user's reward in a file of the working directory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgrpo.rewards.custom import from_path

SOURCE = """
def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2))

class Scaled:
    def __call__(self, images, prompts):
        return 2 * redness(images, prompts)

class Silent:
    pass

threshold = 0.5
"""
IMAGES = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "user_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    # what from_path adds is undone with the rest
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("user_rewards", None)


@pytest.mark.parametrize(("path", "scale"), [("user_rewards.redness", 1.0), ("user_rewards.Scaled", 2.0)])
def test_a_function_and_a_class_of_a_users_file_are_rewards(path: str, scale: float) -> None:
    torch.testing.assert_close(from_path(path)(IMAGES, ["", ""]), scale * torch.tensor([0.25, 0.75]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("redness", "module.name, as in my_rewards.redness, got 'redness'"),
        ("absent_rewards.redness", "no module 'absent_rewards' .* put absent_rewards.py into"),
        ("user_rewards.blueness", "user_rewards.py has no 'blueness'"),
        ("user_rewards.threshold", "is a float and cannot be called"),
        ("user_rewards.Silent", "give its class a __call__"),
        ("broken_rewards.redness", "imports 'a_package_nobody_has', which is not installed"),
    ],
)
def test_a_path_that_leads_nowhere_says_what_to_do(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_path(path)
