"""medtune.deploy and a PACS: a series goes from Orthanc to a report in Orthanc, and nothing of the
patient goes anywhere else.
"""

import contextlib
import dataclasses
import http.server
import importlib.util
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
import requests
from dicom_files import data_set, saved
from multitask_twins import tuned, twins_below
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.uid import MultiFrameGrayscaleByteSecondaryCaptureImageStorage, generate_uid
from test_answers_server import AnswerServer, said

from medtune import cli, deploy
from medtune.answers import OpenAIServer, generate_answers
from medtune.pairs import read_frames

MISSING = [
    name
    for name in ("dicomweb_client", "highdicom", "fhir")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra pacs)"
)

ORTHANC = shutil.which("Orthanc")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
WHY_NOT = "Debian's orthanc and orthanc-dicomweb are not installed"
needs_orthanc = pytest.mark.skipif(not (ORTHANC and PLUGIN.exists()), reason=WHY_NOT)
USER, PASSWORD = "reader", "of the tests"
QUESTION = "Where is it?"
# All that tells who it is; some of it in the header alone, some in the text of the header.
PATIENT = {
    "PatientName": "Wang^XiaoDong=王^小東=",
    "PatientID": "PID-4711-SECRET",
    "PatientBirthDate": "19630214",
    "PatientSex": "F",
    "AccessionNumber": "ACC-0815",
    "InstitutionName": "St. Nowhere",
    "StudyDate": "20240229",
    "StudyTime": "101112",
    "StudyDescription": "Follow-up of Wang",
    "ReferringPhysicianName": "Grey^Meredith",
}
# Long enough that no random UID and no picture in base 64 holds one of them by chance.
TELLING = (
    "XiaoDong",
    "小東",
    "PID-4711",
    "19630214",
    "ACC-0815",
    "Nowhere",
    "20240229",
    "Meredith",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    """The DICOMweb address of an Orthanc that wants a user and a password."""
    folder = tmp_path_factory.mktemp("orthanc")
    port = free_port()
    settings = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [ORTHANC, "orthanc.json"], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}/dicom-web"
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{address}/studies", auth=(USER, PASSWORD), timeout=10)
                break
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < end, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(autouse=True)
def let_in(monkeypatch):
    monkeypatch.setenv("MEDTUNE_PACS_USER", USER)
    monkeypatch.setenv("MEDTUNE_PACS_PASSWORD", PASSWORD)


def archive_at(address: str) -> "deploy.Archive":
    return deploy.Archive(address, user=USER, password=PASSWORD)


def ct_slices(count: int, **tags) -> list[pydicom.Dataset]:
    """Slices of one series, in an order that is not that of the anatomy; each looks another way."""
    study, series = generate_uid(), generate_uid()
    slices = []
    for number in range(count):
        pixels = np.full((64, 64), -1000 + 100 * number, np.int16)
        pixels[8 : 16 + 4 * number, 16:48] = 60
        ds = data_set(pixels, RescaleSlope=1, RescaleIntercept=0, **PATIENT)
        ds.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
        ds.StudyID, ds.SeriesNumber = "7", 2
        ds.InstanceNumber = count - number
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, 0, 5 * number]
        ds.PixelSpacing = [1, 1]
        for tag, value in tags.items():
            setattr(ds, tag, value)
        slices.append(ds)
    return slices[1:] + slices[:1]


def stored(address: str, slices: list[pydicom.Dataset]) -> tuple[str, str]:
    """Store slices, and give the UIDs of their study and series."""
    for ds in slices:
        archive_at(address).store(ds)
    return str(slices[0].StudyInstanceUID), str(slices[0].SeriesInstanceUID)


@pytest.fixture
def card(tmp_path) -> Path:
    folder = tmp_path / "liver-captions"
    folder.mkdir()
    (folder / "README.md").write_text("# What this model is for")
    return folder


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return end.value.code or 0


def report_in(address: str, study: str) -> pydicom.Dataset:
    """Fetch the only structured report of a study."""
    archive = archive_at(address)
    (series,) = [series for series in archive.series(study) if series.modality == "SR"]
    (report,) = archive._client.iter_series(
        study, series.uid, media_types=(("application/dicom", "*"),)
    )
    return report


def texts_of(report: pydicom.Dataset, name: str) -> list[str]:
    """Give the text of all items that have a name, whatever they stand under."""
    texts = []

    def look(_, element):
        if element.keyword == "ContentSequence":
            for item in element.value:
                if item.ConceptNameCodeSequence[0].CodeMeaning == name and "TextValue" in item:
                    texts.append(item.TextValue)

    report.walk(look)
    return texts


