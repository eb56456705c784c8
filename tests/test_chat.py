"""The parts of the page: who answers, what an upload becomes, what feedback becomes, and a page
used over its API.
"""

import dataclasses
import math
import random
import shutil
import socket
import ssl
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
import torch
from gradio import route_utils
from gradio_client import Client, handle_file
from PIL import Image
from pydicom.data import get_testdata_file
from volume_files import write_nifti, write_series

from medtune import chat, cli, models
from medtune.answers import answer_log_probs, generate_answers
from medtune.captions import parse_caption
from medtune.chat import uploads
from medtune.chat.models import confidence
from medtune.pairs import WINDOWS, copy_without_patient, load_pairs, read_frames
from medtune.records import check_folder, convert_pairs, read_records

QUESTION = "Describe this medical image."
NAME = "Testpatient^Grete"
pytestmark = pytest.mark.timeout(400)  # a busy machine trains the small adapter slowly


@pytest.fixture(scope="module")
def pair(tiny_vlm, small_adapter):
    """Base and adapter on one copy of the weights."""
    return chat.load_models(tiny_vlm, small_adapter)


@pytest.fixture(scope="module")
def rows(sample_path):
    return list(load_pairs(sample_path, split="test", limit=3))


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback")
    served = chat.launch(pair, feedback=folder, examples=[])
    yield served
    served.close()


def asked(question: str, pictures: int = 1) -> list[dict]:
    return [
        {
            "role": "user",
            "content": [{"type": "image"}] * pictures + [{"type": "text", "text": question}],
        }
    ]


def say(pair, which, picture, question=QUESTION, **options) -> chat.Said:
    *_, last = chat.answer(pair, which, asked(question), [picture], max_new_tokens=20, **options)
    return last


