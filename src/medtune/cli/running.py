"""Subcommands: versions, runs, plans, training, and the chat page."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from medtune import __version__

from .app import app
from .options import Root, Run, TlsCert, TlsKey
from .printing import print_table

# What the numbers of a plan count; all others are GB (10^9 bytes) on each GPU.
PLAN_UNITS = {
    "batch_size": "samples on each GPU",
    "checkpointing": "",
    "zero_stage": "",
    "download": "GB",
    "disk": "GB",
    "fits": "",
    "tokens": "in a sample",
    "image_tokens": "of these",
    "trained_parameters": "weights",
    "hours_per_epoch": "hours",
}


@app.command()
def version() -> None:
    """Print the versions that matter in a bug report."""
    rows = [
        {"package": "medtune", "version": __version__},
        {"package": "python", "version": platform.python_version()},
    ]
    for package in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "deepspeed",
        "papermill",
    ):
        rows.append({"package": package, "version": metadata.version(package)})
    print_table(rows)


# ---- runs


@app.command()
def run(
    name: Run,
    root: Root = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="[NOTEBOOK.]KEY=VALUE, another value of a parameter; may be repeated.",
        ),
    ] = None,
    new_name: Annotated[
        str | None, typer.Option("--name", help="Name of the new run that --set makes.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Last notebook to execute, such as 06; the next start goes on from it."),
    ] = None,
) -> None:
    """Execute the notebooks of a run.

    A second start continues, and a change starts again where it matters. It computes with as many
    threads as cores are free; OMP_NUM_THREADS in the environment says another number.
    """
    from medtune import runs

    overrides = {}
    for change in changes or []:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, not {change!r}")
        overrides[key] = value
    clone = runs.find_root(root)
    if root is None and clone not in (Path.cwd(), *Path.cwd().parents):
        print(f"the run is in {clone}, the clone that medtune was installed from", file=sys.stderr)
    try:
        summary = runs.run(name, overrides=overrides, new_name=new_name, until=until, root=root)
    except KeyboardInterrupt:
        advice = f"'medtune run {new_name or name}' continues"
        print(f"\nmedtune: stopped; {advice}", file=sys.stderr)
        # what a shell gives a command that Ctrl-C ended
        raise typer.Exit(130) from None
    minutes = summary["timing"]
    rows = []
    for notebook, of_notebook in summary["notebooks"].items():
        results = runs.results_of(of_notebook)
        rows.append({"notebook": notebook, "minutes": minutes[notebook], "results": results})
    print_table(rows)
    where = f"papermill_runs/{summary['run']}/out/"
    print(f"{sum(minutes.values()):.1f} minutes. Executed notebooks and results: {where}")


@app.command("list")
def list_runs(
    study: Annotated[
        str,
        typer.Argument(help="List the runs of this study; without it, those in papermill_runs/."),
    ] = "",
    root: Root = None,
) -> None:
    """List the runs: what is finished, the minutes, and what went wrong."""
    from medtune import runs

    print_table(runs.list_runs(root, study=study))


@app.command()
def params(name: Run, root: Root = None) -> None:
    """Show every parameter of a run, its value, type and meaning.

    Change one with 'medtune run --set'.
    """
    from medtune import runs

    root = runs.find_root(root)
    for notebook, values in runs.read_params(name, root=root).items():
        declared = runs.declared_parameters(root / "notebooks" / f"{notebook}.ipynb")
        rows = []
        for key, value in values.items():
            parameter = declared[key]
            rows.append(
                {
                    "key": key,
                    "value": repr(value),
                    "type": parameter.annotation,
                    "meaning": parameter.help,
                }
            )
        print(f"\n{notebook}")
        print_table(rows)


@app.command()
def reference(
    name: Run,
    own_data: Annotated[
        bool,
        typer.Option(
            "--own-data",
            help="Also of a run on data of your own, whose captions and ids it then shows.",
        ),
    ] = False,
    pictures: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="Only put the figures of another run, on pictures that anybody may see, into the "
            "copy that stands: 'phantom' is on a drawn body.",
        ),
    ] = "",
    root: Root = None,
) -> None:
    """Keep a small executed copy of a finished run in papermill_runs/reference/."""
    from medtune import runs

    if not pictures:
        print(runs.write_reference(name, root=root, own_data=own_data))
        return
    lent = runs.lend_pictures(name, pictures, root=root)
    print("\n".join(lent) or f"none of the figures that are missing in {name} are in {pictures}")


@app.command()
def clean(
    name: Run,
    keep_model: Annotated[
        bool, typer.Option("--keep-model", help="Keep the trained adapter and the merged model.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be removed.")
    ] = False,
    root: Root = None,
) -> None:
    """Remove what a run left: pictures, records, answers, checkpoints, caches; params.yaml stays."""
    from medtune import runs

    print_table(runs.clean(name, root=root, keep_model=keep_model, dry_run=dry_run))


@app.command("study")
def run_study(
    file: Annotated[
        Path, typer.Argument(help="YAML with base, factors, and perhaps fixed, search, prune.")
    ],
    processes: Annotated[
        int | None, typer.Option(help="Execute so many runs at a time; by default as many as fit.")
    ] = None,
    root: Root = None,
) -> None:
    """Run an experiment: every combination of some parameters' levels.

    A second start continues.
    """
    from medtune.runs import study

    table = study.run_study(file, processes=processes, root=root)
    states = table["state"].value_counts().to_dict()
    print(f"papermill_runs/{file.stem}/out/results.parquet: {states}")
    failed = int((table["state"] == "FAIL").sum())
    if failed:
        advice = f"'medtune list {file.stem}' says why; start again to try them again"
        raise ValueError(f"{failed} runs failed: {advice}")


# ---- before anything is rented


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hub name of a published model, such as Qwen/Qwen3-VL-2B-Instruct; left out, all "
            "that are known are listed with the smallest card that each can be trained on."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="lora, qlora (the weights in 4 bits), or full (all weights trained)."),
    ] = "lora",
    target: Annotated[
        str,
        typer.Option(
            help="Which layers get an adapter, as in notebook 03, such as language, attention "
            "or all-linear."
        ),
    ] = "language",
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option(
            help="Module trained whole beside the adapters, such as lm_head; may be repeated."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples of each GPU in one forward pass; left out, the largest that fits is "
            "recommended, with checkpointing and the ZeRO stage to go with it.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            help="Activations are recomputed in the backward pass, to save memory; counts with "
            "--batch-size only."
        ),
    ] = True,
    zero_stage: Annotated[
        int,
        typer.Option(
            min=0,
            max=3,
            help="What DeepSpeed splits over the GPUs: 0 nothing, 1 optimizer states, 2 "
            "gradients too, 3 weights too; counts with --batch-size only.",
        ),
    ] = 0,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu_gb: Annotated[
        float, typer.Option(min=1, help="Memory of each GPU in GB (10^9 bytes).")
    ] = 80.0,
    image_size: Annotated[
        int, typer.Option(min=1, help="Side of the square picture in a sample, in pixels.")
    ] = 512,
    pictures_per_sample: Annotated[
        int, typer.Option(min=1, help="Pictures in a sample, such as the slices of a slab.")
    ] = 1,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a sample besides those of the pictures.")
    ] = 150,
    accumulation: Annotated[
        bool,
        typer.Option(
            help="Several batches make a step, so the gradients of one are there while the next "
            "is computed."
        ),
    ] = False,
    pairs: Annotated[
        int,
        typer.Option(help="Samples of an epoch, to tell its hours; needs --samples-per-second."),
    ] = 0,
    samples_per_second: Annotated[
        float, typer.Option(help="Speed of all GPUs together, to tell the hours of an epoch.")
    ] = 0.0,
) -> None:
    """Say what training a model takes: GB on each GPU by part, disk, and hours.

    The documentation of medtune.plan.estimate explains each line.
    """
    from medtune.plan import estimate, recommend

    if model is None:
        usual = (
            ("method", method, "lora"),
            ("target", target, "language"),
            ("modules_to_save", modules_to_save, None),
            ("batch_size", batch_size, None),
            ("zero_stage", zero_stage, 0),
            ("gpus", gpus, 1),
            ("gpu_gb", gpu_gb, 80.0),
            ("pairs", pairs, 0),
        )
        for name, value, default in usual:
            if value != default:
                raise ValueError(f"{name}={value} counts with a model only: name one before it")
        _print_models(
            lora_r=lora_r,
            image_size=image_size,
            pictures_per_sample=pictures_per_sample,
            text_tokens=text_tokens,
            accumulation=accumulation,
        )
        return
    options = {
        "method": method,
        "target": target,
        "lora_r": lora_r,
        "modules_to_save": tuple(modules_to_save or ()),
        "gpus": gpus,
        "gpu_gb": gpu_gb,
        "image_size": image_size,
        "pictures_per_sample": pictures_per_sample,
        "text_tokens": text_tokens,
        "accumulation": accumulation,
        "pairs": pairs,
        "samples_per_second": samples_per_second,
    }
    if batch_size:
        options["checkpointing"] = checkpointing
        options["zero_stage"] = zero_stage
        found = estimate(model, batch_size=batch_size, **options)
    else:
        found = recommend(model, **options)
    rows = []
    for key, value in found.items():
        rows.append({"what": key, "value": value, "unit": PLAN_UNITS.get(key, "GB on each GPU")})
    print_table(rows)
    missing = []
    if not pairs:
        missing.append("--pairs")
    if not samples_per_second:
        missing.append("--samples-per-second")
    if missing:
        print(f"hours_per_epoch needs {' and '.join(missing)}")


def _print_models(**options: Any) -> None:
    """List all models whose shape is known, with the smallest card for LoRA and for QLoRA."""
    from medtune.plan import model_facts, model_names, smallest_card

    rows = []
    for name in model_names():
        facts = model_facts(name)
        row = {"model": name, "billion": f"{facts['parameters'] / 1e9:.1f}"}
        for method in ("lora", "qlora"):
            card = smallest_card(name, method=method, **options)
            row[f"{method}_card_gb"] = card or "more"
        row["licence"] = facts["licence"]
        rows.append(row)
    print_table(rows)
    print(
        "The smallest card that is sold for one sample at a time, checkpointed; "
        "medtune plan MODEL says what takes how much."
    )


@app.command()
def card(
    name: Run,
    out: Annotated[
        Path | None,
        typer.Option(help="The Markdown file to write; by default it is printed."),
    ] = None,
    root: Root = None,
) -> None:
    """Write a run's card: the fields of CLAIM and TRIPOD-LLM, filled from its results.

    What only you know stands in papermill_runs/RUN/card.yaml, a line for each field; what nobody
    said is shown as empty.
    """
    from medtune.files import write_whole
    from medtune.runs import write_card

    text = write_card(name, root=root)
    if out is None:
        print(text, end="")
        return
    write_whole(out, text)
    print(f"card: {out}", file=sys.stderr)


@app.command()
def rehearse(
    name: Run,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each training.")] = 2,
    root: Root = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="full, the shape of the model, or tiny; by default full where there is a GPU."
        ),
    ] = None,
) -> None:
    """Run a run's notebooks offline for a few steps, on random weights of the model's shape."""
    from medtune.runs.rehearse import rehearse as start

    minutes = start(name, steps=steps, scale=scale, root=root)["timing"]
    rows = [{"notebook": notebook, "minutes": value} for notebook, value in minutes.items()]
    print_table(rows)
    where = f"papermill_runs/{name}-rehearsal/out/"
    print(f"Random weights: no score means anything. Results: {where}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="A YAML of TRL's keys; see docs/launch.md.")],
) -> None:
    """Fine-tune as a YAML says, in one process; options override it.

    For several processes: torchrun -m medtune.training --config train.yaml
    """
    from medtune.training.launch import main as start

    start(["--config", str(config), *context.args])


@app.command()
def chat(
    base: Annotated[str, typer.Argument(help="Base model: folder or hub name.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter on the base.")] = None,
    tuned: Annotated[
        str | None, typer.Option(help="Folder of a merged model, instead of an adapter.")
    ] = None,
    multitask: Annotated[
        str | None,
        typer.Option(help="Folder of a multi-task model, which adds a box and a match score."),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Most pixels of a picture after resizing.")
    ] = None,
    threshold: Annotated[
        Path | None,
        typer.Option(
            help="The threshold.json of notebook 13: of less sure answers of the adapter the page "
            "says that it would not give them. By default that of the adapter's own run, if it has one."
        ),
    ] = None,
    series: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a DICOM series, or a NIfTI file, that the page opens with: ask about "
            "one slice of it, or about several around it."
        ),
    ] = None,
    feedback: Annotated[
        Path, typer.Option(help="Folder where thumbs and corrections are saved.")
    ] = Path("chat_feedback"),
    host: Annotated[
        str,
        typer.Option(
            help="Address to serve at; one that others reach needs --tls-cert, --tls-key, and "
            "MEDTUNE_CHAT_PASSWORD in the environment."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port to serve at; by default the first free one from 7860.")
    ] = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Serve a page that asks base and tuned model about your pictures, side by side."""
    from medtune.chat import find_threshold, launch, load_models, read_threshold

    if threshold is not None and adapter is None:
        raise ValueError("--threshold is that of an adapter: give --adapter FOLDER as well")
    if threshold is None and adapter is not None:
        threshold = find_threshold(adapter)
    least = None if threshold is None else read_threshold(threshold)
    models = load_models(
        base, adapter, tuned=tuned, heads=multitask, max_pixels=max_pixels, least=least
    )
    # not an option: other users of the machine see a command line
    password = os.environ.get("MEDTUNE_CHAT_PASSWORD")
    page = launch(
        models,
        feedback=feedback,
        series=series,
        host=host,
        port=port,
        password=password,
        tls_cert=tls_cert,
        tls_key=tls_key,
    )
    # until Ctrl-C: the page is served by a thread of its own
    page.block_thread()
