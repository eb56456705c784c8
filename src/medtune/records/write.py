"""Write image-text pairs as pictures and training records.

A folder holds `images/`, one JSON Lines file a split, `dataset_info.json` (for LLaMA-Factory),
`rejected.jsonl` (what was left out, and why) and `convert.json` (settings, counts). How a killed
run goes on where it stopped is told in `medtune.records.progress`.
"""

import contextlib
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from tqdm.auto import tqdm

from medtune.captions import detect_language
from medtune.files import one_line
from medtune.pairs import names_group

from .dialects import (
    DIALECTS,
    MARK,
    QUESTIONS,
    Turn,
    dataset_columns,
    make_record,
    question_with_marks,
    read_turns,
)
from .judge import Judge, Pair
from .progress import KINDS, Folder, Progress, Settings
from .read import read_placed
from .reasons import kind_of, public_id, public_reason
from .sources import (
    TEXT,
    Source,
    copied_columns,
    find_repeated_ids,
    left_out_columns,
    open_source,
    read_blocks,
)
from .splits import Chosen, choose_splits

DEFAULT_QUESTIONS = (QUESTIONS[0], QUESTIONS[3])  # one in English and one in Chinese


def convert_pairs(  # noqa: PLR0913 - each is a setting that a user may want to change alone
    source: Any,
    out: str | os.PathLike,
    *,
    dialect: str = "prompt-completion",
    questions: str | Sequence[str] | None = None,
    language: str = "en",
    system_prompt: str | None = None,
    text_only: str | os.PathLike | None = None,
    share: float = 0.1,
    pictures_per_sample: int = 1,
    magnify: bool = False,
    splits: Sequence[str] | str | os.PathLike | None = None,
    split_by: str | None = None,
    keep: Sequence[str] = (),
    jpeg_quality: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    ray: str | None = None,
) -> dict:
    """Write pairs as pictures and training records.

    The same call goes on with a killed run, and leaves a finished one alone. JPEG and PNG in RGB or
    grey are copied without being decoded, but for EXIF, comments and the like, which are cut off;
    others become upright RGB PNG. Parquet shards are read directly,
    with flat memory. The result depends neither on `workers` nor on a restart, nor on `ray`.

    Parameters
    ----------
    source : a `datasets.Dataset` of pairs, or what `medtune.pairs.load_pairs` takes.
    out : the folder to write, new or empty.
    dialect : "prompt-completion" (TRL), "messages" (role, content), "sharegpt" (conversations with
        from, value, spoken by human and gpt) or "conversations" (the same by user and assistant).
    questions : one question, or several to draw from by id and seed, such as `QUESTIONS`; it is in
        the language of the caption if there is one in it. They are asked of every row. By default a
        row is asked its own `question`, and one without gets one of ours. The picture comes before
        the question, or after one that ends with `MARK`.
    language : "en" takes `caption`; "zh" takes `caption_zh`, or a Chinese `caption`, and rejects
        pairs that have neither.
    system_prompt : said before each question about pictures.
    text_only : JSON Lines of dialogues without pictures, to be mixed into the train split.
    share : the share of these dialogues in the train split, from 0 to below 1.
    pictures_per_sample : up to so many neighbouring rows of one `group`, about which the same is
        asked, make one sample, with all their captions. Rows of a slab (see `slab` of
        `medtune.pairs.load_pairs`) make one sample in any case, all of them or none.
    magnify : show the region of interest, which the column `roi` says, once more as a second
        picture, as large as the first; rows without one are rejected.
    splits : "train", "validation" or "test" for each row; or a CSV with the columns id, split and
        perhaps group, as `medtune audit --write FILE` writes it. By default the column `split` says
        it, or else the name of the shard.
    split_by : "patient" deals the groups out, 80% of the rows for training and 10% each for
        validation and test; "none" does not. By default that is done where groups are known and no
        split; rows without a group are then rejected.
    keep : names of columns that go into the records besides those that the course knows (group,
        question, roi, has_box, shows, slice, structure, window, modality, fields, and those of a
        slab). All others stay out: a table may hold names and ages.
    jpeg_quality : make pictures that cannot be copied JPEG of this quality, 1 to 95; None makes
        them PNG.
    seed : decides which questions are drawn and in which order dialogues come.
    workers : threads for pictures that must be decoded; by default one a core.
    strict : stop at the first bad pair instead of listing it in `rejected.jsonl`.
    overwrite : replace a conversion with other settings.
    ray : address of a Ray cluster, HOST:PORT, whose machines convert a parquet shard each. Source
        and `out` lie on a disk that all of them see under the same name.

    Returns
    -------
    dict : the dialect; `rows` of the source, of which each is among the `pairs` that became records
        or `rejected`, and the `reasons` by kind; `records` of each split (with
        `pictures_per_sample` a record holds several pairs); dialogues without pictures,
        `text_only`, and `text_only_rejected`; pictures `copied`, those of them `stripped` of EXIF
        and the like, and `converted`; `split_by`, where the splits come from: "patient", "given",
        "source" or "none"; `unknown_groups`, how many rows name no patient or other group;
        `columns_left_out`, and the `splits_unused` of a CSV.

    Raises
    ------
    ValueError : settings, source or folder are wrong, or (if `strict`) a pair is; or a shard could
        not be converted on the cluster: it is named, and the others are done.
    OSError : a file cannot be read, the folder cannot be written, or there is no cluster.

    Examples
    --------
    >>> import datasets, pathlib, tempfile, PIL.Image
    >>> rows = {"image": [PIL.Image.new("L", (8, 8))], "id": ["a"], "caption": ["A black square."]}
    >>> pairs = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    >>> convert_pairs(pairs, pathlib.Path(tempfile.mkdtemp()) / "out")["records"]
    {'train': 1}
    """
    asked = list_questions(questions)
    check_words(dialect, language, asked)
    _check_numbers(share, pictures_per_sample, magnify=magnify)
    opened = open_source(source)
    if not opened.rows:
        raise ValueError("the source holds no pairs")
    chosen = choose_splits(opened, splits, split_by, seed)
    if chosen.groups:
        opened.types["group"] = TEXT
    _check_groups(opened, pictures_per_sample)
    check_regions(opened.types, magnify=magnify)
    _check_slabs(opened, pictures_per_sample, magnify=magnify)
    if ray:
        # it needs what stands in this module
        from .spread import check_spread, convert_on_cluster

        check_spread(opened, ray, pictures_per_sample)
    columns = copied_columns(opened.types, keep)

    settings = Settings(
        dialect=dialect,
        questions=[(text, detect_language(text)) for text in asked],
        asked_of_all=bool(questions),
        language=language,
        system_prompt=system_prompt,
        share=share,
        pictures_per_sample=pictures_per_sample,
        seed=seed,
        jpeg_quality=jpeg_quality,
        columns=dataset_columns(dialect, with_history=bool(system_prompt or text_only)),
        text_only=_hash_of_file(text_only),
        source=opened.identity,
        splits=_hash_of_splits(chosen),
        split_by=split_by,
        keep=sorted(keep),
        magnify=magnify,
    )
    folder = Folder(Path(out).expanduser(), settings.as_job())
    with folder.explain_no_room():
        notes = folder.open(overwrite=overwrite)
        if notes and "summary" in notes:
            folder.remove_work()
            return notes["summary"]
        progress = Progress.from_notes(notes["progress"]) if notes else Progress()
        folder.begin(progress)

        judge = Judge(settings, chosen, find_repeated_ids(opened), opened.rows)
        writer = Writer(settings, folder, progress, columns, strict)
        with writer.open_files():
            if text_only:
                writer.load_dialogues(Path(text_only))
            if ray:
                convert_on_cluster(opened, judge, writer, ray)
            else:
                convert_blocks(opened, judge, writer, workers or os.cpu_count())

        types = datasets.Features({name: opened.types[name] for name in columns})
        told = {
            "split_by": chosen.by,
            "splits_unused": chosen.unused,
            "unknown_groups": chosen.unknown_groups,
            "columns_left_out": left_out_columns(opened.types, columns),
        }
        return folder.finish(progress, rows=opened.rows, features=types.to_dict(), told=told)


