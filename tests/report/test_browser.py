"""The page in a browser without a network: everything on it answers to the mouse, and nothing complains."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgrpo.report.page import write_report
from tests.report.made_run import CONFIG, HOSTILE, PROMPTS, color_of, make_run, rows_of

pytest.importorskip("selenium", reason="clicking through a page needs selenium; pip install 'fastgrpo[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="clicking through a page needs a browser; apt-get install chromium chromium-driver",
)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

QUIET = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
QUIET += " disable-sync disable-quic host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND window-size=1280,1000"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("runs")
    other = {**CONFIG, "seed": 7}
    return make_run(top / "one", searches=(1, 3)), make_run(top / "two", rows=rows_of(3), config=other)


@pytest.fixture(scope="module")
def browser(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The report of both runs, drawn; every resolved name is not found, and network and console are listened to."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in [*QUIET.split(" "), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{word.replace(chr(160), ' ')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        driver.set_page_load_timeout(60)
        driver.get(write_report(runs).as_uri())
        wait(driver, "return Bokeh.documents.length === 1 && Bokeh.documents[0].is_idle")
        yield driver
    finally:
        driver.quit()


def wait(browser: Any, condition: str, *arguments: Any) -> Any:
    return WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(condition, *arguments))


@pytest.fixture
def model(browser: Any) -> Callable[[str, str], Any]:
    """An expression of one of Bokeh's models, by its name."""
    return lambda name, said: browser.execute_script(
        f"const model = Bokeh.documents[0].get_model_by_name(arguments[0]); return {said}", name
    )


def choose(browser: Any, selector: str, value: str = "") -> None:
    """Click on what the selector finds, or move the slider that it is to a value."""
    script = "const [element, value] = arguments; element.scrollIntoView({block: 'center', behavior: 'instant'});"
    script += "if (value) { element.value = value; element.dispatchEvent(new Event('input', {bubbles: true})); }"
    element = browser.find_element("css selector", selector)
    browser.execute_script(script, element, value)
    if not value:
        element.click()


def test_the_axis_of_all_curves_is_switched(browser: Any, model: Callable[[str, str], Any], runs: Any) -> None:
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert model("axis loss", "model.axis_label") == "training time [s], without evaluation"
    for axis, label in (("images", "images made"), ("iteration", "iteration"), ("seconds", "training time [s]")):
        choose(browser, f"input[name=axis][value={axis}]")
        for name in ("loss", "eval/shapes"):
            assert model(f"axis {name}", "model.axis_label").startswith(label)
            having = [row for row in rows if name in row]
            assert model(f"{name} 0", "Array.from(model.data.x)") == [row.get(axis, 0) for row in having]
            assert model(f"{name} 0", "Array.from(model.data.value)") == [row[name] for row in having]
    # what was drawn follows: the range of all panels is that of the axis
    choose(browser, "input[name=axis][value=images]")
    wait(browser, "return Bokeh.documents[0].get_model_by_name('loss').x_range.end > 300")


def test_smoothing_averages_what_was_before(browser: Any, model: Callable[[str, str], Any]) -> None:
    """1, 1/2, 1/3, 1/4 with s = 0.5: weights 0.5, 0.25, ... of the newest first, divided by their sum."""
    choose(browser, "#smoothing", "0.5")
    values = [1, 1 / 2, 1 / 3, 1 / 4]
    expected = []
    for n in range(1, 5):
        weights = [0.5**k for k in range(n)]
        expected.append(sum(w * v for w, v in zip(weights, values[n - 1 :: -1], strict=True)) / sum(weights))
    assert model("loss 0", "Array.from(model.data.y)") == pytest.approx(expected)
    assert model("loss 0", "Array.from(model.data.value)") == pytest.approx(values)
    choose(browser, "#smoothing", "0")
    assert model("loss 0", "Array.from(model.data.y)") == pytest.approx(values)


def test_a_run_is_hidden_in_all_curves(browser: Any, model: Callable[[str, str], Any]) -> None:
    for is_shown in (False, True):
        choose(browser, "input[name=run][value='1']")
        for name in ("loss", "eval/shapes"):
            assert [model(f"{name} 1 {place}", "model.visible") for place in range(3)] == [is_shown] * 3
            assert model(f"{name} 0 1", "model.visible") is True