# --- from Orthanc to Orthanc ----------------------------------------------------------------------


@pytest.mark.slow
@needs_orthanc
def test_a_series_goes_from_the_archive_to_a_report_in_the_archive(
    orthanc, tiny_vlm, card, tmp_path, capfd
):
    """With a model that is really served; what it says stands in the report, at its slice."""
    import highdicom as hd
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    slices = ct_slices(5)
    study, series = stored(orthanc, slices)
    fhir = tmp_path / "report.json"
    with deploy.serve(tiny_vlm, port=0) as served:
        options = ["--url", served.address, "--card", card, "--question", QUESTION]
        assert command("pacs", orthanc, study, *options, "--fhir", fhir) == 0
        # the oracle: the same slices, in the order of the anatomy, asked about without an archive
        in_order = sorted(slices, key=lambda ds: ds.ImagePositionPatient[2])
        rows = []
        for number, ds in enumerate(in_order):
            [picture] = read_frames(saved(tmp_path, ds, f"{number}.dcm"))
            rows.append({"id": str(number), "image": picture, "caption": ""})
        server = OpenAIServer.at(served.address)
        expected = generate_answers(server, None, rows, backend="openai", question=QUESTION)
    report = report_in(orthanc, study)
    said_there = texts_of(report, "Finding")
    assert said_there == [answer["answer"] for answer in expected]
    # so that an answer at the wrong slice is seen
    assert len(set(said_there)) > 1

    # highdicom reads it as what it says it is
    read = hd.sr.EnhancedSR.from_dataset(report)
    assert len(read.content) == 1 and read.content[0].ValueType == "CONTAINER"
    images = hd.sr.utils.find_content_items(
        read, value_type=hd.sr.ValueTypeValues.IMAGE, recursive=True
    )
    shown = [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in images]
    assert shown == [ds.SOPInstanceUID for ds in in_order]
    assert any("not for clinical use" in text for text in texts_of(report, "Comment"))
    assert report.SeriesDescription == "Machine-made, not for clinical use"
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert report.CompletionFlag == "COMPLETE"
    settings = texts_of(report, "Algorithm Parameters")
    assert "gate: none, no answer was checked against its picture" in settings
    assert f"model card: {deploy.card_id(card)}" in settings
    # it is filed under the patient, whose name came in another encoding
    assert str(report.PatientName) == str(slices[0].PatientName)
    assert (report.PatientID, report.AccessionNumber) == ("PID-4711-SECRET", "ACC-0815")
    assert report.StudyInstanceUID == study != series

    resource = DiagnosticReport.model_validate_json(fhir.read_text("utf-8"))
    assert resource.status == "preliminary"
    assert "not for clinical use" in resource.conclusion
    assert deploy.card_id(card) in resource.conclusion
    assert resource.identifier[0].value == f"urn:oid:{report.SOPInstanceUID}"
    contained = [item for item in resource.contained if item.get_resource_type() == "Observation"]
    assert [item.valueString for item in contained] == said_there
    printed = "".join(capfd.readouterr())
    for word in TELLING:
        assert word not in fhir.read_text("utf-8") + printed


@needs_orthanc
def test_nothing_of_the_patient_leaves_but_into_the_report(orthanc, card, capfd, caplog):
    """Neither to the model, nor to a log at any level, nor to a folder that stays."""
    slices = ct_slices(4)
    study, series = stored(orthanc, slices)
    caplog.set_level(logging.DEBUG)
    temporary = set(Path("/tmp").glob("medtune-pacs-*"))
    with AnswerServer(lambda number: said() if number else ["m"]) as server:
        options = ["--url", f"{server.url}#m", "--card", card, "--series", series, "--slices", 2]
        assert command("pacs", orthanc, study, *options) == 0
    assert len(server.requests) == 2
    asked = json.dumps(server.requests, ensure_ascii=False)
    printed = "".join(capfd.readouterr())
    for word in (*TELLING, study, series, *[str(ds.SOPInstanceUID) for ds in slices]):
        assert word not in asked and word not in caplog.text
    for word in TELLING:
        assert word not in printed
    assert set(Path("/tmp").glob("medtune-pacs-*")) <= temporary
    report = report_in(orthanc, study)
    assert report.CompletionFlag == "PARTIAL"
    assert "slices asked about: 2 of 4" in texts_of(report, "Algorithm Parameters")
    # in the middle of each half
    remarks = [text for text in texts_of(report, "Comment") if text.startswith("slice")]
    assert remarks == ["slice 2 of 4", "slice 4 of 4"]


