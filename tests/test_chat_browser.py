"""The page in a real browser, headless Chromium: what a visitor does, sees and is refused, on a
desk and on a phone.

Screenshots are kept in pytest's temporary folder, `pytest-current/screenshots*/`.
"""

import contextlib
import json

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from volume_files import write_nifti

from medtune import chat
from medtune.pairs import load_pairs

WAIT = 60_000  # milliseconds: a shared machine may be slow, the page is not
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def site(tiny_vlm, small_adapter, sample_path, tmp_path_factory):
    models, folder = chat.load_models(tiny_vlm, small_adapter), tmp_path_factory.mktemp("feedback")
    examples = list(load_pairs(sample_path, split="test", limit=3))
    page = chat.launch(models, feedback=folder, examples=examples)
    page.feedback, page.examples = folder / "feedback.jsonl", examples
    yield page
    page.close()


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture
def visit(chromium, site):
    """Open the page; nothing may be asked of another server, and no script may fail."""
    opened = []

    def start(width=1280, height=900):
        tab = chromium.new_page(viewport={"width": width, "height": height}, locale="en")
        tab.set_default_timeout(WAIT)
        foreign, errors = [], []
        local = (site.local_url, "data:", "blob:")
        tab.on(
            "request",
            lambda request: None if request.url.startswith(local) else foreign.append(request.url),
        )
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(site.local_url)
        tab.wait_for_selector("#question textarea")
        opened.append((tab, foreign, errors))
        return tab

    yield start
    for tab, foreign, errors in opened:
        tab.close()
        assert not foreign and not errors


@pytest.fixture
def pictures(tmp_path):
    """Two pictures, and three slices of a CT with a patient's name."""
    for n in range(2):
        Image.effect_noise((64, 64), 60 + 40 * n).save(tmp_path / f"{n}.png")
    for n in range(3):
        ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        ds.PatientName, ds.InstanceNumber, ds.ImagePositionPatient[2] = (
            "Testpatient^Grete",
            n,
            5.0 * n,
        )
        ds.PixelData = np.roll(ds.pixel_array, 20 * n).tobytes()
        ds.save_as(tmp_path / f"slice{n}.dcm")
    return tmp_path


def upload(tab, *files) -> None:
    tab.set_input_files("#files input[type=file]", [str(file) for file in files])


def ask(tab, question=None) -> tuple[str, str]:
    """Ask, wait for both answers, and give them without the line of seconds and tokens."""
    before = tab.locator("#tuned .bot.message em").count()
    if question is not None:
        tab.fill("#question textarea", question)
    tab.locator("button.primary").click()
    tab.locator("#tuned .bot.message em").nth(before).wait_for()
    tab.wait_for_function(
        "document.querySelectorAll('#base .bot.message em').length > " + str(before)
    )
    said, last = [], None
    while (
        said != last or last is None
    ):  # the line of seconds stands under an answer that still grows
        last = said
        tab.wait_for_timeout(1500)
        said = [
            tab.locator(f"#{side} .bot.message").last.inner_text() for side in ("base", "tuned")
        ]
    assert all("tokens in" in text or "词元" in text for text in said)
    return tuple(text.strip().rpartition("\n")[0].strip() for text in said)


def source(tab, selector) -> str:
    return tab.locator(f"{selector} img").first.get_attribute("src")


def test_upload_ask_and_compare(visit, pictures, screenshots):
    tab = visit()
    assert "No medical device" in tab.inner_text("#notice")
    tab.screenshot(path=screenshots / "start.png", full_page=True)
    upload(tab, pictures / "0.png")
    tab.wait_for_selector("#gallery img")
    base, tuned = ask(tab)
    assert base and tuned and base != tuned
    tab.screenshot(path=screenshots / "answers.png", full_page=True)
    ask(tab, "Where is it?")
    assert tab.locator("#base .user.message").count() == 2, (
        "a follow-up turn stands below the first"
    )


def test_an_example_a_question_in_chinese_and_feedback(visit, site, screenshots):
    tab = visit()
    tab.get_by_text("中文").click()
    tab.get_by_text("非医疗器械").wait_for()
    assert tab.locator("button.primary").inner_text() == "提问"
    assert tab.locator("#question textarea").input_value() == "请描述这张医学图像。"
    tab.locator("#shelf button img").nth(1).click()
    tab.wait_for_selector("#gallery img")
    assert tab.locator("#reference textarea").input_value() == site.examples[1]["caption_zh"]
    base, tuned = ask(tab)
    assert any("\u4e00" <= letter <= "\u9fff" for letter in base + tuned) and base != tuned
    tab.screenshot(path=screenshots / "chinese.png", full_page=True)
    tab.locator("#tuned button[aria-label=Like]").click()
    tab.get_by_text("已保存").wait_for()
    assert json.loads(site.feedback.read_text("utf-8"))["rating"] == "up"
    tab.get_by_text("更正回答").click()
    tab.fill("#best textarea", "图像为腹部。")
    tab.get_by_role("button", name="保存为训练数据").click()
    tab.wait_for_timeout(2000)
    (row,) = [json.loads(line) for line in site.feedback.read_text("utf-8").splitlines()]
    assert (row["caption"], row["rating"], row["model_answer"]) == (
        "图像为腹部。",
        "corrected",
        tuned,
    )
    assert (
        load_pairs(site.feedback)[0]["image"].convert("RGB").size == site.examples[1]["image"].size
    )


