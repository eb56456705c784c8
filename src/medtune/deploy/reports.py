"""What a model said of a series, as a DICOM structured report and as a FHIR DiagnosticReport.

The structured report goes back to the archive that the series came from, and so is filed under the
same patient. The DiagnosticReport is a file that may lie anywhere, and so names no patient: it
refers to the study by its UID.
"""

import json
from datetime import UTC, datetime
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

try:
    import highdicom as hd
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport
except ImportError:
    raise ImportError("a report needs its extra: pip install 'medtune[pacs]'") from None

from medtune import __version__

from .archive import quiet_libraries
from .reading import WARNING, SeriesAnswers

# In the archive's list of series this is all that one sees.
_DESCRIPTION = "Machine-made, not for clinical use"
_TITLE = Code("18748-4", "LN", "Diagnostic imaging report")
# Scanners number from 1; this comes last in the list.
_SERIES_NUMBER = 9001
# The standard lets these be empty but not absent; files of the wild lack them.
_MAY_BE_EMPTY = (
    "AccessionNumber", "PatientBirthDate", "PatientID", "PatientName", "PatientSex",
    "ReferringPhysicianName", "StudyDate", "StudyID", "StudyTime",
)  # fmt: skip
_NAMES = ("PatientName", "ReferringPhysicianName")


def structured_report(read: SeriesAnswers) -> Dataset:
    """Write answers as a DICOM structured report (Enhanced SR), preliminary and unverified.

    Parameters
    ----------
    read : what `answer_series` gives.

    Returns
    -------
    pydicom.dataset.Dataset : to be stored in the archive; it has the patient of the series.

    Examples
    --------
    >>> report = structured_report(read)  # doctest: +SKIP
    >>> report.VerificationFlag, report.PreliminaryFlag  # doctest: +SKIP
    ('UNVERIFIED', 'PRELIMINARY')
    """
    with quiet_libraries():
        return hd.sr.EnhancedSR(
            evidence=_evidence(read),
            content=_tree(read),
            series_instance_uid=hd.UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medtune",
            manufacturer_model_name=_short(read.model),
            software_versions=__version__,
            device_serial_number="none",
            series_description=_DESCRIPTION,
            # of PRODUCT, RESEARCH and SERVICE
            content_qualification="RESEARCH",
            is_complete=len(read.answers) == read.fetched.count,
            is_final=False,
            is_verified=False,
            # answers may be in any language, whatever the series is written in
            specific_character_set="ISO_IR 192",
        )


def diagnostic_report(read: SeriesAnswers, report: Dataset) -> dict[str, Any]:
    """Write answers as a FHIR DiagnosticReport (R4B), preliminary, which names no patient.

    Parameters
    ----------
    read : what `answer_series` gives.
    report : what `structured_report` makes of it; its UID is the report's identifier.

    Returns
    -------
    dict : the resource, checked, ready to be written as JSON.

    Examples
    --------
    >>> resource = diagnostic_report(read, report)  # doctest: +SKIP
    >>> resource["status"]  # doctest: +SKIP
    'preliminary'
    """
    study = {"type": "ImagingStudy", "identifier": _identifier(read.fetched.series.study)}
    device = {
        "resourceType": "Device",
        "id": "model",
        "deviceName": [{"name": read.model, "type": "model-name"}],
        "version": [{"value": read.card}],
        "note": [{"text": line} for line in read.settings()],
    }
    observations = []
    for answer in read.answers:
        where = f"{read.remark(answer)}, instance {answer.slice.header.SOPInstanceUID}"
        if answer.slice.frame is not None:
            where += f", frame {answer.slice.frame}"
        observation = {
            "resourceType": "Observation",
            "id": f"slice-{answer.slice.number}",
            "status": "preliminary",
            "code": _coded("http://dicom.nema.org/resources/ontology/DCM", codes.DCM.Finding),
            "device": {"reference": "#model"},
            "derivedFrom": [study],
            "note": [{"text": where}, {"text": WARNING}],
        }
        said = _printable(answer.text)
        if said:
            observation["valueString"] = said
        else:
            reason = "no answer" if answer.text is not None else "withheld by the gate"
            observation["dataAbsentReason"] = {"text": reason}
        observations.append(observation)
    resource = {
        "resourceType": "DiagnosticReport",
        "meta": {
            "security": [
                {
                    "system": "http://terminology.hl7.org/CodeSystem/v3-ObservationValue",
                    "code": "AIAST",
                    "display": "Artificial Intelligence asserted",
                }
            ]
        },
        "identifier": [_identifier(str(report.SOPInstanceUID))],
        "status": "preliminary",
        "code": _coded("http://loinc.org", _TITLE),
        "imagingStudy": [study],
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "conclusion": " ".join([WARNING, *(f"{line}." for line in read.settings())]),
        "contained": [device, *observations],
        "result": [{"reference": f"#{each['id']}"} for each in observations],
    }
    return json.loads(DiagnosticReport.model_validate(resource).model_dump_json())


