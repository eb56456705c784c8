"""Subcommands on data: sample, convert, check, audit."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .options import (
    AcceptUnknownGroups,
    AllowEmptyCaptions,
    Asked,
    Captions,
    Column,
    Config,
    Encoding,
    ImageRoot,
    Limit,
    Ray,
    Root,
    SlabMm,
    SlabPictures,
    Source,
    Split,
    SplitBy,
    Window,
    read_columns,
)
from .printing import print_json, print_table

# So many pictures are named one by one.
MOST_NAMED = 30


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sample(context: typer.Context, root: Root = None) -> None:
    """Build the sample set in data/sample/; options go to data/build_sample.py."""
    from medtune import runs

    script = runs.find_root(root) / "data" / "build_sample.py"
    done = subprocess.run([sys.executable, script, *context.args])
    raise typer.Exit(done.returncode)


@app.command()
def convert(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: pictures, one JSONL a split, dataset_info.json."),
    ],
    column: Column = None,
    captions: Captions = None,
    image_root: ImageRoot = None,
    allow_empty_captions: AllowEmptyCaptions = False,
    encoding: Encoding = None,
    window: Window = None,
    slab: SlabPictures = None,
    slab_mm: SlabMm = None,
    split_by: SplitBy = None,
    splits: Annotated[
        Path | None,
        typer.Option(help="CSV with id, split and group, as 'medtune audit --write' writes it."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="A further column of the source that goes into the records; may be repeated. "
            "All others stay behind."
        ),
    ] = None,
    dialect: Annotated[
        str,
        typer.Option(
            help="prompt-completion (TRL), messages, sharegpt, or conversations (user and "
            "assistant under ShareGPT's keys)."
        ),
    ] = "prompt-completion",
    question: Annotated[
        list[str] | None,
        typer.Option(
            help="The question put to each picture, in place of the data's own; of several, which "
            "may be given by repeating the option, one is drawn by the pair's id."
        ),
    ] = None,
    language: Annotated[str, typer.Option(help="Language of the captions: en or zh.")] = "en",
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    system_prompt: Annotated[
        str | None, typer.Option(help="A text put before every dialogue.")
    ] = None,
    text_only: Annotated[
        Path | None, typer.Option(help="JSONL of dialogues without pictures to mix in.")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Share of text-only dialogues among the training records.")
    ] = 0.1,
    pictures_per_sample: Annotated[
        int,
        typer.Option(
            help="So many neighbouring pictures of a group in one question: slices of a series, "
            "views of one report."
        ),
    ] = 1,
    magnify: Annotated[
        bool,
        typer.Option(
            "--magnify",
            help="Show the region of interest (the column roi) once more, enlarged, as a second "
            "picture: small findings are lost in a whole one.",
        ),
    ] = False,
    accept_unknown_groups: AcceptUnknownGroups = False,
    jpeg_quality: Annotated[
        int | None, typer.Option(help="Save pictures that need converting as JPEG of this quality.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of threads; the result does not depend on it.")
    ] = None,
    most_rejected: Annotated[
        float,
        typer.Option(
            help="Fail, with exit code 1, if a larger share of the rows than this is rejected; "
            "the rest is written nevertheless."
        ),
    ] = 0.1,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad pair.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a conversion with other settings.")
    ] = False,
    config: Config = None,
    split: Split = None,
    limit: Limit = None,
    ray: Ray = None,
) -> None:
    """Write pairs as pictures and training records."""
    from medtune.records import convert_pairs

    if not 0 <= most_rejected <= 1:
        raise ValueError(f"--most-rejected is a share from 0 to 1, not {most_rejected}")
    asked = Asked(
        column=column or [],
        captions=captions,
        image_root=image_root,
        allow_empty_captions=allow_empty_captions,
        encoding=encoding,
        window=window,
        slab=slab,
        slab_mm=slab_mm,
        config=config,
        split=split,
        limit=limit,
    )
    # a source of which nothing is said is read from where it lies, with flat memory
    pairs = source if asked.is_plain() else asked.load(source)
    # a cluster reads shards from where they lie; that patients are unknown is noticed there
    if split_by == "patient" and splits is None and ray is None:
        pairs = _with_groups(pairs, asked, source, accept_unknown_groups)
    report = convert_pairs(
        pairs,
        out,
        dialect=dialect,
        questions=question,
        language=language,
        seed=seed,
        system_prompt=system_prompt,
        text_only=text_only,
        share=share,
        pictures_per_sample=pictures_per_sample,
        magnify=magnify,
        jpeg_quality=jpeg_quality,
        workers=workers,
        strict=strict,
        overwrite=overwrite,
        splits=splits,
        split_by=split_by,
        keep=keep or (),
        ray=ray,
    )
    print_json(report)
    _warn_of_unknown_groups(report, split_by)
    _warn_of_repeated_ids(source, column)
    _complain_of_rejected(report, source, out, most_rejected)


def _with_groups(pairs: Any, asked: Asked, source: str, accepted: bool) -> Any:
    """Give a source that names no patient guessed groups, if the user accepts them.

    Raises
    ------
    ValueError : the user does not.
    """
    from medtune.audit import count_unknown_groups, fingerprint, group_clues, guess_groups

    loaded = asked.load(source) if isinstance(pairs, str) else pairs
    if count_unknown_groups(loaded) < len(loaded):
        return pairs
    _refuse_unknown_groups(len(loaded), len(loaded), accepted)
    clues = group_clues(loaded, fingerprints=fingerprint(loaded))
    alike = [pair for found in clues.values() for pair in found]
    if "group" in loaded.column_names:
        loaded = loaded.remove_columns("group")
    return loaded.add_column("group", guess_groups(len(loaded), alike))


def _refuse_unknown_groups(unknown: int, rows: int, accepted: bool) -> None:
    """Raise ValueError where a split would be made without knowing patients, unless it is accepted."""
    if not accepted:
        raise ValueError(
            f"{unknown} of {rows} pairs name no patient, so that a split can only be guessed from "
            "look-alikes, and pictures of one patient may stand on both sides: name the column, "
            "--column group=NAME, or accept the guess with --accept-unknown-groups"
        )


def _warn_of_unknown_groups(report: dict[str, Any], split_by: str | None) -> None:
    """Say on stderr how many pairs name no patient, and what that means for this split."""
    unknown = report["unknown_groups"]
    written = [split for split, count in report["records"].items() if count]
    if not unknown or not written or split_by == "none":
        return
    count = f"medtune: warning: {unknown} of {report['rows']} pairs name no patient"
    if report["split_by"] == "none":
        print(
            f"{count}: neither patients nor a split are known, so that all records are for "
            "training and none to judge by: name the column of the patients, --column group=NAME, "
            "or let a split be guessed with --split-by patient --accept-unknown-groups",
            file=sys.stderr,
        )
    elif len(written) > 1 and report["split_by"] != "patient":
        print(
            f"{count}: whether the split that is given parts a patient, nobody can say: name the "
            "column of the patients, --column group=NAME, and 'medtune audit' looks",
            file=sys.stderr,
        )


def _complain_of_rejected(
    report: dict[str, Any], source: str, out: Path, most_rejected: float
) -> None:
    """Raise ValueError if too few rows became records."""
    reasons = ", ".join(f"{count} {kind}" for kind, count in report["reasons"].items())
    where = f"{out / 'rejected.jsonl'} ('medtune ids' with the same source: which file an id is)"
    if not sum(report["records"].values()):
        raise ValueError(
            f"nothing of {source} became a record ({reasons or 'it has no rows'}): read the "
            f"reasons in {where}"
        )
    rejected = report["rejected"]
    if rejected > most_rejected * report["rows"]:
        raise ValueError(
            f"{rejected} of {report['rows']} rows were rejected ({reasons}), more than "
            f"most_rejected={most_rejected:g} allows: read the reasons in {where}"
        )


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A converted folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Prepare each record with this model's processor, as training will: says what "
            "training would stop at, and counts tokens."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Report the records that have more tokens than this.")
    ] = None,
) -> None:
    """Check a converted folder: does it conform, and what is wrong where?"""
    from medtune.records import check_folder

    processor = None
    if model:
        # loads torch, which checking alone does not need
        from medtune.models import load_processor

        processor = load_processor(model)
    report = check_folder(folder, processor=processor, max_length=max_length)
    print_table(report["table"])
    if not report["ok"]:
        where = f"every error stands in {folder / 'check.json'}"
        raise ValueError(f"{folder} does not conform; {where}")


@app.command()
def audit(
    source: Source,
    column: Column = None,
    captions: Captions = None,
    image_root: ImageRoot = None,
    allow_empty_captions: AllowEmptyCaptions = False,
    encoding: Encoding = None,
    window: Window = None,
    slab: SlabPictures = None,
    slab_mm: SlabMm = None,
    split_by: SplitBy = None,
    id_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression for the id, whose group is the patient."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="CSV to write with id, split and group of each pair, for 'medtune convert "
            "--splits'."
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--fingerprints", help="Folder for the fingerprints, where a killed audit goes on."
        ),
    ] = None,
    accept_unknown_groups: AcceptUnknownGroups = False,
    config: Config = None,
    split: Split = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Seed of the split that is made.")] = 0,
    ray: Ray = None,
) -> None:
    """Look for duplicates, for patients on both sides of the split, and for text in the pictures.

    Pairs without a split get one by patient.
    """
    from medtune.audit import (
        assign_groups,
        audit_split,
        count_unknown_groups,
        fingerprint,
        fingerprint_on_cluster,
        group_clues,
        near_duplicates,
        split_by_group,
        write_splits,
    )

    if split_by not in (None, "patient", "none"):
        raise ValueError(f"--split-by is patient or none, not {split_by!r}")
    asked = Asked(
        # a bare name can only be that of the column with the patients
        column=[text if "=" in text else f"group={text}" for text in column or []],
        captions=captions,
        image_root=image_root,
        allow_empty_captions=allow_empty_captions,
        encoding=encoding,
        window=window,
        slab=slab,
        slab_mm=slab_mm,
        config=config,
        split=split,
        limit=limit,
    )
    marked = None
    if ray:
        # the pictures stay where they are, and all else is known when they have been read
        options = _of_shards(asked, ray)
        marked = fingerprint_on_cluster(source, ray=ray, keep=keep, **options)
    pairs = asked.load(source) if marked is None else marked.pairs
    keeps_split = "split" in pairs.column_names and split_by != "patient"
    unknown = 0 if id_pattern else count_unknown_groups(pairs)
    all_unknown = unknown == len(pairs)
    if write is not None and all_unknown and not keeps_split:
        _refuse_unknown_groups(unknown, len(pairs), accept_unknown_groups)
    marks = fingerprint(pairs, keep=keep) if marked is None else marked.fingerprints
    near = near_duplicates(pairs, fingerprints=marks)
    # a new split keeps together what looks alike; of a given one, that is for the report to say
    alike = None if keeps_split else near
    if all_unknown and not keeps_split:
        clues = group_clues(pairs, fingerprints=marks)
        alike = [pair for found in clues.values() for pair in found]
    groups = assign_groups(pairs, id_pattern=id_pattern, pairs=alike, fingerprints=marks)
    splits = pairs["split"] if keeps_split else split_by_group(groups, seed=seed)
    report = audit_split(pairs, groups, splits, fingerprints=marks, near=near, raise_on_leak=False)
    if not id_pattern:
        splits = _without_unnamed_patients(pairs, list(splits))
    if write is not None:
        write_splits(write, pairs["id"], splits, groups)
    print_json(report | {"unknown_groups": unknown})
    _complain_of_unreadable(pairs, marks.unreadable, source)
    _warn_of_text(pairs, None if marked is None else marked.cells)
    if all_unknown:
        print(
            f"medtune: warning: no patients are known ({unknown} of {len(pairs)} pairs name none), "
            "so that groups are guessed from pictures, captions and ids, and two different "
            "pictures of one patient may be parted: --column group=NAME, or --id-pattern",
            file=sys.stderr,
        )
    _warn_of_repeated_ids(source, column)
    _complain_of_leaks(report, source)


def _without_unnamed_patients(pairs: Any, splits: list[str | None]) -> list[str | None]:
    """Take the rows that name no patient out of the split, where others do, and say so on stderr.

    Their patients may be anywhere, so that they fit into no part.
    """
    from medtune.pairs import names_group

    if "group" not in pairs.column_names:
        return splits
    unnamed = [row for row, group in enumerate(pairs["group"]) if not names_group(group)]
    if not unnamed or len(unnamed) == len(splits):
        return splits
    print(
        f"medtune: warning: {len(unnamed)} rows name no patient (first: row {unnamed[0]}, id "
        f"{pairs['id'][unnamed[0]]}): they get no split, and conversion will reject them",
        file=sys.stderr,
    )
    for row in unnamed:
        splits[row] = None
    return splits


def _of_shards(asked: Asked, ray: str) -> dict[str, Any]:
    """Give the options for shards that are read on a cluster: what the columns are called."""
    if not dataclasses.replace(asked, column=[]).is_plain():
        raise ValueError(
            f"--ray {ray} reads parquet shards as they are: of the options on the source only "
            "--column goes with it"
        )
    return {"columns": read_columns(asked.column)}


def _warn_of_text(pairs: Any, cells: Any) -> None:
    """Say on stderr whether pictures hold text, which may name a patient."""
    from medtune.audit import burned_in_text

    found = burned_in_text(pairs, cells=cells)
    for line in found.warnings():
        print(f"medtune: warning: {line}", file=sys.stderr)
    suspects = found.flagged + found.with_text
    if suspects:
        print(
            f"medtune: warning: look at {', '.join(suspects[:MOST_NAMED])}; 'medtune ids' with the "
            "same source and options says which files these are",
            file=sys.stderr,
        )


def _complain_of_unreadable(pairs: Any, unreadable: list[int], source: str) -> None:
    if not unreadable:
        return
    first = pairs["id"][unreadable[0]]  # the row itself would be decoded
    raise ValueError(
        f"{len(unreadable)} pictures of {source} cannot be read, so nothing can be said "
        f"of them (first: id {first}; 'medtune ids' with the same source and options says which "
        "file that is); 'medtune convert' with these options lists them all, with the reasons"
    )


def _warn_of_repeated_ids(source: str, column: list[str] | None) -> None:
    """Say on stderr whether ids of parquet shards stand in several rows."""
    path = Path(source)
    shards = path.suffix == ".parquet" if path.is_file() else any(path.rglob("*.parquet"))
    if not shards:
        return

    from medtune.audit import repeated_ids

    for line in repeated_ids(source, column=read_columns(column).get("id", "id")).warnings():
        print(f"medtune: warning: {line}", file=sys.stderr)


def _complain_of_leaks(report: dict[str, Any], source: str) -> None:
    leaks = []
    for kind in ("groups_crossing", "near_duplicates_crossing", "exact_duplicates_crossing"):
        if report[kind]:
            leaks.append(f"{report[kind]} {kind}")
    if leaks:
        raise ValueError(
            f"the split of {source} leaks: {', '.join(leaks)}; --split-by patient makes another, "
            "and --write FILE keeps it"
        )


@app.command()
def ids(
    source: Source,
    only: Annotated[
        list[str] | None,
        typer.Option(help="An id to look up; may be repeated. By default all are listed."),
    ] = None,
    column: Column = None,
    captions: Captions = None,
    image_root: ImageRoot = None,
    allow_empty_captions: AllowEmptyCaptions = False,
    encoding: Encoding = None,
    window: Window = None,
    slab: SlabPictures = None,
    slab_mm: SlabMm = None,
) -> None:
    """Say which file of a source each id stands for, on the screen only.

    Ids are hashes where a name of a file or a patient's number would stand otherwise.
    """
    import datasets

    asked = Asked(
        column=column or [],
        captions=captions,
        image_root=image_root,
        allow_empty_captions=allow_empty_captions,
        encoding=encoding,
        window=window,
        slab=slab,
        slab_mm=slab_mm,
    )
    pairs = asked.load(source)
    undecoded = pairs.cast_column("image", datasets.Image(decode=False))
    rows = []
    for number, row in enumerate(undecoded):
        if only and row["id"] not in only:
            continue
        path = (row["image"] or {}).get("path")
        rows.append({"id": row["id"], "row": number, "file": path or row.get("problem")})
    if only and not rows:
        raise ValueError(f"{source} has no pair with one of these ids: give the same options")
    print_table(rows)


@app.command()
def translate(
    source: Source,
    out: Annotated[Path, typer.Argument(help="JSONL to write; one that is there is continued.")],
    url: Annotated[
        str,
        typer.Option(
            help="Where the model is served: a bare address is Ollama's protocol, one that ends in "
            "/v1 is OpenAI's."
        ),
    ],
    model: Annotated[str, typer.Option(help="Name that the server gives the model.")],
    to: Annotated[str, typer.Option(help="Language to translate to: zh or en.")] = "zh",
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Send the captions to another machine than this one. They may name patients.",
        ),
    ] = False,
    column: Column = None,
    captions: Captions = None,
    image_root: ImageRoot = None,
    encoding: Encoding = None,
    config: Config = None,
    split: Split = None,
    limit: Limit = None,
) -> None:
    """Translate the captions of a source with a model on this machine, and check what it changed.

    docs/translate.md shows the whole way, and what to do with what the check flags.
    """
    from medtune.captions import translate_captions

    asked = Asked(
        column=column or [],
        captions=captions,
        image_root=image_root,
        encoding=encoding,
        config=config,
        split=split,
        limit=limit,
    )
    report = translate_captions(
        asked.load(source), out, base_url=url, model=model, to=to, allow_remote=allow_remote
    )
    print_json(report)
    if report["failed"]:
        raise ValueError(
            f"{report['failed']} of {report['rows']} captions were not translated: the reasons "
            f"stand in {report['failed_file']}; start again to try them again"
        )