def test_a_series_with_slider_and_windows(visit, pictures, screenshots):
    tab = visit()
    upload(tab, *(pictures / f"slice{n}.dcm" for n in range(3)))
    tab.wait_for_selector("#view img")
    first = source(tab, "#view")
    tab.fill("#slice input[type=number]", "3")
    tab.press("#slice input[type=number]", "Enter")
    tab.wait_for_function("old => document.querySelector('#view img').src != old", arg=first)
    third = source(tab, "#view")
    tab.click("#window input")
    tab.get_by_role("option", name="lung -600/1500").click()
    tab.wait_for_function("old => document.querySelector('#view img').src != old", arg=third)
    tab.get_by_role("button", name="Also ask about what is shown").click()
    tab.wait_for_selector("#gallery img")
    ask(tab)
    tab.screenshot(path=screenshots / "series.png", full_page=True)
    assert "Grete" not in tab.content(), "nothing of the patient is shown"


def test_a_slab_of_a_nifti_beside_an_earlier_picture(visit, pictures, screenshots):
    tab = visit()
    random = np.random.default_rng(0)
    array = random.integers(-900, 900, (8, 24, 24), dtype=np.int16)
    file = write_nifti(pictures / "chest.nii.gz", array, stored="RAS", size=(0.8, 0.8, 3.0))
    upload(tab, file)
    tab.wait_for_selector("#view img")
    tab.get_by_text("8 slices, 3.00 mm apart").wait_for()
    tab.fill("#slice input[type=number]", "4")
    tab.press("#slice input[type=number]", "Enter")
    tab.fill("#slab input[type=number]", "3")
    tab.press("#slab input[type=number]", "Enter")
    tab.wait_for_function("document.querySelectorAll('#around img').length == 3")
    neighbours = source(tab, "#around")
    # a distance that the series does not have is refused, one that it has is taken
    for mm, wanted in (("1", 0), ("6", 3)):
        tab.fill("#apart input", mm)
        tab.press("#apart input", "Enter")
        tab.wait_for_function(f"document.querySelectorAll('#around img').length == {wanted}")
        if not wanted:
            tab.get_by_text("No such slab: volume has slices 3 mm apart").wait_for()
    assert source(tab, "#around") != neighbours
    tab.set_input_files("#earlier input[type=file]", str(pictures / "0.png"))
    tab.wait_for_selector("#before img")
    compare = chat.TEXT["compare"][0]
    assert tab.locator("#question textarea").input_value() == compare
    assert tab.locator("#around img").count() == 3, "the slab is still there"
    ask(tab)
    asked_for = tab.locator("#base .user.message").first.inner_text()
    assert f"[new pictures: 4] {compare}" in asked_for
    tab.screenshot(path=screenshots / "slab.png", full_page=True)
    tab.get_by_role("button", name="Start anew").click()
    tab.wait_for_selector("#before img", state="hidden")


def test_two_pictures_in_one_question(visit, pictures, screenshots):
    tab = visit()
    upload(tab, pictures / "0.png", pictures / "1.png")
    tab.wait_for_function("document.querySelectorAll('#gallery img').length == 2")
    ask(tab, "What is in both?")
    assert "new pictures: 2" in tab.locator("#base .user.message").first.inner_text()
    tab.screenshot(path=screenshots / "two.png", full_page=True)


def test_pasting(visit, pictures):
    tab = visit()
    tab.evaluate(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
        dispatchEvent(new ClipboardEvent("paste", {clipboardData: data})); }""",
        list((pictures / "0.png").read_bytes()),
    )
    tab.wait_for_selector("#gallery img")


def test_a_refused_file_has_its_message(visit, pictures, screenshots):
    tab = visit()
    (pictures / "notes.txt").write_text("no picture")
    upload(tab, pictures / "notes.txt", pictures / "1.png")
    tab.get_by_text("notes.txt was refused: it is no PNG, JPEG, DICOM or NIfTI picture").wait_for()
    tab.wait_for_selector("#gallery img")  # the good one is taken
    tab.screenshot(path=screenshots / "refused.png", full_page=True)
    tab.get_by_role("button", name="Start anew").click()
    tab.wait_for_selector("#gallery img", state="hidden")
    tab.locator("button.primary").click()
    tab.get_by_text("Add a picture and type a question first.").wait_for()


def test_on_a_phone(visit, pictures, screenshots):
    tab = visit(390, 844)
    upload(tab, pictures / "0.png")
    tab.wait_for_selector("#gallery img")
    ask(tab)
    wide = "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 391)"
    wide += ".map(e => e.tagName + '.' + e.className).slice(0, 12)"
    with contextlib.suppress(Exception):  # an animation of the page may still be under way
        tab.wait_for_function("document.documentElement.scrollWidth <= 390", timeout=20_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390, (
        f"sticks out: {tab.evaluate(wide)}"
    )
    for selector in ("#base", "#tuned", "#question", "button.primary"):
        box = tab.locator(selector).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 60
    tab.screenshot(path=screenshots / "phone.png", full_page=True)
