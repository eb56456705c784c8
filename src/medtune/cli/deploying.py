"""Subcommands on models that leave the notebook: export, serve, pacs."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from medtune.files import write_json

from .app import app
from .options import Root, TlsCert, TlsKey, Window, read_window
from .printing import print_table


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a merged model, as 06 saves it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type", help="f32, f16, bf16 or q8_0; may be repeated. By default f16 and q8_0."
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What the model was asked in training.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Converted folder: its test split is asked, to prove the export."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="With --data: the base, to find the training again in the files."),
    ] = None,
    samples: Annotated[int, typer.Option(help="With --data: how many are asked.")] = 20,
) -> None:
    """Write a merged model as GGUF files for llama.cpp; with --data, prove that they say the same."""
    from medtune import deploy

    exported = deploy.export_gguf(model, out, tuple(types or ("f16", "q8_0")), question=question)
    for file in sorted(exported.folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:10.1f} MB  {file.name}")
    if data is None:
        print("not proven: give --data FOLDER to compare it with Transformers")
        return
    from medtune.records import read_records

    proof = deploy.check_export(
        exported, model, read_records(data, "test"), samples=samples, base=base
    )
    rows = []
    for name, result in proof["types"].items():
        rows.append(
            {
                "type": name,
                "proven": "yes" if result["proven"] else "NO",
                "same answers": f"{result['same_answers']} of {result['samples']}",
                "same prompts": f"{result['same_prompts']} of {result['samples']}",
                "largest difference": result["largest_difference"],
                "why not": "; ".join(result["why_not"]) or None,
            }
        )
    print_table(rows)
    if not all(result["proven"] for result in proof["types"].values()):
        raise ValueError(f"{out} is not proven: the table says why")


@app.command()
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A run, whose export is served, or its merged model where it has none; folder of "
            "an export or one of its GGUF files; or the folder of a merged model or an adapter, "
            "which Transformers then answers."
        ),
    ],
    type: Annotated[
        str | None, typer.Option(help="Of an export, such as q8_0; by default the first.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of an adapter that does not name it.")
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to serve at; one that others reach needs --tls-cert, --tls-key, and "
            "MEDTUNE_SERVE_PASSWORD in the environment."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 for any that is free.")] = 8000,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    threads: Annotated[
        int | None, typer.Option(help="Of llama.cpp; by default all that this process may use.")
    ] = None,
    parallel: Annotated[
        int, typer.Option(help="Conversations that llama.cpp answers at the same time.")
    ] = 1,
    max_pictures: Annotated[int, typer.Option(help="Most pictures of a request.")] = 8,
    max_mb: Annotated[int, typer.Option(help="Most megabytes of a request.")] = 64,
    root: Root = None,
) -> None:
    """Serve a model at an address that speaks OpenAI's API, until Ctrl-C."""
    from medtune import deploy

    served = deploy.serve(
        _model_of(model, root),
        type=type,
        base=base,
        host=host,
        port=port,
        # not an option: other users of the machine see a command line
        password=os.environ.get("MEDTUNE_SERVE_PASSWORD") or None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        threads=threads,
        parallel=parallel,
        limits=deploy.Limits(bytes=max_mb * 1_000_000, pictures=max_pictures),
    )
    if served.warning:
        print(f"medtune: warning: {served.warning}", file=sys.stderr)
    print(f"medtune serve: {served.model} at {served.address} (Ctrl+C stops it)", flush=True)
    served.wait()


