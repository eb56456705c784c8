"""Convert the shards of a source on the machines of a Ray cluster, into one folder.

Each machine writes the pictures of a shard to their places, and its records into a folder of its own
in `.convert/parts`, which gets its name when all of it is there. What a lost machine has begun has
no such name and counts for nothing. In the end the records are joined in the order of the shards, so
that the folder is the one that a single process writes.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from medtune.cluster import join_cluster, name_failed
from medtune.pairs import user_salt

from .judge import Judge
from .progress import KINDS, Folder, Progress, Settings
from .sources import Shard, Source, open_shard
from .splits import Chosen
from .write import Writer, convert_blocks


@dataclass(frozen=True)
class Part:
    """Some rows of a shard, as they travel to another machine.

    file : the shard.
    problem : why it cannot be opened, if so.
    shard_first : number of the first row of the shard, counted over the whole source.
    rows : the rows that are to be converted; a run that goes on has done those before.
    total : how many rows the whole source has.
    settings : what the conversion was asked to do.
    columns : the columns that go into the records as they are.
    chosen : the split of each row of the shard.
    repeated : rows whose id is taken: number of the row -> number of the row that has it.
    strict : whether a bad pair ends the shard.
    out : the folder of the conversion.
    salt : what ids that are names of files are hashed with, on all machines alike.
    """

    file: Path
    problem: str | None
    shard_first: int
    rows: range
    total: int
    settings: Settings
    columns: list[str]
    chosen: Chosen
    repeated: dict[int, int]
    strict: bool
    out: Path
    salt: str

    @property
    def folder(self) -> Path:
        """Where its records lie when they are whole."""
        return self.out / ".convert" / "parts" / f"{self.rows.start:012d}"


def check_spread(source: Source, ray: str, pictures_per_sample: int) -> None:
    """Raise `ValueError` for what cannot be cut into shards."""
    if any(shard.file is None for shard in source.shards):
        raise ValueError(
            f"ray={ray} takes parquet shards with image, id and caption, whose ids do not repeat, and "
            "no options that say how to read them: convert this source without it"
        )
    if pictures_per_sample > 1 or {"slab", "slices"} <= source.types.keys():
        raise ValueError(
            f"ray={ray} makes records of one picture: pictures that belong together may lie in two "
            "shards; convert this source without it"
        )


def convert_on_cluster(source: Source, judge: Judge, writer: Writer, ray: str) -> None:
    """Convert the rows that are not done yet on a cluster, and join what comes of them.

    Raises
    ------
    ValueError : a shard could not be converted; the others were, and the same call goes on.
    """
    parts = list(_parts_of(source, judge, writer))
    (writer.folder.work / "parts").mkdir(exist_ok=True)
    jobs = {}
    for part in parts:
        if not part.folder.exists():
            jobs[_name_of(part, parts)] = (part,)
    if jobs:
        with join_cluster(ray) as cluster:
            failed = cluster.each(convert_part, jobs, _take_nothing, title="Converting shards")
        if failed:
            what = name_failed(failed, len(source.shards), "shards were not converted")
            raise ValueError(f"{what}; the others are done, and the same call goes on with these")
    for part in parts:
        _join(part, writer)


def _name_of(part: Part, parts: list[Part]) -> str:
    """Name the shard of a part: by its file's name, unless two folders have files of that name."""
    alike = [other for other in parts if other.file.name == part.file.name]
    return part.file.name if len(alike) == 1 else str(part.file)


def _take_nothing(name: str, nothing: None) -> None:
    """A part lies on the disk: nothing comes back but that it is done."""


def _parts_of(source: Source, judge: Judge, writer: Writer) -> Iterator[Part]:
    """Cut what is left to do into parts, one a shard."""
    done = writer.progress.row
    salt = user_salt()
    start = 0
    for shard in source.shards:
        stop = start + shard.rows
        if stop > done:
            own = {row: first for row, first in judge.repeated.items() if start <= row < stop}
            yield Part(
                file=shard.file,
                problem=shard.problem,
                shard_first=start,
                rows=range(max(start, done), stop),
                total=source.rows,
                settings=writer.settings,
                columns=writer.columns,
                chosen=judge.chosen.part(range(start, stop)),
                repeated=own,
                strict=writer.strict,
                out=writer.folder.out.resolve(),
                salt=salt,
            )
        start = stop


# ---- on one of the machines


def convert_part(part: Part) -> None:
    """Convert a shard, or what is left of it, into a folder that gets its name at the end.

    Raises
    ------
    FileNotFoundError : this machine does not see the shard or the folder.
    ValueError : the shard is another one here, or (if strict) a pair is bad.
    """
    if part.folder.exists():
        return
    if not part.folder.parent.is_dir():
        raise FileNotFoundError(
            f"a machine of the cluster does not see {part.out}: it must lie on a disk that all share"
        )
    # ids are hashed with the salt of whoever asked, and not with that of this machine's user
    os.environ["MEDTUNE_SALT"] = part.salt
    # a name of its own: what another machine has begun may still be written there
    scratch = part.folder.with_name(f".{part.folder.name}.{secrets.token_hex(4)}")
    folder = Folder(part.out, part.settings.as_job(), work=scratch)
    progress = Progress(row=part.rows.start)
    try:
        folder.begin(progress)
        writer = Writer(part.settings, folder, progress, part.columns, part.strict)
        judge = Judge(part.settings, part.chosen, part.repeated, part.total)
        with writer.open_files():
            # one thread: Ray has as many of these at a time as there are processors
            convert_blocks(_source_of(part), judge, writer, 1)
        if not part.folder.exists():
            os.rename(scratch, part.folder)
    except OSError:
        # another machine was a moment faster with the same shard
        if not part.folder.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _source_of(part: Part) -> Source:
    """Open the shard of a part here."""
    if part.problem:
        # one row stands for what cannot be opened, and is rejected
        ids = {"id": [pa.array([str(part.file)])]}
        shard = Shard(part.file.name, 1, ids, problem=part.problem, file=part.file)
        return Source([shard], {}, [], first=part.shard_first)
    shard, types = open_shard(part.file)
    if shard.rows != part.rows.stop - part.shard_first:
        raise ValueError(
            f"{part.file} has {shard.rows} rows on a machine of the cluster and "
            f"{part.rows.stop - part.shard_first} where it was asked for: copy it anew"
        )
    return Source([shard], types, [], first=part.shard_first)


# ---- together again


def _join(part: Part, writer: Writer) -> None:
    """Add the records of a part to those before it."""
    notes = Folder(part.out, writer.folder.job, work=part.folder)
    done = Progress.from_notes(notes.read_state()["progress"])
    for kind in KINDS:
        with open(part.folder / f"{kind}.jsonl", "rb") as lines:
            if kind == "train" and writer.dialogues:
                _mix(lines, writer)
                continue
            shutil.copyfileobj(lines, writer.files[kind], 1 << 20)
        if done.samples[kind]:
            writer.progress.samples[kind] += done.samples[kind]
    writer.progress.pairs += done.pairs
    writer.progress.copied += done.copied
    writer.progress.stripped += done.stripped
    writer.progress.converted += done.converted
    writer.progress.rejected += done.rejected
    writer.progress.reasons += done.reasons
    # from here on these rows are done, even if this process is killed
    writer.note(part.rows, [])


def _mix(lines: Iterator[bytes], writer: Writer) -> None:
    """Add training records one by one, with the dialogues that are due between them."""
    for line in lines:
        writer.files["train"].write(line)
        writer.progress.samples["train"] += 1
        writer.write_due_dialogues()