@pytest.mark.slow
@needs_orthanc
def test_the_gate_holds_answers_back(orthanc, card, tmp_path, tmp_path_factory):
    base = twins_below(tmp_path_factory)("qwen3-vl")
    _, model = tuned(base)
    model.save_pretrained(tmp_path / "gate")
    with AnswerServer(lambda number: said("A cyst.") if number else ["m"]) as server:
        options = ["--url", f"{server.url}#m", "--card", card]
        options += ["--gate", tmp_path / "gate", "--base", base]
        for threshold in (0, 1):
            study, _ = stored(orthanc, ct_slices(3))
            fhir = tmp_path / f"{threshold}.json"
            words = [*options, "--threshold", threshold, "--fhir", fhir]
            assert command("pacs", orthanc, study, *words) == 0
            report = report_in(orthanc, study)
            said_there = texts_of(report, "Finding")
            settings = texts_of(report, "Algorithm Parameters")
            withheld = 3 if threshold else 0
            line = f"gate: threshold {threshold}, {withheld} of 3 answers withheld"
            assert line in settings
            assert said_there.count("A cyst.") == 3 - withheld
            observations = json.loads(fhir.read_text())["contained"][1:]
            assert sum("dataAbsentReason" in each for each in observations) == withheld
            remarks = " ".join(texts_of(report, "Comment"))
            assert remarks.count("match score 0.") == 3


@needs_orthanc
def test_what_orthanc_takes_only_when_its_tags_are_written_anew(orthanc, monkeypatch):
    """A converter wrote every tag as of an unknown kind (UN): answered 400 as it came."""
    # else pydicom knows better
    monkeypatch.setattr(pydicom.config, "replace_un_with_known_vr", False)
    [ds] = ct_slices(1)
    study = str(ds.StudyInstanceUID)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = str(ds[keyword].value).encode()
        ds[keyword] = DataElement(keyword, "UN", value + b"\0" * (len(value) % 2))
    as_it_came = io.BytesIO()
    ds.save_as(as_it_came, enforce_file_format=True)
    monkeypatch.undo()
    body = b"--x\r\nContent-Type: application/dicom\r\n\r\n" + as_it_came.getvalue() + b"\r\n--x--"
    kind = 'multipart/related; type="application/dicom"; boundary=x'
    answer = requests.post(
        f"{orthanc}/studies",
        data=body,
        headers={"Content-Type": kind},
        auth=(USER, PASSWORD),
        timeout=30,
    )
    assert answer.status_code == 400
    as_it_came.seek(0)
    read = pydicom.dcmread(as_it_came)
    archive = archive_at(orthanc)
    archive.store(read)
    [series] = archive.series(study)
    assert series.instances == 1


@needs_orthanc
def test_every_kind_of_file_comes_back_as_it_is_stored(orthanc, tmp_path):
    """Compressed ones too: asked for uncompressed, Orthanc answers 500 to what it cannot decode."""
    for name in ("J2K_pixelrep_mismatch.dcm", "JPEGLSNearLossless_16.dcm", "MR_small.dcm"):
        ds = pydicom.dcmread(get_testdata_file(name))
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        study, _ = stored(orthanc, [ds])
        archive = archive_at(orthanc)
        [series] = archive.series(study)
        folder = tmp_path / name
        folder.mkdir()
        [file] = archive.fetch(series, folder)
        back = pydicom.dcmread(file)
        assert back.file_meta.TransferSyntaxUID == ds.file_meta.TransferSyntaxUID
        assert back.PixelData == ds.PixelData


@needs_orthanc
def test_real_files_of_many_makers_are_stored_and_come_back(orthanc, real, tmp_path):
    files = sorted((real / "dicom").glob("*.dcm"))
    assert len(files) > 5
    for file in files:
        ds = pydicom.dcmread(file)
        study, uid = stored(orthanc, [ds])
        archive = archive_at(orthanc)
        [series] = [series for series in archive.series(study) if series.uid == uid]
        [slice, *_] = deploy.fetch_series(archive, series).slices
        assert slice.header.SOPInstanceUID == ds.SOPInstanceUID
        assert slice.picture.tobytes() == read_frames(file)[0].tobytes()


