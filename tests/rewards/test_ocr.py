"""The ocr reward on written words: rewards by hand, whatever the size, softness and order of the writing."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from benchmarks.ocr_pictures import to_images
from fastgrpo.rewards.golden import golden_set
from fastgrpo.rewards.ocr import Ocr, reading_order, wanted_text

GOLDEN = [1.0, 1 - 1 / 10, 0.0, 0.0, 0.0, 1.0, 1 - 4 / 7, 1.0]


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return Ocr(threads=1)


@pytest.fixture(scope="module")
def exact() -> Ocr:
    return Ocr(contained=False, threads=1)


def write(text: str, *, size: int = 256, points: int = 36) -> Image.Image:
    picture = Image.new("RGB", (size, size), (238, 232, 205))
    font, middle = ImageFont.load_default(points), (size / 2, size / 2)
    ImageDraw.Draw(picture).multiline_text(middle, text, fill=(20, 30, 90), font=font, anchor="mm", align="center")
    return picture


def score(ocr: Ocr, picture: Image.Image, wanted: str) -> float:
    return ocr(to_images([picture]), [f'a sign that says "{wanted}"']).item()


def test_golden_texts_have_the_rewards_of_their_spelling(ocr: Ocr) -> None:
    golden = golden_set(Ocr.golden_set)
    torch.testing.assert_close(ocr(golden.images_BCHW, golden.prompts), torch.tensor(GOLDEN))


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        ("HARBOR", "HARBOR", 1.0),
        ("HARBOR", "harbor", 1.0),
        ("night train", "night  train", 1.0),
        ("HARBUR", "HARBOR", 1 - 1 / 6),
        ("HARBO", "HARBOR", 1 - 1 / 6),
        # replace o by u, insert r
        ("HARBU", "HARBOR", 1 - 2 / 6),
        ("night", "night train", 1 - 5 / 10),
        # more letters are wrong than wanted: not below 0
        ("SUMMER MENU", "JAZZ", 0.0),
    ],
)
def test_the_reward_is_one_minus_the_share_of_wrong_letters(
    ocr: Ocr, written: str, wanted: str, expected: float
) -> None:
    assert score(ocr, write(written), wanted) == pytest.approx(expected, abs=1e-6)


def test_further_words_are_free_only_where_containing_the_text_is_enough(ocr: Ocr, exact: Ocr) -> None:
    picture = write("FRESH\nBREAD\nDAILY")
    assert score(ocr, picture, "bread") == 1.0
    assert score(exact, picture, "fresh bread") == pytest.approx(1 - 5 / 10)


def test_the_same_words_in_another_order_are_not_contained(ocr: Ocr) -> None:
    # insert world before hello, delete it after: ten letters of ten; replacing letters costs less
    reward = score(ocr, write("WORLD\nHELLO"), "hello world")
    assert reward < 0.5


@pytest.mark.parametrize(
    ("read", "wanted", "expected"), [("NÓRTH", "north", 1.0), ("North", "nórth", 1 - 1 / 5), ("NÓRTH", "nórth", 1.0)]
)
def test_an_accent_counts_only_where_it_is_wanted(read: str, wanted: str, expected: float) -> None:
    ocr = Ocr(threads=1)
    found = SimpleNamespace(txts=(read,), boxes=boxes((10, 10, 40, 12)))
    object.__setattr__(ocr, "reader", lambda pixels_HWC: found)
    assert ocr(torch.zeros(1, 3, 64, 64), [f'"{wanted}"']).item() == pytest.approx(expected)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_an_empty_picture_is_worth_nothing(ocr: Ocr, level: float) -> None:
    assert ocr(torch.full((1, 3, 128, 128), level), ['"OPEN"']).item() == 0.0


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_noise_is_worth_nothing(ocr: Ocr, scale: float) -> None:
    noise_BCHW = 0.5 + scale * (torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert ocr(noise_BCHW, ['"OPEN"'] * 4).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("size", "points"),
    [
        (64, 12),
        (64, 8),
        (96, 19),
        (96, 12),
        (256, 50),
        (256, 16),
        (512, 100),
        (512, 20),
        (1024, 200),
        (1024, 40),
        (1440, 280),
    ],
)
def test_an_images_size_does_not_matter(ocr: Ocr, size: int, points: int) -> None:
    assert score(ocr, write("RIVER\nHOTEL", size=size, points=points), "RIVER HOTEL") == 1.0


def test_an_image_that_is_not_finite_is_refused(ocr: Ocr) -> None:
    images_BCHW = to_images([write("OPEN")])
    images_BCHW[0, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        ocr(images_BCHW, ['"OPEN"'])


@pytest.mark.parametrize("shape", [(96, 320), (320, 96)], ids=str)
def test_an_image_need_not_be_square(ocr: Ocr, shape: tuple[int, int]) -> None:
    height, width = shape
    left, top = (320 - width) // 2, (320 - height) // 2
    picture = write("CAFE", size=320, points=30).crop((left, top, left + width, top + height))
    assert score(ocr, picture, "CAFE") == 1.0
    assert score(ocr, picture, "CAGE") == 1 - 1 / 4


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = BytesIO()
    picture.save(file, format="JPEG", quality=20)
    return Image.open(file).convert("RGB")


SOFTENED = {
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(1.5)),
    "jpeg": as_jpeg,
    "low contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.3),
    "inverted": lambda picture: Image.fromarray(255 - np.array(picture)),
    "turned left": lambda picture: picture.rotate(4, fillcolor=(238, 232, 205)),
    "turned right": lambda picture: picture.rotate(-4, fillcolor=(238, 232, 205)),
    "small and enlarged": lambda picture: picture.resize((128, 128)).resize((256, 256)),
}


@pytest.mark.parametrize("how", SOFTENED)
def test_soft_and_sloping_writing_is_read(ocr: Ocr, how: str) -> None:
    assert score(ocr, SOFTENED[how](write("QUIET\nGARDEN")), "QUIET GARDEN") == 1.0
    assert score(ocr, SOFTENED[how](write("QUIET\nGARTEN")), "QUIET GARDEN") == pytest.approx(1 - 1 / 11)


@pytest.mark.parametrize("degrees", [-6, -3, 0, 3, 6])
def test_far_words_of_two_sloping_lines_are_read_line_by_line(exact: Ocr, degrees: int) -> None:
    picture, font = Image.new("RGB", (512, 512), "white"), ImageFont.load_default(50)
    for place, word in {(40, 200): "OPEN", (320, 200): "DAILY", (40, 280): "NINE", (320, 280): "FIVE"}.items():
        ImageDraw.Draw(picture).text(place, word, fill="black", font=font)
    turned = picture.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white")
    assert score(exact, turned, "open daily nine five") == 1.0


def boxes(*corners: tuple[int, int, int, int]) -> np.ndarray:
    """Boxes from left, top, width and height."""
    return np.array([[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in corners], dtype=np.float32)


def test_reading_order_by_hand() -> None:
    # small print on the level of a headline's middle, then a lower line
    assert reading_order(boxes((200, 40, 60, 20), (10, 10, 150, 80), (100, 100, 40, 20), (10, 98, 40, 20))) == [
        1,
        0,
        3,
        2,
    ]
    assert reading_order(boxes((10, 10, 80, 20), (10, 32, 60, 20), (10, 54, 70, 20))) == [0, 1, 2]


def test_images_are_read_alike_by_any_number_of_threads() -> None:
    words = ["RED", "BLACK", ""]
    images_BCHW = to_images([write(word, size=128, points=24) for word in words])
    one, four = Ocr(threads=1), Ocr(threads=4)
    assert one.read(images_BCHW) == words
    # one reward called from several threads at once, as by a scorer
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(four.read, [images_BCHW] * 2)) == [words] * 2


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a sign "OPEN"', "open"),
        ("a sign “Open now”", "opennow"),
        ('a sign “Open"', "open"),
        ('"Fresh" bread, "hot" tea', "freshhot"),
        ("""the chef's board: "Don’t panic!\"""", "don't panic!".replace(" ", "")),
        # the reader answers with full-width punctuation at times
        ('"Hello，world！"', "hello,world!"),
    ],
)
def test_wanted_is_what_stands_in_double_quotes(prompt: str, wanted: str) -> None:
    assert wanted_text(prompt) == wanted


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a sign that says OPEN", "no text in quotation marks"),
        ("the chef's 'special'", "no text in quotation marks"),
        ('a sign " "', "no text in quotation marks"),
        ('a 12" ruler with "OPEN" on it', "an odd number of quotation marks"),
    ],
)
def test_a_prompt_without_quotes_is_refused_before_anything_is_read(ocr: Ocr, prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        ocr(torch.zeros(2, 3, 64, 64), ['"fine"', prompt])
    assert repr(prompt) in str(error.value)
    assert 'as in: a sign that says "OPEN"' in str(error.value)


@pytest.mark.parametrize("name", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert importlib.util.find_spec(name) is None
    with pytest.raises(ValueError, match=rf"needs {name}; pip install 'fastgrpo\[ocr\]'"):
        Ocr()


@pytest.mark.parametrize("change", [{"threads": 0}, {"search_side": 16}], ids=str)
def test_impossible_settings_are_refused(change: dict) -> None:
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=rf"reward\.terms\.ocr\.{key} must be at least \d+, got {value}"):
        Ocr(**change)


def test_the_config_makes_the_reward_with_its_fields() -> None:
    with initialize_config_module("fastgrpo_configs", version_base="1.3"):
        config = compose(overrides=["+reward=ocr", "reward.terms.ocr.contained=false", "reward.terms.ocr.threads=2"])
    rewards = instantiate(config.reward)
    assert rewards.terms == {"ocr": Ocr(contained=False, threads=2)}
    assert rewards.weights == {"ocr": 1.0}
    # a text that is read is worth its weight; what is read is tested above
    assert rewards(to_images([write("OPEN")]), ['a sign "OPEN"']).total_PG.tolist() == [[1.0]]


def test_golden_pictures_are_what_their_script_renders_them_for() -> None:
    directory = Path(__file__).parents[2] / "fastgrpo" / "rewards" / "golden_set" / "texts"
    assert sorted(path.name for path in directory.iterdir()) == [*(f"{row}.png" for row in range(8)), "prompts.txt"]
    assert sum(path.stat().st_size for path in directory.iterdir()) < 40_000
