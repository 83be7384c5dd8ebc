"""The reports in a real browser: what a click, a key and a wheel do, and that a page asks for nothing."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from gasnet_nnunet.case_report import IndexRow, report_name, write_case_report, write_index
from gasnet_nnunet.phantom import make_phantom
from gasnet_nnunet.training_report import write_training_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SIZE, SPACING = (12, 48, 48), (16.0, 7.0, 7.0)
PANELS = ("ct", "contour", "restored", "difference")
BURDENS = {"few": 9.5, "many": 120.0, "none": 0.0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'test'")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("no Chromium is found: apt-get install chromium, or playwright install chromium")
        # Containers grant no sandbox; the pages are ours.
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file; at the end nothing may have been written to the console or asked of a network."""
    contexts, said, asked = [], [], []

    def open_page(path: Path, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of three cases and their index."""
    folder = tmp_path_factory.mktemp("out")
    phantom = make_phantom(np.random.default_rng(3), "diseased", size=SIZE, spacing=SPACING)
    restored = np.where(phantom.lesion > 0, -850, phantom.ct).astype(np.int16)
    images = {}
    arrays = {"ct": phantom.ct, "mask": phantom.lesion, "restored": restored, "difference": phantom.ct - restored}
    for name, array in arrays.items():
        images[name] = sitk.GetImageFromArray(array)
        images[name].SetSpacing(SPACING[::-1])
        images[name] = sitk.DICOMOrient(images[name], "RAS")
    rows = []
    for case, lesion in BURDENS.items():
        content = {"burden": {"lesion_ml": lesion}, "model": {"Model": "phantom"}, "warnings": []}
        write_case_report(folder / report_name(case), case=case, **images, **content)  # type: ignore[arg-type]
        rows.append(IndexRow(case, {"lesion_ml": lesion}))
    write_index(folder / "report.html", [*rows, IndexRow("lost", problem="It is damaged.")])
    return folder


@pytest.fixture
def case_page(open_page: Callable[..., Page], folder: Path) -> Page:
    page = open_page(folder / report_name("many"))
    page.locator("body[data-shown]").wait_for()
    return page


def pixels(page: Page) -> dict[str, str]:
    """What each panel shows."""
    return {name: page.locator(f"[data-panel={name}]").evaluate("canvas => canvas.toDataURL()") for name in PANELS}


def changed(page: Page, action: Callable[[], object]) -> set[str]:
    """The panels that an action changes."""
    before, shown = pixels(page), page.evaluate("document.body.dataset.shown")
    action()
    page.locator(f'body:not([data-shown="{shown}"])').wait_for()
    after = pixels(page)
    return {name for name in PANELS if before[name] != after[name]}


def yellow(page: Page, name: str) -> int:
    """Number of yellow pixels in a panel."""
    red, green, blue = np.array(Image.open(io.BytesIO(base64.b64decode(pixels(page)[name].split(",")[1]))))[..., :3].T
    return int(((red > 200) & (green > 150) & (blue < 80)).sum())


def panel(page: Page, name: str) -> Locator:
    return page.locator(f"[data-panel={name}]")


def place(page: Page) -> int:
    """Number of the slice shown, from 1."""
    found = re.match(r"Slice (\d+) of 12", page.locator("#where").inner_text())
    assert found is not None
    return int(found[1])


def test_all_panels_scroll_together(case_page: Page) -> None:
    start = place(case_page)
    panel(case_page, "restored").hover()
    everything = set(PANELS)
    assert changed(case_page, lambda: case_page.mouse.wheel(0, 100)) == everything
    assert place(case_page) == start + 1
    assert changed(case_page, lambda: case_page.mouse.wheel(0, -100)) == everything
    assert place(case_page) == start
    assert changed(case_page, lambda: case_page.keyboard.press("ArrowUp")) == everything
    assert place(case_page) == start - 1
    assert changed(case_page, lambda: case_page.keyboard.press("Home")) == everything
    assert place(case_page) == 1
    slider = case_page.locator("#slider")
    assert changed(case_page, lambda: slider.fill("8")) == everything
    assert place(case_page) == 9
    slider.focus()
    assert changed(case_page, lambda: case_page.keyboard.press("ArrowRight")) == everything
    assert place(case_page) == 10
    case_page.keyboard.press("End")
    case_page.keyboard.press("PageDown")
    case_page.locator('body[data-shown^="11 "]').wait_for()
    assert place(case_page) == 12


def test_page_opens_at_most_lesion_and_bars_lead_to_slices(case_page: Page) -> None:
    phantom = make_phantom(np.random.default_rng(3), "diseased", size=SIZE, spacing=SPACING)
    assert place(case_page) == 12 - int(phantom.lesion.sum(axis=(1, 2)).argmax())
    bars = case_page.locator("#profile")
    box = bars.bounding_box()
    assert box is not None
    changed(case_page, lambda: bars.click(position={"x": box["width"] * 2.5 / 12, "y": 5}))
    assert place(case_page) == 3


def test_windows_change_the_pictures(case_page: Page) -> None:
    everything = set(PANELS)
    mediastinum = case_page.get_by_role("button", name="Mediastinum")
    assert changed(case_page, mediastinum.click) == everything
    assert mediastinum.get_attribute("aria-pressed") == "true"
    assert case_page.locator("#width").input_value() == "400"
    assert changed(case_page, lambda: case_page.keyboard.press("b")) == everything
    assert case_page.locator("#level").input_value() == "400"
    level = case_page.locator("#level")
    level.fill("-100")
    assert changed(case_page, lambda: level.press("Enter")) == everything
    assert case_page.locator("button[aria-pressed=true][data-window]").count() == 0
    box = panel(case_page, "ct").bounding_box()
    assert box is not None
    case_page.mouse.move(box["x"] + 50, box["y"] + 50)
    case_page.mouse.down()
    assert changed(case_page, lambda: case_page.mouse.move(box["x"] + 100, box["y"] + 50)) == everything
    case_page.mouse.up()
    assert case_page.locator("#width").input_value() == "2000"


def test_contour_is_drawn_around_the_lesion_and_can_be_left_out(case_page: Page) -> None:
    assert yellow(case_page, "contour") > 50
    assert yellow(case_page, "ct") == 0
    assert changed(case_page, lambda: case_page.keyboard.press("c")) == {"contour"}
    assert yellow(case_page, "contour") == 0
    assert changed(case_page, lambda: case_page.get_by_label("Contour").check()) == {"contour"}


def test_value_under_the_pointer_is_that_of_the_voxel(case_page: Page) -> None:
    phantom = make_phantom(np.random.default_rng(3), "diseased", size=SIZE, spacing=SPACING)
    z = SIZE[0] - place(case_page)
    y, x = np.argwhere(phantom.lesion[z])[0]
    box = panel(case_page, "contour").bounding_box()
    assert box is not None
    case_page.mouse.move(box["x"] + box["width"] * (x + 0.5) / 48, box["y"] + box["height"] * (y + 0.5) / 48)
    shown = case_page.locator("#value")
    shown.get_by_text("restored").wait_for()
    ct, restored, difference = (int(number) for number in re.findall(r"-?\d+", shown.inner_text()))
    assert abs(ct - phantom.ct[z, y, x]) <= 11
    assert abs(restored + 850) <= 5
    assert abs(difference - (int(phantom.ct[z, y, x]) + 850)) <= 5


def test_one_picture_can_be_shown_alone(case_page: Page) -> None:
    small = panel(case_page, "ct").bounding_box()
    button = case_page.get_by_role("button", name="Enlarge CT", exact=True)
    button.click()
    large = panel(case_page, "ct").bounding_box()
    assert small is not None
    assert large is not None
    assert large["width"] > 1.5 * small["width"]
    assert not panel(case_page, "restored").is_visible()
    panel(case_page, "ct").dblclick()
    assert panel(case_page, "restored").is_visible()


def test_pictures_fit_the_window(case_page: Page) -> None:
    for name in PANELS:
        box = panel(case_page, name).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 900
        assert box["width"] == pytest.approx(box["height"], rel=0.02)


def test_everything_has_a_name_for_those_who_do_not_see_it(case_page: Page, open_page: Callable[..., Page]) -> None:
    assert "slice" in (panel(case_page, "contour").get_attribute("aria-label") or "")
    unnamed = """() => [...document.querySelectorAll("img, canvas, button, input")].filter((element) =>
      !(element.alt || element.getAttribute("aria-label") || element.textContent || (element.labels || []).length)
    ).length"""
    assert case_page.evaluate(unnamed) == 0


def test_report_without_javascript_shows_a_picture(open_page: Callable[..., Page], folder: Path) -> None:
    page = open_page(folder / report_name("few"), java_script_enabled=False)
    assert page.locator("#picture").is_visible()
    assert not page.locator("#viewer").is_visible()
    assert page.get_by_text("9.5").is_visible()


def test_page_follows_the_reader_s_colours_and_prints(open_page: Callable[..., Page], folder: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = open_page(folder / report_name("few"), color_scheme="dark")
    page.locator("body[data-shown]").wait_for()
    dark = page.evaluate(ground)
    page.emulate_media(media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
    assert not page.locator("#level").is_visible()
    assert panel(page, "contour").is_visible()


def test_index_sorts_numbers_as_numbers_and_leads_to_the_reports(open_page: Callable[..., Page], folder: Path) -> None:
    page = open_page(folder / "report.html")
    names = page.locator("tbody th")
    assert names.all_inner_texts() == ["many", "few", "none", "lost"]
    lesion = page.get_by_role("button", name="Lesion (ml)")
    lesion.click()
    assert names.all_inner_texts() == ["none", "few", "many", "lost"]
    lesion.press("Enter")
    assert names.all_inner_texts() == ["many", "few", "none", "lost"]
    page.get_by_role("button", name="Case").click()
    assert names.all_inner_texts() == ["few", "lost", "many", "none"]
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Case")
    page.get_by_role("link", name="many").last.click()
    page.locator("body[data-shown]").wait_for()
    assert page.title() == "many"


def test_training_report_shows_galleries_over_time(
    open_page: Callable[..., Page], trained_fold: Path, tmp_path: Path
) -> None:
    page = open_page(write_training_report(trained_fold, tmp_path / "report.html"))
    pictures = page.locator(".gallery img")
    assert [picture.is_visible() for picture in pictures.all()] == [False, True]
    slider = page.get_by_label("Gallery, by epoch")
    slider.focus()
    slider.press("ArrowLeft")
    assert [picture.is_visible() for picture in pictures.all()] == [True, False]
    assert page.locator(".gallery output").inner_text() == "0"
    assert page.locator(".curves").evaluate("image => image.complete && image.naturalWidth > 500")
    assert all(picture.evaluate("image => image.naturalWidth > 300") for picture in pictures.all())