def told_at(browser: Any, plot: str, x: float, y: float | None = None) -> str:
    """What the pointer is told at a place in a plot, by default in the middle of its height."""
    place = browser.execute_script(
        "const [name, x, y] = arguments, model = Bokeh.documents[0].get_model_by_name(name);"
        "const view = Bokeh.index.find_one_by_id(model.id), {frame} = view;"
        "view.el.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = view.el.getBoundingClientRect();"
        "const top = y === null ? frame.bbox.vcenter : frame.y_scale.compute(y);"
        "return [box.left + frame.x_scale.compute(x), box.top + top]",
        *(plot, x, y),
    )
    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(*map(round, place))
    actions.perform()
    # tooltips lie in shadow roots
    found = """
    const found = [];
    const look = (root) => root.querySelectorAll("*").forEach((element) => {
      if (!element.shadowRoot) return;
      if (element.classList.contains("bk-Tooltip")) found.push(element.shadowRoot.textContent);
      look(element.shadowRoot);
    });
    look(document);
    return found.filter((text) => text.includes("iteration")).join(" ")
    """
    return " ".join(str(wait(browser, found)).split())


def test_the_pointer_is_told_the_values_of_each_run(browser: Any) -> None:
    choose(browser, "input[name=axis][value=iteration]")
    told = told_at(browser, "loss", 3)
    assert told.count("0.333333") == 2
    assert all(text in told for text in ("one", "two", "288"))


def test_a_candidates_prompt_is_shown_as_text(browser: Any) -> None:
    told = told_at(browser, "scores 0", -0.11, 0.4)
    assert HOSTILE in told
    assert "0.4" in told
    assert browser.execute_script("return window.hostile") is None


def test_the_slider_changes_the_images_and_their_scores(browser: Any) -> None:
    shown = "return [...document.querySelectorAll('.prompt')].map((card) => [...card.querySelectorAll('.pair')].map("
    shown += "(pair) => [...pair.querySelectorAll('img, small')].map((part) => part.src || part.textContent)))"
    # the second run has two evaluations, the first three
    for step, iterations in ((2, (4, 2)), (0, (0, 0)), (1, (2, 2))):
        choose(browser, "#evaluation", str(step))
        cards = browser.execute_script(shown)
        assert len(cards) == len(PROMPTS)
        for place, pairs in enumerate(cards):
            for (before, told_before, after, told), iteration in zip(pairs, iterations, strict=True):
                mark = "✓" if place % 2 == 0 else "✗"
                score = f"{place / 10 + iteration / 100:.3g}"
                assert told.split() == [mark, "iteration", str(iteration), "shapes", told.split()[4], "strict", "–"]
                assert float(told.split()[4]) == pytest.approx(float(score))
                assert told_before.startswith(f"{mark} iteration 0")
                assert color_in(before) == pixel(0, place)
                assert color_in(after) == pixel(iteration, place)
        assert browser.find_element("css selector", "output[for=evaluation]").text == str((0, 2, 4)[step])


def color_in(uri: str) -> tuple[int, ...]:
    """The one color of an image that is written out as data."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
    colors = image.getcolors()
    assert colors is not None
    ((_, color),) = colors
    assert isinstance(color, tuple)
    return color


def pixel(iteration: int, place: int) -> tuple[int, ...]:
    return tuple((color_of(iteration, place) * 255).round().int().tolist())


def test_what_a_run_says_runs_nowhere(browser: Any) -> None:
    captions = [element.text for element in browser.find_elements("css selector", ".prompt > figcaption")]
    assert captions[0] == HOSTILE
    assert browser.execute_script("return window.hostile") is None


def test_groups_that_were_closed_draw_when_they_open(browser: Any) -> None:
    details = browser.find_elements("css selector", "#curves details:not([open]) > summary")
    assert details
    for summary in details:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", summary)
        summary.click()
    width = "return Bokeh.index.find_one_by_id(Bokeh.documents[0].get_model_by_name('peak_bytes').id).bbox.width"
    assert wait(browser, f"{width} > 200")


def test_no_request_was_made_and_nothing_was_complained_of(browser: Any) -> None:
    """Last: of all that was clicked before."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    # a browser has pages of its own, before it is told to open this one
    asked = [one["request"]["url"] for one in sent if one["documentURL"].endswith("report.html")]
    assert any(url.endswith("report.html") for url in asked)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    bad = [entry for entry in browser.get_log("browser") if entry["level"] not in ("INFO", "DEBUG")]
    assert bad == []