def _tree(read: SeriesAnswers) -> hd.sr.ContainerContentItem:
    """Write the content of the report: who observed, how, the warning, and one finding a slice."""
    relations = hd.sr.RelationshipTypeValues
    root = hd.sr.ContainerContentItem(_TITLE)
    root.ContentSequence = hd.sr.ContentSequence()
    root.ContentSequence.extend(_observer(read))
    root.ContentSequence.extend(
        hd.sr.AlgorithmIdentification(read.model, read.card, read.settings())
    )
    root.ContentSequence.append(
        hd.sr.TextContentItem(codes.DCM.Comment, WARNING, relations.CONTAINS)
    )
    findings = hd.sr.ContainerContentItem(codes.DCM.Findings, relationship_type=relations.CONTAINS)
    findings.ContentSequence = hd.sr.ContentSequence()
    for answer in read.answers:
        said = _printable(answer.text) or "(no answer)"
        if answer.text is None:
            said = "Withheld by the gate: the answer may not match its picture."
        finding = hd.sr.TextContentItem(codes.DCM.Finding, said, relations.CONTAINS)
        remark = hd.sr.TextContentItem(
            codes.DCM.Comment, read.remark(answer), relations.HAS_PROPERTIES
        )
        image = hd.sr.ImageContentItem(
            codes.DCM.SourceImage,
            answer.slice.header.SOPClassUID,
            answer.slice.header.SOPInstanceUID,
            referenced_frame_numbers=answer.slice.frame,
            relationship_type=relations.INFERRED_FROM,
        )
        finding.ContentSequence = hd.sr.ContentSequence([remark, image])
        findings.ContentSequence.append(finding)
    root.ContentSequence.append(findings)
    return root


def _observer(read: SeriesAnswers) -> hd.sr.ObservationContext:
    """Say that a machine observed, and which."""
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        # the same model has the same UID in every report
        uid=generate_uid(entropy_srcs=[read.model, read.card]),
        name=read.model,
        manufacturer_name="medtune",
        model_name=read.model,
    )
    context = hd.sr.ObserverContext(codes.DCM.Device, device)
    return hd.sr.ObservationContext(observer_device_context=context)


def _evidence(read: SeriesAnswers) -> list[Dataset]:
    """List the headers of the files that were asked about, each once."""
    headers = {}
    for slice in read.fetched.slices:
        if slice.header.SOPInstanceUID not in headers:
            headers[slice.header.SOPInstanceUID] = _with_all_tags(slice.header)
    return list(headers.values())


def _with_all_tags(header: Dataset) -> Dataset:
    """Give a copy of a header that has every tag which a report takes over."""
    copy = Dataset()
    copy.update(header)
    for tag in _MAY_BE_EMPTY:
        if tag not in copy:
            setattr(copy, tag, "")
    for tag in _NAMES:
        # as text: a name remembers the encoding that it came in
        setattr(copy, tag, str(copy[tag].value or ""))
    return copy


def _printable(text: str | None) -> str:
    """Take out of an answer what neither DICOM's text nor FHIR's string may hold."""
    kept = [sign for sign in text or "" if sign in "\n\t" or sign.isprintable()]
    return "".join(kept).strip()


def _short(name: str) -> str:
    """Cut a name to the 64 signs of a DICOM long string, which has no backslash."""
    return _printable(name).replace("\\", "/")[:64]


def _identifier(uid: str) -> dict[str, str]:
    return {"system": "urn:dicom:uid", "value": f"urn:oid:{uid}"}


def _coded(system: str, code: Code) -> dict[str, Any]:
    return {"coding": [{"system": system, "code": code.value, "display": code.meaning}]}