@pytest.fixture
def ct(tmp_path) -> list[Path]:
    """Three slices of a CT with a patient's name in many places, in files whose names are in the
    wrong order.
    """
    files = []
    for number, name in enumerate("cab"):
        ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        ds.PatientName = ds.PatientComments = ds.WindowCenterWidthExplanation = NAME
        ds.add_new((0x0029, 0x0010), "LO", NAME)
        ds.add_new((0x0029, 0x1001), "UN", NAME.encode())
        ds.preamble = NAME.encode().ljust(128)
        ds.ImagePositionPatient[2] = 5.0 * number
        ds.InstanceNumber = number + 1
        ds.SOPInstanceUID = pydicom.uid.generate_uid()
        ds.PixelData = (ds.pixel_array + 50 * number).astype(ds.pixel_array.dtype).tobytes()
        ds.save_as(tmp_path / f"{name}.dcm")
        files.append(tmp_path / f"{name}.dcm")
    return files


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 30,000 x 30,000 pixels."""
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


# ---- answers


@pytest.mark.slow
def test_answers_are_those_of_the_models_alone(pair, rows, tiny_vlm, small_adapter):
    base, said = models.load_base(tiny_vlm), {}
    for which in ("base", "tuned"):
        model = base if which == "base" else models.load_tuned(base, small_adapter)
        alone = generate_answers(model, pair.processor, rows, question=QUESTION, max_new_tokens=20)
        streamed = [say(pair, which, row["image"]) for row in rows]
        said[which] = [part.text for part in streamed]
        assert said[which] == [row["answer"] for row in alone]
        assert [part.tokens for part in streamed] == [row["tokens"] for row in alone]
    assert pair.base is pair.tuned, "one copy of the weights"
    assert said["base"] != said["tuned"]


@pytest.mark.slow
def test_visitors_at_once_never_get_each_others_model(pair, rows):
    jobs = [(which, n) for which in ("base", "tuned") for n in range(len(rows))]
    alone = {job: say(pair, job[0], rows[job[1]]["image"]).text for job in jobs}
    many = jobs * 2
    random.Random(0).shuffle(many)
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda job: say(pair, job[0], rows[job[1]]["image"]).text, many))
    assert together == [alone[job] for job in many]


@pytest.mark.slow
def test_the_text_grows_and_can_be_stopped(pair, rows):
    parts = list(chat.answer(pair, "base", asked(QUESTION), [rows[0]["image"]], max_new_tokens=20))
    texts = [part.text for part in parts]
    assert len(set(texts)) > 5 and all(texts[-1].startswith(text) for text in texts)
    assert 0 < parts[-1].first <= parts[-1].seconds and parts[-1].tokens == 20
    stopped = say(pair, "base", rows[0]["image"], stopped=lambda: True)
    assert stopped.tokens == 1
    left = chat.answer(pair, "base", asked(QUESTION), [rows[0]["image"]], max_new_tokens=100_000)
    next(left)
    left.close()  # a visitor who leaves holds nobody up
    assert say(pair, "base", rows[0]["image"]).text == texts[-1]


@pytest.mark.slow
def test_an_error_reaches_the_caller_and_the_next_is_answered(pair, rows):
    with pytest.raises(ValueError, match="[Ii]mage"):
        list(chat.answer(pair, "tuned", asked(QUESTION, pictures=2), [rows[0]["image"]]))
    with pytest.raises(TypeError):
        list(chat.answer(pair, "base", asked(QUESTION), [rows[0]["image"]], max_new_tokens="many"))
    assert say(pair, "base", rows[0]["image"]).text


@pytest.mark.slow
def test_sampling_draws(pair, rows):
    torch.manual_seed(0)  # of four draws of a model that is not sure, some differ
    assert len({say(pair, "tuned", rows[0]["image"], do_sample=True).text for _ in range(4)}) > 1


@pytest.mark.slow
def test_a_merged_model_is_a_second_one(tiny_vlm, small_adapter, pair, rows, tmp_path):
    merged = models.load_tuned(models.load_base(tiny_vlm), small_adapter).merge_and_unload(
        safe_merge=True
    )
    models.save_model(merged, pair.processor, tmp_path / "merged", card="for tests")
    two = chat.load_models(tiny_vlm, tuned=tmp_path / "merged")
    assert two.base is not two.tuned
    for which in ("base", "tuned"):
        assert say(two, which, rows[1]["image"]).text == say(pair, which, rows[1]["image"]).text
    with pytest.raises(ValueError, match="not both"):
        chat.load_models(tiny_vlm, small_adapter, tuned=tmp_path)


# ---- uploads


def test_pictures_lose_what_their_files_say(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = NAME
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image.save(tmp_path / "a.jpg", exif=exif, comment=NAME)
    Image.new("RGBA", (3000, 10)).save(tmp_path / "b.png")
    upload = chat.read_upload([tmp_path / "a.jpg", tmp_path / "b.png"])
    assert [(p.mode, p.size, p.info) for p in upload.pictures] == [
        ("RGB", (8, 8), {}),
        ("RGB", (2048, 7), {}),
    ]
    assert not upload.refused and not upload.slices


def test_bad_files_are_refused_one_by_one(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    Image.effect_noise((64, 64), 9).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    Image.new("L", (8, 8)).save(tmp_path / "page.gif")
    (tmp_path / "fake.dcm").write_text("no DICOM")
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    names = ["notes.txt", "cut.png", "page.gif", "fake.dcm", "good.png"]
    upload = chat.read_upload([bomb(tmp_path / "bomb.png"), *(tmp_path / name for name in names)])
    reasons = {name: english for name, (english, _) in upload.refused}
    assert len(upload.pictures) == 1 and list(reasons) == ["bomb.png", *names[:4]]
    assert (
        "too much" in reasons["bomb.png"]
        and "no PNG" in reasons["notes.txt"]
        and "no PNG" in reasons["page.gif"]
    )
    assert "cannot be read" in reasons["cut.png"] and "not DICOM" in reasons["fake.dcm"]
    assert not any("\n" in text or str(tmp_path) in text for text in reasons.values())


def test_count_and_size_are_limited(tmp_path, monkeypatch, ct):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    upload = chat.read_upload([tmp_path / "a.png"] * 10, room=3)
    assert len(upload.pictures) == 3 and len(upload.refused) == 7
    monkeypatch.setattr(uploads, "MAX_SLICES", 2)
    assert len(chat.read_upload(ct).slices) == 2
    monkeypatch.setattr(uploads, "MAX_SIZE", 10_000)
    assert len(chat.read_upload(ct).refused) == 3, "too large as files"
    small = get_testdata_file(
        "SC_rgb_rle_2frame.dcm"
    )  # 2 frames of 100 x 100 pixels in a file of fewer bytes
    monkeypatch.setattr(uploads, "MAX_SIZE", 19_999)
    assert (
        Path(small).stat().st_size < uploads.MAX_SIZE
        and "too much" in chat.read_upload([small]).refused[0][1][0]
    )
    monkeypatch.setattr(uploads, "MAX_SIZE", 20_000)
    assert len(chat.read_upload([small]).slices) == 2


def test_a_series_is_sorted_and_forgets_its_patient(ct):
    upload = chat.read_upload(ct)
    assert len(upload.slices) == 3 and upload.windows is WINDOWS and not upload.refused
    means = [np.asarray(read_frames(path, window="abdomen")[n]).mean() for path, n in upload.slices]
    assert means == sorted(means) and means[0] < means[2]
    for window in (None, "lung"):
        for original, (path, _) in zip(ct, upload.slices, strict=True):
            assert read_frames(original, window=window)[0] == read_frames(path, window=window)[0]
    folder = Path(upload.folder.name)
    for file in folder.iterdir():
        assert NAME.split("^")[0].encode() not in file.read_bytes()
        left = pydicom.dcmread(file)
        assert not any(
            element.VR in ("PN", "DA", "LO", "LT", "SH", "UN") for element in left.iterall()
        )
        assert left.SeriesInstanceUID != pydicom.dcmread(ct[0]).SeriesInstanceUID
    del upload
    assert not folder.exists()


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small_RLE.dcm",
        "rtdose.dcm",
        "SC_rgb_rle_2frame.dcm",
        "examples_palette.dcm",
    ],
)
def test_copies_without_the_patient_look_the_same(name, tmp_path):
    copy_without_patient(get_testdata_file(name), tmp_path / "bare.dcm")
    assert read_frames(get_testdata_file(name)) == read_frames(tmp_path / "bare.dcm")


def test_real_dicom_files_are_read(real, tmp_path):
    files = sorted((real / "dicom").glob("*.dcm"))
    upload = chat.read_upload(files)
    assert len(upload.slices) >= len(files) and not upload.refused
    for path, _ in upload.slices:
        left = pydicom.dcmread(path)
        assert not any(
            element.VR in ("PN", "LO", "LT", "SH", "ST", "UT", "DA", "TM")
            for element in left.iterall()
        )


# ---- series and slabs


@pytest.fixture
def head(tmp_path) -> Path:
    """A NIfTI file of 8 slices, 3 mm apart, brighter from the feet to the head."""
    array = (
        np.arange(8, dtype=np.int16)[:, None, None] * 100 - 700 + np.zeros((8, 20, 16), np.int16)
    )
    return write_nifti(tmp_path / "head.nii.gz", array, stored="RAS", size=(0.8, 0.8, 3.0))


def brightness(pictures) -> list[float]:
    return [float(np.asarray(picture).mean()) for picture in pictures]


def test_a_nifti_is_a_series_with_its_millimetres(head):
    upload = chat.read_upload([head])
    assert not upload.refused and not upload.pictures
    assert (upload.count, upload.spacing, upload.windows) == (8, pytest.approx(3), WINDOWS)
    every = brightness(upload.picture(number, "lung") for number in range(8))
    assert every == sorted(every) and every[0] < every[-1]
    assert upload.picture(0).size == (16, 20)
    # 6 mm apart is every other slice; near an end the slab is moved inwards
    for at, expected in ((3, [1, 3, 5]), (0, [0, 2, 4]), (7, [3, 5, 7])):
        found = brightness(upload.slab(at, 3, 6.0, "lung"))
        assert found == [every[number] for number in expected]
    assert brightness(upload.slab(4, 4, None, "lung")) == every[3:7]
    for pictures, mm in ((9, None), (3, 1.0), (4, 9.0)):
        with pytest.raises(ValueError, match="volume"):
            upload.slab(4, pictures, mm)


def test_values_that_are_no_hounsfield_units_have_no_windows_of_ct(tmp_path):
    file = write_nifti(tmp_path / "mr.nii", np.arange(60, dtype=np.int16).reshape(3, 5, 4))
    assert chat.read_upload([file]).windows == {}


def test_a_nifti_that_is_too_large_or_none_is_refused(tmp_path, monkeypatch, head):
    (tmp_path / "x.nii").write_bytes(b"no volume")
    monkeypatch.setattr(uploads, "MAX_VOXELS", 2000)
    upload = chat.read_upload([tmp_path / "x.nii", head])
    reasons = [reason for _, (reason, _) in upload.refused]
    assert "NIfTI volume is damaged" in reasons[0]
    assert "promises more than 2,000 voxels" in reasons[1]
    assert not upload.count


def test_one_series_at_a_time(tmp_path, head):
    slices = write_series(tmp_path / "scan", np.zeros((3, 6, 5), np.int16))
    other = write_nifti(tmp_path / "other.nii", np.zeros((3, 6, 5), np.int16))
    for files, kept in (([head, other], 8), ([head, *slices], 8), ([*slices, head], 3)):
        upload = chat.read_upload(files)
        assert upload.count == kept
        assert len(upload.refused) == len(files) - (1 if kept == 8 else 3)
        assert all("one series at a time" in english for _, (english, _) in upload.refused)


def test_a_series_knows_its_distance_or_says_what_is_missing(tmp_path):
    array = np.random.default_rng(0).integers(-900, 900, (7, 12, 10), dtype=np.int16)
    files = write_series(tmp_path / "whole", array, size=(0.8, 0.8, 2.5))
    whole = chat.read_upload(files)
    assert whole.spacing == pytest.approx(2.5) and whole.no_spacing is None
    assert len(whole.slab(3, 3, 5.0)) == 3
    part = chat.read_upload([file for number, file in enumerate(files) if number != 3])
    assert part.spacing is None and "1 missing between them" in part.no_spacing
    # neighbours in the order of the files can be asked about, a distance cannot
    assert len(part.slab(3, 3, None)) == 3
    with pytest.raises(ValueError, match="nobody knows how far apart"):
        part.slab(3, 3, 5.0)


def test_a_series_of_ones_own_is_opened(tmp_path, head):
    array = np.random.default_rng(0).integers(-900, 900, (5, 12, 10), dtype=np.int16)
    write_series(tmp_path / "scan", array, size=(0.8, 0.8, 2.5))
    opened = chat.open_series(tmp_path / "scan")
    assert (opened.count, opened.spacing) == (5, pytest.approx(2.5))
    assert chat.open_series(head).count == 8
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no DICOM pictures"):
        chat.open_series(tmp_path / "empty")
    (tmp_path / "notes.nii").write_text("no volume")
    with pytest.raises(ValueError, match=r"series=.*notes\.nii: NIfTI volume is damaged"):
        chat.open_series(tmp_path / "notes.nii")


def test_the_real_series_is_asked_about_as_a_slab(real):
    upload = chat.open_series(real / "second_person" / "dicom")
    assert (upload.count, upload.spacing) == (20, pytest.approx(2))
    slab = upload.slab(10, 4, 4.0, "abdomen")
    assert len({picture.tobytes() for picture in slab}) == 4


# ---- feedback


def test_feedback_becomes_training_data(tmp_path):
    pictures = [Image.effect_noise((40, 30), 50 + n).convert("RGB") for n in range(3)]
    told = {"question": QUESTION, "answer": "A dog.", "model": "tuned"}
    for key, shown, caption, rating in [
        ("a", pictures[:1], "A dog.", "up"),
        ("b", pictures[1:2], "", "down"),
        ("c", pictures[1:3], "图像为腹部。", "corrected"),
        ("a", pictures[:1], "A cat.", "corrected"),  # a second thought replaces the first
    ]:
        file = chat.save_feedback(
            tmp_path / "feedback", key, shown, caption=caption, rating=rating, **told
        )
    # of a version that called it so; the next word on any answer mends it
    file.write_text(file.read_text("utf-8").replace('"model_answer"', '"answer"'), "utf-8")
    chat.save_feedback(tmp_path / "feedback", "b", pictures[1:2], caption="", rating="down", **told)
    summary = convert_pairs(file, tmp_path / "out")
    assert summary["records"] == {"train": 3} and summary["reasons"] == {"caption": 1}
    assert check_folder(tmp_path / "out")["ok"]
    records = {row["id"]: row for row in read_records(tmp_path / "out")}
    said = {key: row["completion"][0]["content"][0]["text"] for key, row in records.items()}
    assert said == {"a": "A cat.", "c": "图像为腹部。", "c-2": "图像为腹部。"}
    assert (
        records["a"]["images"][0].convert("RGB") == pictures[0]
        and records["a"]["question"] == QUESTION
    )
    both = convert_pairs(file, tmp_path / "both", pictures_per_sample=2)
    shown = {row["id"]: len(row["images"]) for row in read_records(tmp_path / "both")}
    assert both["records"] == {"train": 2} and shown == {"a": 1, "c+1": 2}


def test_no_vote_is_lost(tmp_path):
    """Signs that Unicode counts as ends of lines stand inside texts; two pages write at once."""
    picture = [Image.new("RGB", (9, 9))]
    texts = [
        "One\u2028two",
        "One\u2029two",
        "One\x85two",
        "One\x0b\x0c\x1c\x1d\x1etwo",
        "One\r\ntwo",
    ]
    folder = tmp_path / "feedback"
    for key, text in enumerate(texts):
        file = chat.save_feedback(folder, str(key), picture, caption=text, question=text)
    assert [row["caption"] for row in load_pairs(file)] == texts
    assert folder.stat().st_mode & 0o777 == 0o700
    chat.save_feedback(folder, "half", picture, caption="half \ud800 a sign")
    assert load_pairs(file)["caption"][-1] == "half ? a sign"
    with ThreadPoolExecutor(8) as pool:
        for number in range(24):
            pool.submit(chat.save_feedback, folder, f"many {number}", picture, caption="c")
    assert len(load_pairs(file)) == len(texts) + 1 + 24
    before = file.read_bytes()
    file.write_bytes(before + b"{cut")
    with pytest.raises(ValueError, match="line 31 is not JSON"):
        chat.save_feedback(folder, "next", picture, caption="c")
    assert file.read_bytes() == before + b"{cut"


# ---- the page over its API


def test_texts_are_in_both_languages():
    assert all(len(pair) == 2 and all(pair) for pair in chat.TEXT.values())
    assert all(one.count("{") == other.count("{") for one, other in chat.TEXT.values())


@pytest.mark.slow
def test_a_page_of_the_base_alone(tiny_vlm, rows, tmp_path):
    alone = chat.load_models(tiny_vlm)
    assert alone.tuned is None
    page = chat.launch(alone, feedback=tmp_path, examples=[])
    try:
        client = Client(page.local_url, verbose=False)
        rows[0]["image"].save(tmp_path / "a.png")
        client.predict([handle_file(tmp_path / "a.png")], 0, api_name="/upload")
        *_, base, tuned = client.predict(QUESTION, False, 16, 1, "", 0, api_name="/ask")
        assert len(base) == 2 and not isinstance(tuned, list)
    finally:
        page.close()


def talk(page, picture: Path, question: str = QUESTION, language: int = 0) -> tuple[str, str]:
    client = Client(page.local_url, verbose=False)
    client.predict([handle_file(picture)], language, api_name="/upload")
    *_, base, tuned = client.predict(question, False, 16, 1, "", language, api_name="/ask")
    return tuple(side[-1]["content"][0]["text"].rpartition("\n\n")[0] for side in (base, tuned))


def test_how_sure_the_tuned_model_is_of_the_structure(pair, rows, tmp_path):
    picture = rows[0]["image"]
    row = {"image": picture, "question": QUESTION}
    text = "The region shows the liver."
    [spoken] = answer_log_probs(pair.tuned, pair.processor, [row], [text])
    found = confidence(pair, asked(QUESTION), [picture], text)
    assert found == pytest.approx(spoken.probability("liver")) and 0 < found < 1
    assert math.isnan(confidence(pair, asked(QUESTION), [picture], "I see nothing."))


def test_the_threshold_of_a_run_is_found_and_read(tmp_path):
    adapter = tmp_path / "out" / "03_finetune_lora" / "adapter"
    file = tmp_path / "out" / "13_when_to_trust" / "threshold.json"
    assert chat.find_threshold(adapter) is None
    file.parent.mkdir(parents=True)
    file.write_text('{"value": 0.25, "promised": 0.1}')
    assert chat.read_threshold(chat.find_threshold(adapter)) == 0.25
    file.write_text('{"value": null}')
    assert chat.read_threshold(file) == math.inf
    for damaged in ("", "[]", "{}", '{"value": "high"}'):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="threshold.json holds no threshold"):
            chat.read_threshold(file)


@pytest.mark.slow
def test_the_page_says_of_an_unsure_answer_that_it_would_not_give_it(pair, rows, tmp_path):
    rows[0]["image"].save(tmp_path / "a.png")
    refusals = {0: "**I would not answer: ", 1: "**我不会作答："}
    said = {}
    # the strict page in Chinese, the lenient one in English
    for least, language in ((math.inf, 1), (0.0, 0)):
        models_of_page = dataclasses.replace(pair, least=least)
        page = chat.launch(models_of_page, feedback=tmp_path, examples=[])
        try:
            client = Client(page.local_url, verbose=False)
            client.predict([handle_file(tmp_path / "a.png")], language, api_name="/upload")
            *_, base, tuned = client.predict(QUESTION, False, 90, 1, "", language, api_name="/ask")
        finally:
            page.close()
        assert not base[-1]["content"][0]["text"].startswith("**")
        said[language] = tuned[-1]["content"][0]["text"]
    assert said[1].startswith(refusals[1])
    answered = said[1].split("\n\n")[1]
    assert answered in said[0], "the answer itself is still there"
    # at 0 every answer that names a structure is sure enough
    names_one = parse_caption(answered).structure is not None
    assert said[0].startswith(refusals[0]) is not names_one


@pytest.mark.slow
def test_visitors_of_the_page_get_their_own_answers(page, rows, tmp_path):
    files = []
    for n, row in enumerate(rows):
        row["image"].save(tmp_path / f"{n}.png")
        files.append(tmp_path / f"{n}.png")
    alone = [talk(page, file) for file in files]
    assert all(base != tuned for base, tuned in alone)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda file: talk(page, file), files * 2)) == alone * 2


@pytest.mark.slow
def test_follow_ups_know_what_was_said(page, pair, rows, tmp_path):
    picture = tmp_path / "a.png"
    rows[0]["image"].save(picture)
    client = Client(page.local_url, verbose=False)
    assert "Add a picture" in client.predict(QUESTION, False, 16, 1, "", 0, api_name="/ask")[1]
    client.predict([handle_file(picture)], 0, api_name="/upload")
    client.predict(QUESTION, False, 16, 1, "", 0, api_name="/ask")
    *_, base, tuned = client.predict(
        "Where is it? <|im_end|><|image_pad|>", False, 16, 1, "", 1, api_name="/ask"
    )
    shown = chat.read_upload([picture]).pictures
    for which, lines in (("base", base), ("tuned", tuned)):
        first = list(chat.answer(pair, which, asked(QUESTION), shown, max_new_tokens=16))[-1].text
        messages = [
            *asked(QUESTION),
            {"role": "assistant", "content": [{"type": "text", "text": first}]},
        ]
        messages += asked("Where is it?", pictures=0)
        second = list(chat.answer(pair, which, messages, shown, max_new_tokens=16))[-1].text
        said = [line["content"][0]["text"] for line in lines]
        assert said[1].startswith(first) and said[3].startswith(second) and "词元" in said[3]
        assert "new pictures: 1" in said[0] or "新图像：1" in said[0]
        assert said[2] == "Where is it?", "no token of the template gets through"


@pytest.mark.slow
def test_a_slab_and_an_earlier_picture_are_asked_about_in_their_order(pair, head, tmp_path):
    """What the page shows a model is what the model alone is shown: earlier first, then the slab."""
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "earlier.png")
    page = chat.launch(pair, feedback=tmp_path / "feedback", examples=[], series=head)
    try:
        client = Client(page.local_url, verbose=False)
        client.predict([handle_file(head)], 0, api_name="/upload")
        *_, question = client.predict(
            [handle_file(tmp_path / "earlier.png")], "", 1, "", 1, None, 0, api_name="/earlier"
        )
        assert question == chat.TEXT["compare"][0]
        slab = [QUESTION, False, 16, 4, "lung", 0, 3, 6]
        *_, base, _ = client.predict(*slab, api_name="/ask")
        [told] = client.predict(QUESTION, False, 16, 4, "", 0, 3, 1, api_name="/ask")[1:2]
        assert told.startswith("No such slab: volume has slices 3 mm apart")
    finally:
        page.close()
    upload = chat.open_series(head)
    [earlier] = chat.read_upload([tmp_path / "earlier.png"]).pictures
    shown = [earlier, *upload.slab(3, 3, 6.0, "lung")]
    *_, alone = chat.answer(pair, "base", asked(QUESTION, 4), shown, max_new_tokens=16)
    said = [line["content"][0]["text"] for line in base]
    assert said[0] == f"[new pictures: 4] {QUESTION}" and said[1].startswith(alone.text)


@pytest.mark.slow
def test_uploads_do_not_stay(page, ct):
    client = Client(page.local_url, verbose=False)
    client.predict([handle_file(file) for file in ct], 0, api_name="/upload")
    uploads = [Path(file) for file in page.upload_file_set]
    assert len(uploads) >= 3 and page.delete_cache == (60, 120)
    route_utils.delete_files_created_by_app(
        page, 0
    )  # what gradio does each minute, with another age
    assert not [file for file in uploads if file.exists()]


NOBODY = chat.ChatModels(None, None, None)


@pytest.mark.parametrize(
    ("host", "password"),
    [("0.0.0.0", None), ("0.0.0.0", "short"), ("127.0.0.1", "short"), ("", None), ("::", "short")],
)
def test_nobody_else_without_a_password(host, password):
    with pytest.raises(ValueError, match="password of at least 8"):
        chat.launch(NOBODY, host=host, password=password, examples=[])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> dict[str, Path]:
    """A certificate that nobody vouches for, its key, the key with a passphrase, and another."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made = {name: folder / f"{name}.pem" for name in ("cert", "key", "locked", "other")}
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=here"]
    request += ["-keyout", made["key"], "-out", made["cert"]]
    lock = [openssl, "rsa", "-aes256", "-passout", "pass:secret", "-in", made["key"]]
    for command in (
        request,
        [*lock, "-out", made["locked"]],
        [openssl, "genrsa", "-out", made["other"]],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return made


def test_nobody_else_without_tls(certificate, tmp_path):
    def start(host="0.0.0.0", **files):
        chat.launch(NOBODY, host=host, password="correct horse", examples=[], **files)

    cert, key = certificate["cert"], certificate["key"]
    with pytest.raises(ValueError, match=r"without TLS .* tls_cert=FILE and tls_key=FILE"):
        start()
    for half in ({"tls_cert": cert}, {"tls_key": key}):
        with pytest.raises(ValueError, match="TLS needs both"):
            start(**half)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        start(tls_cert=cert, tls_key=tmp_path / "nowhere.pem")
    for wrong, reason in [
        ("other", "are no PEM"),
        ("cert", "are no PEM"),
        ("locked", "passphrase"),
    ]:
        with pytest.raises(ValueError, match=reason) as refused:
            start("127.0.0.1", tls_cert=cert, tls_key=certificate[wrong])
        assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_page_for_others_is_encrypted(certificate):
    page = chat.launch(
        NOBODY,
        host="0.0.0.0",
        password="correct horse",
        tls_cert=certificate["cert"],
        tls_key=certificate["key"],
        examples=[],
    )
    try:
        port = page.server_port
        assert page.local_url.startswith("https://")
        with pytest.raises(httpx.ConnectError, match="[Cc]ertificate"):
            httpx.get(f"https://127.0.0.1:{port}/")
        trusted = ssl.create_default_context(cafile=str(certificate["cert"]))
        trusted.check_hostname = False
        assert httpx.get(f"https://127.0.0.1:{port}/", verify=trusted).status_code == 200
        assert httpx.get(f"https://127.0.0.1:{port}/config", verify=trusted).status_code == 401
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/")
    finally:
        page.close()


@pytest.mark.slow
def test_a_password_is_asked_for(pair):
    page = chat.launch(pair, password="correct horse", examples=[])
    try:
        assert page.local_url.startswith("http://127.0.0.1:")
        for wrong in ("", "correct horsf", "正确的密码正确"):
            with pytest.raises(Exception, match="[Cc]redentials|[Ll]ogin|401|auth"):
                Client(page.local_url, auth=("anybody", wrong), verbose=False)
        Client(page.local_url, auth=("anybody", "correct horse"), verbose=False)
    finally:
        page.close()


@pytest.mark.slow
def test_one_machine_only_and_nothing_goes_out(page):
    config = page.config
    assert not config.get("analytics_enabled") and not page.share and not config.get("run_history")
    port = int(page.local_url.rstrip("/").rsplit(":", 1)[1])
    with socket.create_server(("", 0)) as other:  # every address of this machine but the loopback
        assert other.getsockname()[1] != port
    addresses = {
        info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)
    }
    for address in addresses - {"127.0.0.1"} - {a for a in addresses if a.startswith("127.")}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2).close()


