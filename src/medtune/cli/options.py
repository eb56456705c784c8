"""Arguments and options that several subcommands take, and the source that they name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

Run = Annotated[str, typer.Argument(help="Folder in papermill_runs/, such as tiny-cpu.")]
Root = Annotated[
    Path | None,
    typer.Option(
        help="The clone with notebooks/ and papermill_runs/; by default the current folder or "
        "one above it, else the clone that medtune was installed from."
    ),
]
TlsCert = Annotated[Path | None, typer.Option(help="PEM file of the certificate, with its chain.")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key.")]
Source = Annotated[
    str,
    typer.Argument(
        help="'sample', a parquet file, a table (CSV, TSV, JSON, JSONL, Excel), a folder, a ZIP, "
        "DICOM, or a hub id."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Take so many of the first rows only.")]
Config = Annotated[
    str | None, typer.Option(help="Configuration of a hub data set, such as 25M_demo.")
]
Split = Annotated[str | None, typer.Option(help="Take this split only.")]
Column = Annotated[
    list[str] | None,
    typer.Option(
        help="OURS=THEIRS, which column is which, such as caption=impression or "
        "group=patient_id; may be repeated."
    ),
]
Captions = Annotated[
    Path | None,
    typer.Option(help="The table of captions, where it is not the only one in the folder."),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        help="The folder that the table's picture names start from, and may not lead out of."
    ),
]
AllowEmptyCaptions = Annotated[
    bool,
    typer.Option(
        "--allow-empty-captions",
        help="Take pictures that no table describes: they can be audited and answered, not "
        "trained on.",
    ),
]
Encoding = Annotated[
    str | None, typer.Option(help="Encoding of tables that are not UTF-8, such as gb18030.")
]
Window = Annotated[
    str | None,
    typer.Option(
        help="For DICOM and NIfTI: a CT window such as lung or abdomen, or CENTRE,WIDTH; three "
        "joined by + make the colours red, green and blue, such as lung+mediastinum+bone."
    ),
]
SlabPictures = Annotated[
    int | None,
    typer.Option(
        "--slab",
        help="So many slices of each volume in one question: the table names folders of one DICOM "
        "series each, or NIfTI files.",
    ),
]
SlabMm = Annotated[
    float | None,
    typer.Option(
        help="Millimetres between two slices of a slab, around the middle or the table's "
        "middle_slice; by default slabs are spread evenly over the volume."
    ),
]
SplitBy = Annotated[
    str | None,
    typer.Option(
        help="patient: make the split anew, so that no group is in two parts; none: leave all in "
        "the split that the source gives. By default a split is made where groups are known and "
        "no split is."
    ),
]
AcceptUnknownGroups = Annotated[
    bool,
    typer.Option(
        "--accept-unknown-groups",
        help="Where no pair names a patient, make a split all the same, by groups that are guessed "
        "from look-alikes, equal captions and ids: a patient may stand on both sides.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Address of a Ray cluster, HOST:PORT, whose machines share the work (docs/scale.md). "
        "Start this on one of them. Needs medtune[ray].",
    ),
]
ScoreNames = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        help="llamafactory, standard, finding, listing or invented; may be repeated. By default all "
        "of them.",
    ),
]


# What --column can give a name to: the parts of a pair, and those of an answer.
OURS = ("image", "id", "caption", "caption_zh", "question", "group", "split", "modality")
OURS += ("answer", "reference")


@dataclass(frozen=True)
class Asked:
    """What a command line says of its source, beside its name."""

    #: OURS=THEIRS, as typed
    column: list[str] = field(default_factory=list)
    captions: Path | None = None
    image_root: Path | None = None
    allow_empty_captions: bool = False
    encoding: str | None = None
    window: str | None = None
    slab: int | None = None
    slab_mm: float | None = None
    config: str | None = None
    split: str | None = None
    limit: int | None = None

    def is_plain(self) -> bool:
        """Say whether nothing but the source's name counts."""
        return self == Asked()

    def load(self, source: str, **options: Any) -> Any:
        """Load the pairs of a source; a bad row becomes one with a `problem`."""
        from medtune.pairs import load_pairs

        return load_pairs(
            source,
            columns=read_columns(self.column),
            captions=self.captions,
            image_root=self.image_root,
            allow_empty_captions=self.allow_empty_captions,
            encoding=self.encoding,
            window=read_window(self.window),
            slab=self.slab,
            slab_mm=self.slab_mm,
            config=self.config,
            split=self.split,
            limit=self.limit,
            strict=False,
            **options,
        )


def read_columns(given: list[str] | None) -> dict[str, str]:
    """Read OURS=THEIRS.

    Raises
    ------
    ValueError : no equals sign, nothing on one of its sides, or a name that is none of ours.

    Examples
    --------
    >>> read_columns(["caption=impression", "patient=case number"])
    {'caption': 'impression', 'group': 'case number'}
    """
    columns = {}
    for text in given or []:
        ours, equals, theirs = text.partition("=")
        if not (ours.strip() and equals and theirs.strip()):
            raise ValueError(
                f"--column takes OURS=THEIRS, such as caption=impression or group={text}, "
                f"not {text!r}"
            )
        name = ours.strip().lower()
        if name == "patient":
            name = "group"
        if name not in OURS:
            raise ValueError(
                f"--column {text}: {ours.strip()!r} is none of our columns, which are "
                f"{', '.join(OURS)}"
            )
        columns[name] = theirs.strip()
    return columns


def read_window(given: str | None) -> str | tuple | None:
    """Read the name of a CT window, or CENTRE,WIDTH in Hounsfield units, or three of these.

    Examples
    --------
    >>> read_window("lung"), read_window("-600,1500"), read_window(None)
    ('lung', (-600.0, 1500.0), None)
    >>> read_window("lung+50,350+bone")
    ('lung', (50.0, 350.0), 'bone')
    """
    if given and "+" in given:
        windows = tuple(read_window(one.strip()) for one in given.split("+"))
        if len(windows) != 3 or None in windows or "" in windows:
            raise ValueError(
                "--window takes one window, or three joined by +, such as lung+mediastinum+bone, "
                f"not {given!r}"
            )
        return windows
    if not given or "," not in given:
        return given
    try:
        centre, width = map(float, given.split(","))
    except ValueError:
        raise ValueError(
            f"--window takes a name or CENTRE,WIDTH, such as -600,1500, not {given!r}"
        ) from None
    return centre, width