@needs_orthanc
def test_frames_of_one_file_are_slices(orthanc, card):
    pixels = np.arange(3 * 32 * 32).reshape(3, 32, 32).astype(np.uint8)
    ds = data_set(pixels)
    kind = MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = kind
    study, _ = stored(orthanc, [ds])
    with AnswerServer(lambda number: said(f"Answer {number}.")) as server:
        model = OpenAIServer(server.url, "m", parallel=1)
        archive = archive_at(orthanc)
        [series] = archive.series(study)
        fetched = deploy.fetch_series(archive, series)
        read = deploy.answer_series(fetched, model, card=deploy.card_id(card))
    assert [answer.slice.frame for answer in read.answers] == [1, 2, 3]
    report = deploy.structured_report(read)
    archive.store(report)
    frames = []

    def look(_, element):
        if element.keyword == "ReferencedFrameNumber":
            frames.append(element.value)

    report_in(orthanc, study).walk(look)
    assert frames == [1, 2, 3]


@needs_orthanc
def test_what_cannot_be_answered_is_said(orthanc, card, capfd):
    studies_before = archive_at(orthanc).studies()
    written_on, _ = stored(orthanc, ct_slices(2, BurnedInAnnotation="YES"))
    plain, series = stored(orthanc, ct_slices(2))
    with AnswerServer(lambda number: said() if number else ["m"]) as server:
        model = ["--url", f"{server.url}#m", "--card", card]
        assert command("pacs", orthanc, plain, *model) == 0
        report = report_in(orthanc, plain)
        asked = len(server.requests)
        cases = [
            ([written_on, *model], "burnt into it"),
            ([plain, *model, "--series", report.SeriesInstanceUID], "holds no pictures"),
            ([plain, *model, "--series", "1.2.3"], "no such series"),
            (["1.2.3", *model], "no such study"),
            (["../studies", *model], "is no UID"),
            ([plain, *model, "--slices", "0"], "--slices 0"),
            ([plain, "--url", server.url], "--card"),
            ([plain, *model, "--fhir", card / "none" / "report.json"], "there is no folder"),
            ([plain, *model, "--threshold", "0.5"], "belong together"),
            ([plain, "--url", server.url, "--card", card / "none"], "README.md"),
        ]
        capfd.readouterr()
        for words, message in cases:
            assert command("pacs", orthanc, *words) == 1
            error = capfd.readouterr().err
            assert message in error and error.count("\n") == 1
        assert len(server.requests) == asked
    assert len(archive_at(orthanc).series(plain)) == 2
    assert len(archive_at(orthanc).studies()) == len(studies_before) + 2
    [ct] = [each for each in archive_at(orthanc).series(plain) if each.uid == series]
    with pytest.raises(OSError, match="gave 2 of 99 files"):
        deploy.fetch_series(archive_at(orthanc), dataclasses.replace(ct, instances=99))


@needs_orthanc
def test_lists_name_nobody_and_a_dry_run_stores_nothing(orthanc, card, capfd):
    study, series = stored(orthanc, ct_slices(2))
    assert command("pacs", orthanc) == 0
    assert command("pacs", orthanc, study) == 0
    printed = capfd.readouterr().out
    assert study in printed and series in printed and not any(word in printed for word in TELLING)
    with AnswerServer(lambda number: said() if number else ["m"]) as server:
        options = ["--url", f"{server.url}#m", "--card", card, "--dry-run"]
        assert command("pacs", orthanc, study, *options) == 0
    assert [each.modality for each in archive_at(orthanc).series(study)] == ["CT"]


@needs_orthanc
def test_who_is_not_let_in_is_told_so(orthanc):
    with pytest.raises(OSError, match="answers 401.*user and a password"):
        deploy.Archive(orthanc, user=USER, password="another").studies()
    with pytest.raises(OSError, match="answers 404"):
        archive_at(orthanc.replace("dicom-web", "nowhere")).studies()


