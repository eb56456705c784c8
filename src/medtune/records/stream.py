"""Make training records of parquet shards while they are read, without a converted folder.

The records are those that `convert_pairs` writes: the same code judges a row, cuts what its picture
tells besides the pixels, and draws its question. What must be known about all rows beforehand (the
split of each, ids that repeat) is read from small columns once, and costs a byte a row from then
on. `datasets` and torchdata share the rows out and remember how far each reader has come.

A shuffle buffer as `datasets` has it is empty again after a restart, so that other records follow
than without one. Here rows are shuffled in windows instead: the shards' row groups come in a random
order, and the rows of a window, as many as a buffer would hold, in another. Both depend on the seed
and the epoch alone, so that a window can be made again.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from medtune.captions import detect_language
from medtune.files import one_line, read_json_lines
from medtune.modelscope import fetch_dataset, is_modelscope_name
from medtune.pairs import load_pairs, safe_id, split_of, split_of_word

from .dialects import SPLITS, messages_with_parts, question_with_marks
from .judge import Judge, Pair
from .progress import Settings
from .read import TEXT, TURNS
from .reasons import kind_of, public_id, public_reason
from .sources import (
    BLOCK,
    SMALL_COLUMNS,
    Block,
    Shard,
    Source,
    copied_columns,
    has_our_columns,
    id_hashes,
)
from .splits import Chosen, choose_splits
from .write import check_regions, check_words, list_questions

# What `codes` holds for a row of no split, and for one whose id stands above already.
NO_SPLIT = 255
REPEATED = 254

NO_TYPE = datasets.Value("null")

# Columns that a record is made of, besides those that are copied.
COLUMNS_JUDGED = ("image", "id", "caption", "caption_zh", "question", "problem")

# Rows that are looked at in vain at most before it is said that none can be used.
SPARE = 100

# Files that a process keeps open: windows go to and fro between a few.
MOST_OPEN = 8


# --- what is known about all rows -------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Rows of one row group that follow each other.

    group : number of the row group among those of all shards.
    start, stop : the first row, and the one behind the last, counted from 0 in the group.
    """

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows that are read and shuffled together; none where a process only keeps its turn.

    rows : how many they are.
    slices : of each row group that it touches the slice that holds them.
    """

    rows: int
    slices: tuple[Slice, ...]


@dataclass
class ShardIndex:
    """Where each row of a set of shards lies, and which split it goes to.

    Attributes
    ----------
    files
        Path or address of each shard that can be read.
    file_of, number_in_file
        Of each row group its shard, and its number there.
    starts
        The number of the first row of each row group, counted over all; at last the number of rows.
    codes
        The split of each row by its place in `SPLITS`, or why it has none.
    types
        The `datasets` feature of each column.
    reasons
        Rows that are left out before any is read, by kind.
    digest
        What tells this set, split in this way, from another.
    """

    files: list[str]
    file_of: np.ndarray
    number_in_file: np.ndarray
    starts: np.ndarray
    codes: np.ndarray
    types: dict[str, Any]
    reasons: Counter[str]
    digest: str

    @property
    def rows(self) -> int:
        """Number of rows, of whatever split."""
        return len(self.codes)

    def chosen_in(self, group: int, code: int) -> np.ndarray:
        """Give the rows of a row group that are of a split, counted from 0 in the group."""
        codes = self.codes[self.starts[group] : self.starts[group + 1]]
        return np.flatnonzero(codes == code)

    def counts(self, code: int) -> np.ndarray:
        """Count the rows of a split in each row group."""
        before = np.concatenate([[0], np.cumsum(self.codes == code)])
        return before[self.starts[1:]] - before[self.starts[:-1]]


def names_shards(source: str | os.PathLike) -> bool:
    """Say whether a source is to be streamed: parquet files, or a set on the hub.

    Parameters
    ----------
    source : a parquet file, a folder of such, a pattern such as `shards/*.parquet`, or the name of
        a set on the hub. A folder that holds JSON is a converted one, which is read otherwise.

    Examples
    --------
    >>> names_shards("shards/part-*.parquet"), names_shards("UCSC-VLAA/MedTrinity-25M:25M_full")
    (True, True)
    """
    path = Path(source).expanduser()
    if path.suffix == ".parquet" or is_modelscope_name(str(source)):
        return True
    if path.is_dir():
        return not any(path.glob("*.json*")) and any(path.rglob("*.parquet"))
    # a path that is missing is rather a converted folder with a slip in its name
    parts = str(source).split("/")
    return not path.exists() and len(parts) == 2 and all(parts) and not str(source).startswith(".")


def index_shards(
    source: str | os.PathLike,
    *,
    splits: str | os.PathLike | None = None,
    split_by: str | None = None,
    seed: int = 0,
    most_rejected: float = 0.1,
) -> ShardIndex:
    """Find the rows of a set of shards and the split of each; no picture is read.

    Parameters
    ----------
    source : see `names_shards`. The shards must have columns image (bytes), id and caption.
    splits : CSV with the columns id and split, as `medtune audit --write FILE` writes it. By
        default, as `convert_pairs` does: the column `split`, the name of the shard, or by patient.
    split_by, seed : as `convert_pairs` takes them.
    most_rejected : share of rows that may be left out.

    Returns
    -------
    ShardIndex : what `RecordStream` reads by.

    Raises
    ------
    ValueError : there are no rows, they lack a column, or too many are left out.
    OSError : there is no such source, or it cannot be read.

    Examples
    --------
    >>> index_shards("no-such-folder/*.parquet")
    Traceback (most recent call last):
    FileNotFoundError: no-such-folder/*.parquet names no parquet file: ...
    """
    files = _files_of(source)
    shards, groups, identity = _open_shards(files)
    sound = [shard for shard in shards if not shard.problem]
    if not sound:
        raise ValueError(shards[0].problem)
    if splits:
        codes, missing = _codes_of_table(shards, Path(splits).expanduser())
    else:
        codes, missing = _codes_of_source(shards, split_by, seed)
    lost = sum(shard.lost for shard in shards)
    reasons = Counter(shard=lost)
    reasons[kind_of(missing)] += int((codes == NO_SPLIT).sum())
    repeated = _repeated_rows(shards)
    reasons["id"] += len(repeated)
    codes[repeated] = REPEATED
    _refuse_too_many(+reasons, len(codes) + lost, most_rejected)

    digest = hashlib.sha256(json.dumps(identity).encode() + codes.tobytes()).hexdigest()
    return ShardIndex(
        files=[shard.name for shard in sound],
        file_of=np.array([file for file, _, _ in groups]),
        number_in_file=np.array([number for _, number, _ in groups]),
        starts=np.concatenate([[0], np.cumsum([rows for _, _, rows in groups])]),
        codes=codes,
        types=_common_types(sound),
        reasons=+reasons,
        digest=digest,
    )


def _files_of(source: str | os.PathLike) -> list[str]:
    """List the shards that a path, a pattern or a set on the hub names, in order."""
    if is_modelscope_name(str(source)):
        source = fetch_dataset(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif path.exists():
        files = [path]
    elif path.suffix == ".parquet":
        # a pattern
        files = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    else:
        return _files_on_hub(str(source))
    if not files:
        raise FileNotFoundError(
            f"{source} names no parquet file: data is a converted folder, parquet shards (a folder "
            "or a pattern such as 'shards/*.parquet'), or a set on the hub"
        )
    return [str(file) for file in files]


def _files_on_hub(name: str) -> list[str]:
    """List the shards of a set on the hub."""
    # it says in one line why the hub does not give a set
    load_pairs(name, streaming=True)
    hub_id, _, config = name.partition(":")
    data_files = datasets.load_dataset_builder(hub_id, config or None).config.data_files or {}
    files = [str(file) for file in data_files.get("train", ())]
    if not files or not all(file.endswith(".parquet") for file in files):
        raise ValueError(
            f"{name} does not lie on the hub as parquet: write it with medtune convert"
        )
    return files


def _open_parquet(file: str) -> pq.ParquetFile:
    """Open a shard here or on the hub."""
    if "://" in file:
        filesystem, path = fsspec.url_to_fs(file)
        return pq.ParquetFile(filesystem.open(path, "rb"), pre_buffer=False, buffer_size=1 << 20)
    # without pre_buffer a row group of any size is read page by page
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 16)


def _open_shards(
    files: list[str],
) -> tuple[list["_ShardOfRows"], list[tuple[int, int, int]], list]:
    """Read footers and small columns; give the shards, their row groups, and what identifies them.

    A row group comes as the number of its sound shard, its own there, and its number of rows.
    """
    shards: list[_ShardOfRows] = []
    groups: list[tuple[int, int, int]] = []
    identity = []
    sound = 0
    for file in files:
        shard = _open_shard(file)
        shards.append(shard)
        identity.append([Path(file).name, shard.rows, shard.problem])
        if shard.problem:
            print(f"medtune: {shard.problem}", file=sys.stderr, flush=True)
            continue
        for number, rows in enumerate(shard.group_rows):
            groups.append((sound, number, rows))
        sound += 1
    return shards, groups, identity


@dataclass
class _ShardOfRows(Shard):
    """A shard of which the small columns are known.

    types : the feature of each column.
    group_rows : number of rows of each row group.
    lost : rows of a shard that cannot be used; 1 where even their number cannot be read.
    """

    types: dict[str, Any] = field(default_factory=dict)
    group_rows: list[int] = field(default_factory=list)
    lost: int = 0


def _open_shard(file: str) -> _ShardOfRows:
    """Read what is small of a shard; one that cannot be used has a problem and no rows."""
    name = Path(file).name
    lost = 1
    try:
        with _open_parquet(file) as parquet:
            rows = lost = parquet.metadata.num_rows
            types = dict(datasets.Features.from_arrow_schema(parquet.schema_arrow))
            if not has_our_columns(types):
                columns = ", ".join(types)
                problem = (
                    f"shard: {name} has not the columns image (bytes), id and caption (texts), "
                    f"only {columns}: medtune convert reads others"
                )
                return _ShardOfRows(file, 0, {}, problem=problem, lost=lost)
            there = [column for column in SMALL_COLUMNS if column in types]
            table = parquet.read(columns=there)
            small = {column: table[column].chunks for column in there}
            sizes = []
            for group in range(parquet.num_row_groups):
                sizes.append(parquet.metadata.row_group(group).num_rows)
    except (OSError, ValueError) as error:
        problem = f"shard: {name} is cut off, fetch it again ({one_line(error)})"
        return _ShardOfRows(file, 0, {}, problem=problem, lost=lost)
    return _ShardOfRows(file, rows, small, foreign=True, types=types, group_rows=sizes)


def _common_types(shards: list[_ShardOfRows]) -> dict[str, Any]:
    """Give the columns of the shards, but for those that have another type in another shard."""
    types: dict[str, Any] = {}
    differ = set()
    for shard in shards:
        for name, kind in shard.types.items():
            # a column without any value has no type, either
            if kind == NO_TYPE:
                continue
            if types.setdefault(name, kind) != kind:
                differ.add(name)
    return {name: kind for name, kind in types.items() if name not in differ}


def _repeated_rows(shards: list[_ShardOfRows]) -> np.ndarray:
    """Give the numbers of the rows whose id an earlier row has, by a hash of 8 bytes."""
    hashes = np.fromiter(id_hashes(shards), np.int64)
    _, firsts = np.unique(hashes, return_index=True)
    later = np.ones(len(hashes), bool)
    later[firsts] = False
    return np.flatnonzero(later)


def _refuse_too_many(reasons: Counter[str], rows: int, most_rejected: float) -> None:
    """Raise `ValueError` if too many rows are left out."""
    left_out = sum(reasons.values())
    if left_out > most_rejected * rows:
        listed = ", ".join(f"{count} {kind}" for kind, count in reasons.items())
        raise ValueError(
            f"{left_out} of {rows} rows cannot be trained on ({listed}), more than "
            f"most_rejected={most_rejected:g} allows: mend them, or allow more"
        )


# --- the split of each row --------------------------------------------------------------------


def _codes_of_source(
    shards: list[_ShardOfRows], split_by: str | None, seed: int
) -> tuple[np.ndarray, str]:
    """Find the split of each row as `convert_pairs` does, and say why some have none."""
    sound = [shard for shard in shards if not shard.problem]
    chosen = choose_splits(Source(sound, {}, []), None, split_by, seed)
    if chosen.splits is not None:
        return _codes_of_words(chosen.splits), chosen.missing or "split"
    parts = []
    for shard in sound:
        if "split" in shard.small:
            words: list = []
            for chunk in shard.small["split"]:
                words += chunk.to_pylist()
        else:
            words = [split_of(Path(shard.name)) or "train"] * shard.rows
        parts.append(_codes_of_words(words))
    return np.concatenate(parts), "split"


def _codes_of_words(words: Sequence[Any]) -> np.ndarray:
    code_of: dict[Any, int] = {}
    codes = np.empty(len(words), np.uint8)
    for row, word in enumerate(words):
        if word not in code_of:
            code_of[word] = _code_of(word)
        codes[row] = code_of[word]
    return codes


def _code_of(word: Any) -> int:
    split = split_of_word(word)
    return NO_SPLIT if split is None else SPLITS.index(split)


def _codes_of_table(shards: list[_ShardOfRows], file: Path) -> tuple[np.ndarray, str]:
    """Look each id up in a CSV of splits, and say why some rows have none."""
    known, codes_of_known = _read_table(file)
    codes = np.full(sum(shard.rows for shard in shards), NO_SPLIT, np.uint8)
    hashes = np.fromiter(_safe_hashes(shards), np.int64, len(codes))
    places = np.searchsorted(known, hashes)
    places[places == len(known)] = 0
    found = known[places] == hashes
    codes[found] = codes_of_known[places[found]]
    if not (codes != NO_SPLIT).any():
        raise ValueError(f"{file} has a split for none of the ids: splits={file} is of another set")
    return codes, f"split: {file.name} has none for this id"


def _safe_hashes(shards: list[_ShardOfRows]) -> Iterator[int]:
    """Yield a hash of each id, as it stands in the records."""
    for shard in shards:
        for chunk in shard.small.get("id", ()):
            # as bytes: an id that is not UTF-8 cannot become a text, and is rejected later
            for value in chunk.cast("binary").to_pylist():
                yield _hash_of_id((value or b"").decode("utf-8", "replace"))


def _hash_of_id(name: str) -> int:
    return hash(safe_id(name).encode("utf-8", "replace"))


def _read_table(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a CSV of splits: the hashes of its ids in order, and the code of each."""
    try:
        with pa_csv.open_csv(file) as first:
            names = first.schema.names
        # "007" is an id and no number
        as_text = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        )
        table = pa_csv.read_csv(file, convert_options=as_text)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no CSV in UTF-8 ({one_line(error)})") from None
    columns = {name.strip().lower(): name for name in table.column_names}
    if not {"id", "split"} <= columns.keys():
        raise ValueError(f"{file} has no columns id and split: give splits=FILE with both")
    ids = table[columns["id"]].cast("string").to_pylist()
    words = [word.strip() for word in table[columns["split"]].cast("string").to_pylist()]
    codes = _codes_of_words(words)
    for word in {words[row] for row in np.flatnonzero(codes == NO_SPLIT)}:
        if word:
            raise ValueError(f"{file}: {word!r:.50} is none of {', '.join(SPLITS)}")
    hashes = np.array([_hash_of_id(name.strip()) for name in ids], np.int64)
    order = np.argsort(hashes, kind="stable")
    hashes, codes = hashes[order], codes[order]
    same_id = hashes[1:] == hashes[:-1]
    differ = np.flatnonzero(same_id & (codes[1:] != codes[:-1]))
    if len(differ):
        line = max(order[differ[0]], order[differ[0] + 1]) + 2
        raise ValueError(f"{file}, line {line}: the id stands above already, with another split")
    return hashes, codes


# --- records ----------------------------------------------------------------------------------


class _Everywhere:
    """Says of each row the same split: only rows of one are ever judged."""

    def __init__(self, split: str):
        self.split = split

    def __getitem__(self, number: int) -> str:
        return self.split


class _InTurn:
    """Does one thing after the other: loader processes are many already."""

    map = staticmethod(map)


class RecordStream:
    """The records of one split of a set of shards, made while they are read.

    Parameters
    ----------
    index : of the shards, see `index_shards`.
    split : "train", "validation" or "test".
    questions, language, system_prompt, magnify, jpeg_quality, seed : as `convert_pairs` takes them.
    rejected : folder in which each process lists the rows that it leaves out.
    most_rejected : share of the rows that one process may leave out.

    Raises
    ------
    ValueError : no row is of this split, or a setting is wrong.

    Examples
    --------
    >>> import tempfile
    >>> import pyarrow.parquet, PIL.Image, io
    >>> picture = io.BytesIO()
    >>> PIL.Image.new("RGB", (28, 28)).save(picture, "JPEG")
    >>> row = {"image": {"bytes": picture.getvalue()}, "id": "a", "caption": "A black square."}
    >>> file = Path(tempfile.mkdtemp(), "shard.parquet")
    >>> pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    >>> stream = RecordStream(index_shards(file), "train")
    >>> [record["id"] for record in stream.records()]
    ['a']
    """

    def __init__(  # noqa: PLR0913 - the settings of a conversion that a stream has, too
        self,
        index: ShardIndex,
        split: str,
        *,
        questions: str | Sequence[str] | None = None,
        language: str = "en",
        system_prompt: str | None = None,
        magnify: bool = False,
        jpeg_quality: int | None = None,
        seed: int = 0,
        rejected: str | os.PathLike | None = None,
        most_rejected: float = 0.1,
    ):
        asked = list_questions(questions)
        check_words("prompt-completion", language, asked)
        check_regions(index.types, magnify=magnify)
        self.index = index
        self.split = split
        self.code = SPLITS.index(split)
        self.counts = index.counts(self.code)
        self.columns = copied_columns(index.types, ())
        self.columns_read = [*COLUMNS_JUDGED, *self.columns]
        self.system_prompt = system_prompt
        folder = None if rejected is None else Path(rejected)
        self.left_out = LeftOut(folder, most_rejected, len(self))
        settings = Settings(
            dialect="prompt-completion",
            questions=[(text, detect_language(text)) for text in asked],
            asked_of_all=bool(questions),
            language=language,
            system_prompt=system_prompt,
            share=0.0,
            pictures_per_sample=1,
            seed=seed,
            jpeg_quality=jpeg_quality,
            columns={},
            text_only=None,
            source=[],
            splits=None,
            split_by=None,
            keep=[],
            magnify=magnify,
        )
        # an id that repeats was left out of the index already
        self._judge = Judge(settings, Chosen("given", _Everywhere(split)), {}, index.rows)
        if not len(self):
            raise ValueError(f"no row of the shards is of the split {split}")
        if {"slab", "slices"} <= index.types.keys():
            # a row becomes a record here: each would have one picture of its slab
            raise ValueError(
                "the shards hold slabs, several rows of which are one record, and a stream makes "
                "a record of each row: convert them first, `medtune convert`"
            )

    def __len__(self) -> int:
        return int(self.counts.sum())

    @property
    def features(self) -> datasets.Features:
        """The columns of the records, as `read_records` has them."""
        types = {"id": TEXT, "prompt": TURNS, "completion": TURNS}
        types["images"] = datasets.List(datasets.Image())
        others = {name: self.index.types[name] for name in self.columns}
        return datasets.Features(types | others)

    # --- order

    def windows(  # noqa: PLR0913 - each says a part of who reads what
        self,
        *,
        buffer: int = 1000,
        seed: int | None = None,
        epoch: int = 0,
        batch_size: int = 1,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 1,
        most: int | None = None,
    ) -> list[Window]:
        """Give the windows that one rank reads in an epoch, those of its loader processes in turn.

        All ranks together have each row once. Each has the same number of batches, or one less, and
        so has each of its processes; only the last batch of all can be smaller than the others.

        Parameters
        ----------
        buffer : rows of a window, a multiple of the batch size if that is smaller.
        seed : of the order of row groups; None: the order in which they lie.
        epoch : with the seed decides the order.
        batch_size : rows of a batch; a window holds whole ones.
        rank, ranks : which of how many shares.
        workers : processes that read them; the list has one window for each in turn.
        most : rows after which there is no more to read; None for all.
        """
        order = np.arange(len(self.counts))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(order)
        # the place of the first row of each row group among all rows in this order
        places = np.concatenate([[0], np.cumsum(self.counts[order])])
        size = max(buffer // batch_size, 1) * batch_size
        end = len(self) if most is None else min(most, len(self))
        begin, end = _share(0, end, batch_size, rank, ranks)
        columns = []
        for worker in range(workers):
            first, stop = _share(begin, end, batch_size, worker, workers)
            starts = range(first, stop, size)
            columns.append([(start, min(start + size, stop)) for start in starts])
        windows = []
        for number in range(max(map(len, columns))):
            for column in columns:
                # a process with fewer windows than another gets an empty one, to keep the turn
                start, stop = column[number] if number < len(column) else (0, 0)
                windows.append(self._window(order, places, start, stop))
        return windows

    def batches(self, batch_size: int, ranks: int) -> int:
        """Give the number of batches of the rank that has most of them."""
        return -(-_ceil(len(self), batch_size) // ranks)

    def _window(self, order: np.ndarray, places: np.ndarray, start: int, stop: int) -> Window:
        """Find the rows from one place to another, in an order of row groups."""
        slices = []
        rows = stop - start
        position = int(np.searchsorted(places, start, side="right")) - 1
        while start < stop:
            group = int(order[position])
            until = min(stop, int(places[position + 1]))
            if until > start:
                chosen = self.index.chosen_in(group, self.code)
                first = int(chosen[start - places[position]])
                last = int(chosen[until - places[position] - 1])
                slices.append(Slice(group, first, last + 1))
                start = until
            position += 1
        return Window(rows, tuple(slices))

    # --- read

    def records(
        self,
        windows: list[Window] | None = None,
        *,
        seed: int | None = None,
        epoch: int = 0,
        workers: int = 1,
        decode: bool = True,
    ) -> datasets.IterableDataset:
        """Give the records as a stream of `datasets`, whose state dict goes on within a window.

        Parameters
        ----------
        windows : what to read; by default all, in the order in which it lies.
        seed, epoch : of the order of rows within a window; None: as they lie.
        workers : how many processes read them.
        decode : whether pictures are decoded; otherwise rows are as the shards hold them, without
            types.
        """
        if windows is None:
            windows = self.windows()
        rows = sum(window.rows for window in windows)
        self.left_out.rows = _ceil(rows, workers)
        reader = _Reader(self, seed, epoch)
        return datasets.IterableDataset.from_generator(
            _read_windows,
            features=self.features if decode else None,
            # a list is what `datasets` deals out to the processes of a loader
            gen_kwargs={"windows": windows, "reader": reader},
        )

    def first(self, number: int, *, seed: int | None = None) -> datasets.Dataset:
        """Hold some records in memory: the first, or with a seed some of all.

        Parameters
        ----------
        number : how many at most.
        seed : draws the row groups that they come from.
        """
        # some more than are wanted, because some may be left out
        windows = self.windows(buffer=number, seed=seed, most=2 * number + SPARE)
        rows = []
        records = self.records(windows, seed=seed, decode=False)
        # these are a few of all: it is of all that a share may be left out
        self.left_out.rows = len(self)
        for row in records:
            rows.append(row)
            if len(rows) == number:
                break
        if not rows:
            raise ValueError(f"no row of the split {self.split} can be used")
        return datasets.Dataset.from_list(rows, features=self.features)

    def pairs_of(self, block: Block) -> Iterator[Pair]:
        """Judge the rows of a block, and list those that are left out."""
        yield from self._judge.accept(block, _InTurn, self.left_out.add)

    def record_of(self, pair: Pair) -> dict[str, Any]:
        """Make the record of a pair, as `read_records` reads it from a converted folder.

        Raises
        ------
        ValueError : a column holds what a record cannot hold, such as NaN in a list.
        """
        images = [{"bytes": pair.picture.data, "path": None}]
        if pair.magnified:
            images.append({"bytes": pair.magnified.data, "path": None})
        question = question_with_marks(pair.question, len(images))
        turns = [("user", question), ("assistant", pair.caption)]
        if self.system_prompt:
            turns.insert(0, ("system", self.system_prompt))
        messages = messages_with_parts(turns)
        cells = {}
        for name in self.columns:
            value = pair.cells.get(name)
            # NaN, which JSON lacks, is the one value that differs from itself
            cells[name] = value if value == value else None
        json.dumps(cells, allow_nan=False)
        record = {"id": pair.cells["id"], "prompt": messages[:-1], "completion": messages[-1:]}
        record["images"] = images
        return record | cells


def _ceil(number: int, size: int) -> int:
    return -(-number // size)


def _share(begin: int, end: int, batch_size: int, part: int, parts: int) -> tuple[int, int]:
    """Cut the rows from `begin` to `end` into parts of whole batches; give one of them."""
    batches = _ceil(end - begin, batch_size)
    first = begin + batches * part // parts * batch_size
    stop = begin + batches * (part + 1) // parts * batch_size
    return min(first, end), min(stop, end)


def _read_windows(windows: list[Window], reader: "_Reader") -> Iterator[dict[str, Any]]:
    for window in windows:
        yield from reader.read(window)


class _Reader:
    """Reads windows; `datasets` hands it to the processes of a loader.

    Parameters
    ----------
    stream : what the records are of.
    seed, epoch : of the order of rows in a window.
    """

    def __init__(self, stream: RecordStream, seed: int | None, epoch: int):
        self.stream = stream
        self.seed = seed
        self.epoch = epoch
        self._process = os.getpid()
        self._open: dict[int, pq.ParquetFile] = {}
        self._going_on: _GoingOn | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a file that is open here cannot be read by another process
        return self.__dict__ | {"_open": {}, "_going_on": None}

    def read(self, window: Window) -> list[dict[str, Any]]:
        """Make the records of a window, in the order that the seed gives them."""
        if self._process != os.getpid():
            # a process that was forked shares the place in an open file with its parent
            self._process = os.getpid()
            self._open = {}
            self._going_on = None
        records = []
        for piece in window.slices:
            for block in self._blocks(piece):
                for pair in self.stream.pairs_of(block):
                    try:
                        records.append(self.stream.record_of(pair))
                    except ValueError as error:
                        reason = f"record: {one_line(error)}"
                        self.stream.left_out.add(pair.number, pair.cells["id"], reason)
        if self.seed is not None and records:
            begin = window.slices[0]
            place = self.stream.index.starts[begin.group] + begin.start
            random = np.random.default_rng([self.seed, self.epoch, int(place)])
            records = [records[row] for row in random.permutation(len(records))]
        return records

    def _blocks(self, piece: Slice) -> Iterator[Block]:
        """Read the rows of a slice that are of the split, some at a time."""
        index = self.stream.index
        name = Path(index.files[index.file_of[piece.group]]).name
        # number of the first row of the row group
        first = int(index.starts[piece.group])
        done = piece.start
        try:
            for start, table in self._tables(piece):
                wanted = []
                for row in range(max(start, piece.start), min(start + table.num_rows, piece.stop)):
                    if index.codes[first + row] == self.stream.code:
                        wanted.append(row)
                done = start + table.num_rows
                if wanted:
                    rows = table
                    if len(wanted) < table.num_rows:
                        rows = table.take(pa.array([row - start for row in wanted]))
                    yield Block(name, [first + row for row in wanted], rows, foreign=True)
        except (OSError, ValueError) as error:
            problem = f"shard: {name} breaks off here ({one_line(error)})"
            lost = []
            for row in range(max(done, piece.start), piece.stop):
                if index.codes[first + row] == self.stream.code:
                    lost.append(first + row)
            yield Block(name, lost, problem=problem)

    def _tables(self, piece: Slice) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the tables that hold rows of a slice, each with the place of its first row."""
        going_on = self._going_on
        # the next window mostly begins where this one ends: what is open there is read on
        if going_on is None or going_on.group != piece.group or going_on.place > piece.start:
            going_on = _GoingOn(piece.group, self._batches(piece.group))
        # whatever breaks off is not read on
        self._going_on = None
        while True:
            if going_on.stop > piece.start:
                yield going_on.place, going_on.table
            if going_on.stop >= piece.stop:
                break
            going_on.advance()
        self._going_on = going_on

    def _batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """Read a row group from its beginning, some rows at a time."""
        index = self.stream.index
        file = int(index.file_of[group])
        if file not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[file] = _open_parquet(index.files[file])
        parquet = self._open[file]
        there = [name for name in self.stream.columns_read if name in parquet.schema_arrow.names]
        number = int(index.number_in_file[group])
        return parquet.iter_batches(BLOCK, row_groups=[number], columns=there, use_threads=False)


@dataclass
class _GoingOn:
    """A row group that is being read.

    group : its number.
    batches : what is still to come of it.
    place, stop : of the first row of the last table that was read, and of the one behind it.
    table : that table.
    """

    group: int
    batches: Iterator[pa.RecordBatch]
    place: int = 0
    stop: int = 0
    table: pa.RecordBatch | None = None

    def advance(self) -> None:
        """Read some rows more."""
        self.table = next(self.batches, None)
        if self.table is None:
            raise ValueError("it has fewer rows than it says")
        self.place = self.stop
        self.stop += self.table.num_rows


# --- rows that are left out -------------------------------------------------------------------


@dataclass
class LeftOut:
    """The rows that one process leaves out.

    Attributes
    ----------
    folder
        Where each process lists its own, if anywhere.
    most_rejected
        Share of the rows that may be left out.
    rows
        How many rows the process reads.
    kinds
        The kind of each row that was left out, by its number, or its id where that is not known.
    """

    folder: Path | None
    most_rejected: float
    rows: int
    kinds: dict[Any, str] = field(default_factory=dict)

    def add(self, number: int | None, sample_id: object, reason: str) -> None:
        """List a row; raise `ValueError` if there are too many of them."""
        shown = public_id(sample_id)
        reason = public_reason(reason, sample_id)
        key = shown if number is None else number
        if not self.kinds:
            listed = f"; all such rows are listed in {self.folder}" if self.folder else ""
            print(
                f"medtune: id {str(shown)[:100]!r} is left out: {reason}{listed}",
                file=sys.stderr,
                flush=True,
            )
        if key not in self.kinds and self.folder:
            self._note({"id": shown, "row": number, "reason": reason})
        self.kinds[key] = kind_of(reason)
        if len(self.kinds) > self.most_rejected * self.rows:
            kinds = Counter(self.kinds.values())
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            raise ValueError(
                f"{len(self.kinds)} of {self.rows} rows cannot be trained on ({listed}), more than "
                f"most_rejected={self.most_rejected:g} allows; the last, id {str(shown)[:100]!r}: "
                f"{reason}"
            )

    def _note(self, entry: dict[str, Any]) -> None:
        """Add a row to the list of this process: none writes into the file of another."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{os.environ.get('RANK', '0')}-{os.getpid()}.jsonl"
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")


def count_rejected(folder: str | os.PathLike) -> Counter[str]:
    """Count the rows that the processes of a training have left out, each once, by kind.

    Parameters
    ----------
    folder : in which they list them, see `RecordStream`.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for _ in range(2):
    ...     LeftOut(folder, 0.1, 100).add(7, "a", "image: has zero bytes")
    >>> count_rejected(folder)
    Counter({'image': 1})
    """
    kinds: dict[Any, str] = {}
    for file in sorted(Path(folder).glob("*.jsonl")):
        for _, entry in read_json_lines(file):
            # a process that is killed may leave half a line
            if isinstance(entry, dict):
                key = entry["id"] if entry["row"] is None else entry["row"]
                kinds[key] = kind_of(entry["reason"])
    return Counter(kinds.values())
