"""Subcommands on models that leave the notebook: export, serve."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Root, TlsCert, TlsKey
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