class Slow(http.server.BaseHTTPRequestHandler):
    """Passes on what it is asked, but stops in the middle of a series."""

    def do_GET(self):
        owner = self.server
        headers = {"Accept": self.headers["Accept"]}
        answer = requests.get(
            f"{owner.behind}{self.path}", headers=headers, auth=(USER, PASSWORD), timeout=30
        )
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if "json" in answer.headers["Content-Type"]:
            self.wfile.write(answer.content)
            return
        self.wfile.write(answer.content[: len(answer.content) // 2])
        self.wfile.flush()
        owner.stands_still.set()
        owner.goes_on.wait(60)

    def log_message(self, *args):
        pass


@pytest.mark.slow
@needs_orthanc
def test_a_signal_leaves_no_slice_behind(orthanc, card, tmp_path):
    study, _ = stored(orthanc, ct_slices(2))
    slow = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    slow.daemon_threads = True
    slow.behind = orthanc.removesuffix("/dicom-web")
    slow.stands_still, slow.goes_on = threading.Event(), threading.Event()
    threading.Thread(target=slow.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{slow.server_port}/dicom-web"
    try:
        with AnswerServer(lambda number: said() if number else ["m"]) as server:
            words = ["pacs", address, study, "--url", f"{server.url}#m", "--card", str(card)]
            process = subprocess.Popen(
                [sys.executable, "-c", f"from medtune import cli; cli.main({words!r})"],
                env={**os.environ, "TMPDIR": str(tmp_path)},
            )
            assert slow.stands_still.wait(60)
            assert list(tmp_path.glob("medtune-pacs-*"))
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        slow.goes_on.set()
        slow.shutdown()
        slow.server_close()
    assert not list(tmp_path.glob("medtune-pacs-*"))
    assert [each.modality for each in archive_at(orthanc).series(study)] == ["CT"]


# --- without an archive ---------------------------------------------------------------------------


def test_an_archive_elsewhere_is_asked_over_tls_only():
    for url in ("http://pacs.example/dicom-web", "http://10.0.0.7/dicom-web"):
        with pytest.raises(ValueError, match="give an https address"):
            deploy.Archive(url)
    for url in ("pacs", "ftp://127.0.0.1/x", "http://127.0.0.1:port/x", "http://[::1/x", ""):
        with pytest.raises(ValueError, match="is no address"):
            deploy.Archive(url)
    with pytest.raises(ValueError, match="no user and password") as caught:
        deploy.Archive("https://me:sesame@pacs.example/dicom-web")
    assert "sesame" not in str(caught.value)
    deploy.Archive("https://pacs.example/dicom-web")


def test_an_archive_that_is_down_or_is_none():
    with pytest.raises(OSError, match="does not answer"):
        archive_at(f"http://127.0.0.1:{free_port()}/dicom-web").studies()
    with AnswerServer(lambda number: ["m"]) as server, pytest.raises(OSError, match="no DICOMweb"):
        archive_at(server.url).studies()


def read_by_hand(text: str | None, **tags):
    """What was said of a series of one slice, without an archive."""
    from medtune.deploy.archive import Series
    from medtune.deploy.reading import FetchedSeries, SeriesAnswers, Slice, SliceAnswer

    ds = data_set(np.zeros((4, 4), np.uint8), **tags)
    slice = Slice(1, None, Image.new("RGB", (4, 4)), ds)
    series = Series(str(ds.StudyInstanceUID), "1.2.3", "CT", 1)
    return SeriesAnswers(
        fetched=FetchedSeries(series, 1, (slice,), 3),
        answers=(SliceAnswer(slice, text, None),),
        model="m" * 100,
        card="c",
        question="What?",
        threshold=None,
    )


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("A\x00B\x1b[31m\nC", "AB[31m\nC"),
        ("肝脏正常。", "肝脏正常。"),
        ("a\\b^c=d", "a\\b^c=d"),
        ("  ", "(no answer)"),
    ],
)
def test_any_answer_can_be_written(text, written, tmp_path):
    """Of a file that lacks what the standard asks for, too."""
    read = read_by_hand(text)
    report = deploy.structured_report(read)
    back = pydicom.dcmread(saved(tmp_path, report))
    assert texts_of(back, "Finding") == [written]
    assert any(line.endswith("left out: 3") for line in texts_of(back, "Algorithm Parameters"))
    [observation] = deploy.diagnostic_report(read, report)["contained"][1:]
    assert observation.get("valueString", "(no answer)") == written


def test_a_card_is_known_by_its_content(card):
    first = deploy.card_id(card)
    assert first == deploy.card_id(card / "README.md")
    (card / "README.md").write_text("# Another model")
    assert deploy.card_id(card) != first and first.startswith("liver-captions/README.md sha256:")


def test_pictures_are_bare():
    """What the model is sent has no comment of a file in it: the oracle is Pillow."""
    [picture] = read_frames(get_testdata_file("CT_small.dcm"))
    assert isinstance(picture, Image.Image) and not picture.info