def list_questions(questions: str | Sequence[str] | None) -> list[str]:
    """List the questions to draw from: those of the caller, or else ours."""
    if isinstance(questions, str):
        return [questions]
    return list(questions or DEFAULT_QUESTIONS)


def check_words(dialect: str, language: str, questions: list[str]) -> None:
    """Raise `ValueError` for a dialect, a language or a question that cannot be."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect={dialect} is none of {', '.join(DIALECTS)}")
    if language not in ("en", "zh"):
        raise ValueError(f"language={language} is neither en nor zh")
    for text in questions:
        words = text.removeprefix(MARK).removesuffix(MARK)
        marks = text.count(MARK)
        if not words.strip() or MARK in words or marks > 1:
            raise ValueError(
                f"a question must be a text, with {MARK} at its beginning or end or without it, "
                f"not {text!r:.50}"
            )


def _check_numbers(share: float, pictures_per_sample: int, *, magnify: bool) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is not from 0 to below 1")
    if pictures_per_sample < 1:
        raise ValueError(f"pictures_per_sample={pictures_per_sample} is not 1 or more")
    if magnify and pictures_per_sample > 1:
        raise ValueError(
            f"magnify=True shows one region, but pictures_per_sample={pictures_per_sample}: "
            "give one of the two"
        )


def check_regions(types: Mapping[str, Any], *, magnify: bool) -> None:
    """Raise `ValueError` where regions are to be magnified that no column names."""
    if magnify and "roi" not in types:
        raise ValueError(
            "magnify=True needs a column `roi` with the box of each region: "
            "name it with columns={'roi': 'NAME'}"
        )


def _check_groups(source: Source, pictures_per_sample: int) -> None:
    if pictures_per_sample > 1 and "group" not in source.types:
        raise ValueError(
            f"pictures_per_sample={pictures_per_sample} needs a column `group` that says which "
            "pictures belong together: name it with columns={'group': 'NAME'}"
        )


def _check_slabs(source: Source, pictures_per_sample: int, *, magnify: bool) -> None:
    """Refuse a number of pictures, or one more, where each slab brings its own."""
    if "slab" not in source.types or "slices" not in source.types:
        return
    if pictures_per_sample > 1:
        raise ValueError(
            f"pictures_per_sample={pictures_per_sample} does not go with slabs, each of which is "
            "one sample already: leave it out"
        )
    if magnify:
        raise ValueError("magnify=True shows a region of one picture, not of a slab: leave it out")


def _hash_of_file(file: str | os.PathLike | None) -> str | None:
    if not file:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _hash_of_splits(chosen: Chosen) -> str | None:
    if chosen.by != "given":
        return None
    told = json.dumps([chosen.splits, chosen.groups])
    return hashlib.sha256(told.encode()).hexdigest()


def convert_blocks(source: Source, judge: Judge, writer: "Writer", workers: int | None) -> None:
    """Convert all rows that are not done yet, and note the progress after every block."""
    progress = writer.progress
    done = progress.row
    gatherer = Gatherer(writer.settings.pictures_per_sample)
    bar = tqdm(total=source.rows, initial=done - source.first, unit="pair", delay=3)
    with ThreadPoolExecutor(workers) as pool, bar:
        again = min(progress.waiting.values(), default=done)
        for block in read_blocks(source, again):
            if block.numbers.stop <= done:
                # Done but for the pairs of it that still wait for more of their sample.
                _wait_again(judge.accept(block, pool, _reject_nothing), gatherer, progress.waiting)
                continue
            for pair in judge.accept(block, pool, writer.reject):
                for sample in gatherer.add(pair):
                    writer.write_sample(sample)
            writer.note(block.numbers, gatherer.waiting_rows())
            bar.update(len(block.numbers))
        for sample in gatherer.finish():
            writer.write_sample(sample)
        writer.note(range(source.stop, source.stop), [])


def _wait_again(pairs: Iterator[Pair], gatherer: "Gatherer", waiting: dict[int, int]) -> None:
    for pair in pairs:
        if pair.number in waiting:
            gatherer.add(pair)


def _reject_nothing(number: int, sample_id: object, reason: str) -> None:
    """Take notice of a row that is rejected already."""


def pictures_of_slab(pair: Pair) -> int | None:
    """Say how many pictures the slab of a pair has; None where it belongs to none."""
    slices = pair.cells.get("slices")
    if pair.cells.get("slab") is None or not isinstance(slices, list):
        return None
    return len(slices)


@dataclass
class Gatherer:
    """Puts neighbouring pairs of one group or slab into samples, those with the same question
    together.

    pictures : how many pictures a sample has at most, where the source has no slabs.
    series : split and group, or slab, of the pairs that wait.
    waiting : the pairs that wait for more of their kind, by their own question.
    """

    pictures: int
    series: tuple | None = None
    waiting: dict[str | None, list[Pair]] = field(default_factory=dict)

    def add(self, pair: Pair) -> list[list[Pair]]:
        """Take a pair, and give the samples that are complete by now."""
        group = pair.cells.get("group")
        pictures = pictures_of_slab(pair)
        series: tuple = (pair.split, group)
        if pictures is not None:
            series = (pair.split, "slab", pair.cells["slab"])
        elif self.pictures == 1 or not names_group(group):
            return [*self.finish(), [pair]]
        complete = []
        if series != self.series:
            complete = self.finish()
            self.series = series
        # Slices without a question of their own belong together, whatever was drawn for each.
        key = pair.question if pair.own_question else None
        sample = self.waiting.setdefault(key, [])
        sample.append(pair)
        if len(sample) == (pictures or self.pictures):
            complete.append(self.waiting.pop(key))
        return complete

    def waiting_rows(self) -> list[int]:
        """Give the numbers of the rows that wait."""
        rows: list[int] = []
        for sample in self.waiting.values():
            rows += [pair.number for pair in sample]
        return rows

    def finish(self) -> list[list[Pair]]:
        """Give the samples that nothing will be added to any more."""
        rest = list(self.waiting.values())
        self.waiting = {}
        self.series = None
        return rest


@dataclass
class Writer:
    """Writes samples into the growing files, and counts them.

    settings : what the conversion was asked to do.
    folder : where it writes.
    progress : what is written so far.
    columns : the columns that go into the records as they are.
    strict : whether a bad pair ends the conversion.
    files : the open files of records, by split and "rejected".
    dialogues : id and turns of the dialogues without pictures, in the order they will be written.
    """

    settings: Settings
    folder: Folder
    progress: Progress
    columns: list[str]
    strict: bool
    files: dict[str, BinaryIO] = field(default_factory=dict)
    dialogues: list[tuple[str, list[Turn]]] = field(default_factory=list)

    @contextlib.contextmanager
    def open_files(self) -> Iterator[None]:
        """Keep the files of records open, each from where the progress says that it goes on."""
        with contextlib.ExitStack() as stack:
            for kind in KINDS:
                file = self.folder.open_growing(kind, self.progress.sizes.get(kind, 0))
                self.files[kind] = stack.enter_context(file)
            yield

    def reject(self, number: int | None, sample_id: object, reason: str) -> None:
        """List what is left out, or raise ValueError if the caller wants all pairs to be good."""
        shown = public_id(sample_id)
        reason = public_reason(reason, sample_id)
        if self.strict:
            raise ValueError(f"row {number}, id {str(shown)[:100]!r}: {reason}")
        entry = {"id": shown, "row": number, "reason": reason}
        self.files["rejected"].write(json.dumps(entry).encode() + b"\n")
        self.progress.reasons[kind_of(reason)] += 1
        if number is None:
            self.progress.text_only_rejected += 1
        else:
            self.progress.rejected += 1

    def load_dialogues(self, file: Path) -> None:
        """Read the dialogues without pictures, and put them into an order that the seed decides."""
        dialogues = []
        for place, record in read_placed(file):
            turns, problems = read_turns(record, 0)
            line = place.rpartition(":")[2]
            if not problems:
                dialogues.append((f"text-only-{line}", turns))
            elif self.progress.row == 0:  # a run that goes on has listed it before
                self.reject(None, place, f"dialogue: {problems[0].text}")
        random.Random(self.settings.seed).shuffle(dialogues)
        self.dialogues = dialogues

    def write_sample(self, pairs: list[Pair]) -> None:
        """Write the pictures and the record of a sample, then the dialogues that are due."""
        wanted = pictures_of_slab(pairs[0])
        if wanted is not None and len(pairs) != wanted:
            # half a slab would be taken for a whole one
            for pair in pairs:
                reason = f"slab: {wanted - len(pairs)} of its {wanted} pictures were left out"
                self.reject(pair.number, pair.cells["id"], reason)
            return
        try:
            line = self._sample_line(pairs)
        except ValueError as error:  # a value that JSON cannot hold, such as NaN in a list
            for pair in pairs:
                self.reject(pair.number, pair.cells["id"], f"record: {one_line(error)}")
            return

        for pair in pairs:
            self.folder.write_picture(pair.file_name, pair.picture.data)
            if pair.picture.copied:
                self.progress.copied += 1
                self.progress.stripped += pair.picture.stripped
            else:
                self.progress.converted += 1
            if pair.magnified:
                self.folder.write_picture(pair.magnified_name, pair.magnified.data)
        self.progress.pairs += len(pairs)
        split = pairs[0].split
        self.files[split].write(line)
        self.progress.samples[split] += 1
        self.write_due_dialogues()

    def _sample_line(self, pairs: list[Pair]) -> bytes:
        first = pairs[0]
        sample_id = first.cells["id"]
        if len(pairs) > 1:
            sample_id += f"+{len(pairs) - 1}"
        images = [f"images/{pair.file_name}" for pair in pairs]
        if first.magnified:
            images.append(f"images/{first.magnified_name}")
        # Neighbouring slices often have the same caption, which is then said once.
        captions = dict.fromkeys(pair.caption for pair in pairs)
        turns = [
            ("user", question_with_marks(first.question, len(images))),
            ("assistant", "\n".join(captions)),
        ]
        if self.settings.system_prompt:
            turns.insert(0, ("system", self.settings.system_prompt))
        return self._line(sample_id, turns, images, self._common_cells(pairs))

    def _common_cells(self, pairs: list[Pair]) -> dict:
        """Give the other columns of a sample, with None where its pairs differ."""
        first = pairs[0].cells
        common = {}
        for name in self.columns:
            value = first[name]
            # The first is compared with itself too: NaN, which JSON lacks, differs and is left out.
            same = all(pair.cells[name] == value for pair in pairs)
            common[name] = value if same else None
        return common

    def _line(self, sample_id: str, turns: list[Turn], images: list[str], cells: dict) -> bytes:
        record = make_record(
            sample_id,
            turns,
            images,
            dialect=self.settings.dialect,
            with_history=self.settings.with_history,
        )
        return json.dumps(record | cells, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def write_due_dialogues(self) -> None:
        """Write as many dialogues as their share asks for by now: they are spread evenly."""
        share = self.settings.share
        due = int(self.progress.samples["train"] * share / (1 - share) + 0.5)
        # Counted anew after every sample, so that a restart comes to the same places.
        for sample_id, turns in self.dialogues[self.progress.text_only : due]:
            no_cells = dict.fromkeys(self.columns)
            self.files["train"].write(self._line(sample_id, turns, [], no_cells))
            self.progress.text_only += 1

    def note(self, rows: range, waiting: list[int]) -> None:
        """Note that these rows and all before them are done, but for those that wait."""
        for kind, file in self.files.items():
            # Only then is the noted size true after a kill.
            file.flush()
            self.progress.sizes[kind] = file.tell()
        self.progress.row = rows.stop
        begins = self.progress.waiting
        # Those that are not in this block have waited before.
        self.progress.waiting = {number: begins.get(number, rows.start) for number in waiting}
        self.folder.note(self.progress)