@app.command()
def pacs(
    archive: Annotated[
        str,
        typer.Argument(
            help="DICOMweb address of the archive, such as http://127.0.0.1:8042/dicom-web. "
            "MEDTUNE_PACS_USER and MEDTUNE_PACS_PASSWORD in the environment, where it wants them."
        ),
    ],
    study: Annotated[
        str | None, typer.Argument(help="UID of a study; without one, studies are listed.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Where the model is served, such as http://127.0.0.1:8000/v1; without it, the "
            "series of the study are listed. MEDTUNE_SERVE_PASSWORD as with serve."
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="The model's README.md, or its folder; the report says which it was."),
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="UID of the series, where the study has several.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What each slice is asked: that of the training.")
    ] = None,
    slices: Annotated[
        int | None, typer.Option(help="Ask about so many, evenly spread; by default about all.")
    ] = None,
    window: Window = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="Model of notebook 07 that holds back what does not match its picture."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="With --gate: its base model.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="With --gate: least match score, as 07 prints it.")
    ] = None,
    fhir: Annotated[
        Path | None, typer.Option(help="Also write a FHIR DiagnosticReport to this file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask, but store no report in the archive.")
    ] = False,
    allow_remote: Annotated[
        bool,
        typer.Option("--allow-remote", help="Send the slices to a model on another machine."),
    ] = False,
) -> None:
    """Have a served model answer a series of a PACS, and file a report: not for clinical use."""
    from medtune import deploy

    place = deploy.Archive(
        archive,
        # not options: other users of the machine see a command line
        user=os.environ.get("MEDTUNE_PACS_USER") or None,
        password=os.environ.get("MEDTUNE_PACS_PASSWORD"),
    )
    if study is None:
        studies = place.studies()
        print_table(studies)
        return
    found = place.series(study)
    if url is None:
        print_table(
            [{"series": s.uid, "modality": s.modality, "files": s.instances} for s in found]
        )
        return
    if card is None:
        raise ValueError("the report has to name the model's card: give --card FOLDER")
    card_id = deploy.card_id(card)
    _check_gate(gate, base, threshold)
    if fhir is not None and not fhir.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {fhir.parent} to write {fhir.name} in")
    from medtune.answers import OpenAIServer

    server = OpenAIServer.at(
        url,
        api_key=os.environ.get("MEDTUNE_SERVE_PASSWORD") or "none",
        allow_remote=allow_remote,
    )
    loaded = deploy.Gate.load(gate, base, threshold) if gate else None
    chosen = _choose_series(found, series)
    with _ending_cleanly():
        fetched = deploy.fetch_series(place, chosen, slices=slices, window=read_window(window))
    read = deploy.answer_series(fetched, server, card=card_id, question=question, gate=loaded)
    report = deploy.structured_report(read)
    # first the file: what is stored in an archive cannot be taken back
    if fhir is not None:
        write_json(fhir, deploy.diagnostic_report(read, report))
    for line in (f"model: {read.model}", *read.settings()):
        print(line)
    if dry_run:
        print("no report was stored (--dry-run)")
        return
    place.store(report)
    print(f"stored: structured report, series {report.SeriesInstanceUID}, not for clinical use")


@contextlib.contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Leave by SystemExit at a signal, so that the slices which were fetched are deleted."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_gate(gate: Path | None, base: str | None, threshold: float | None) -> None:
    """Check that the options of the gate are given together."""
    given = [option is not None for option in (gate, base, threshold)]
    if any(given) and not all(given):
        raise ValueError("--gate FOLDER, --base BASE and --threshold T belong together")


def _choose_series(found: list, uid: str | None) -> Any:
    """Choose a series of a study: the one that is named, or the only one that is no report."""
    if uid is not None:
        found = [series for series in found if series.uid == uid]
        if not found:
            raise ValueError(f"series={uid}: the study has no such series")
        return found[0]
    pictures = [series for series in found if series.modality not in ("SR", "KO", "PR", "SEG")]
    if len(pictures) != 1:
        raise ValueError(
            f"the study has {len(pictures)} series of pictures: give series=UID (without --url "
            "they are listed)"
        )
    return pictures[0]


def _model_of(name: str, root: Path | None) -> str:
    """Find what to serve where the name is that of a run."""
    from medtune.runs import find_root

    if "/" in name or Path(name).exists():
        return name
    run = Path(find_root(root)) / "papermill_runs" / name
    if not run.is_dir():
        return name
    exported = run / "out" / "14_out_of_the_notebook" / "gguf"
    merged = run / "out" / "06_merge_export" / "merged"
    for folder in (exported, merged):
        if folder.is_dir():
            return str(folder)
    raise FileNotFoundError(
        f"the run {name} has neither an export (notebook 14) nor a merged model (06): run it first"
    )