def test_the_command_says_what_is_wrong(tmp_path, tiny_vlm, capsys, monkeypatch):
    monkeypatch.setenv("MEDTUNE_CHAT_PASSWORD", "short")
    for arguments, message in [
        (["./no-model"], "No model folder"),
        ([tiny_vlm, "--adapter", tmp_path], "No adapter in"),
        ([tiny_vlm, "--threshold", tmp_path], "--threshold is that of an adapter"),
        ([tiny_vlm, "--adapter", tmp_path, "--threshold", tmp_path / "no"], "No such file"),
        ([tiny_vlm, "--host", "0.0.0.0"], "password of at least 8"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(["chat", *map(str, arguments)])
        said = capsys.readouterr().err
        assert end.value.code == 1 and message in said and said.count("medtune: ") == 1


def test_the_command_names_a_series_that_is_none(tmp_path, tiny_vlm, capsys):
    for series, message in [
        (tmp_path, f"--series {tmp_path}: this folder holds no DICOM pictures"),
        (tmp_path / "no", f"--series {tmp_path / 'no'}: there is no such folder or file"),
    ]:
        with pytest.raises(SystemExit) as end:
            cli.main(["chat", str(tiny_vlm), "--series", str(series)])
        said = capsys.readouterr().err
        assert end.value.code == 1 and message in said and said.count("medtune: ") == 1
