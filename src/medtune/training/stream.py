"""Train from shards that are read as the training goes: no converted folder, no second copy.

Transformers can train on a stream, but not go on in one: it reads all that was trained on once more
to throw it away, and the ranks may run out of records at different steps. Here torchdata's
`StatefulDataLoader` notes with each checkpoint how far every loader process of every rank has come,
each rank has the same number of batches, and their number is known, so that epochs and schedules
are those of a folder.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from torchdata.stateful_dataloader import StatefulDataLoader
from trl import SFTConfig

from medtune.files import one_line, write_json
from medtune.records import RecordStream, ShardIndex, index_shards

from .settings import ScriptArguments

# Records that are looked at before the first step.
LOOKED_AT = 256

# What decides which record comes next: a state is worth nothing where one of them differs.
DECIDING = ("data", "seed", "buffer", "batch_size", "ranks", "workers")


def open_streams(
    script_args: ScriptArguments, training_args: SFTConfig
) -> tuple[RecordStream, datasets.Dataset | None]:
    """Open the shards that `data` names: a stream to train on, and records to evaluate on.

    Parameters
    ----------
    script_args, training_args : see `parse_arguments`.

    Raises
    ------
    ValueError, OSError : in one line: no such shards, no rows, too many that cannot be used.
    """
    index = _agree_on_index(script_args, training_args)
    train = _stream_of(index, "train", script_args, training_args)
    if training_args.eval_strategy == "no":
        return train, None
    held_out = _stream_of(index, "validation", script_args, training_args)
    return train, held_out.first(script_args.eval_samples, seed=training_args.seed)


def _agree_on_index(script_args: ScriptArguments, training_args: SFTConfig) -> ShardIndex:
    """Let rank 0 look over the shards, and tell all ranks what it found, or why it did not."""
    found: ShardIndex | Exception | None = None
    if training_args.process_index == 0:
        try:
            found = index_shards(
                script_args.data,
                splits=script_args.splits,
                split_by=script_args.split_by,
                seed=script_args.question_seed,
                most_rejected=script_args.most_rejected,
            )
        except (OSError, ValueError) as error:
            found = error
    found = broadcast_object_list([found])[0]
    if isinstance(found, Exception):
        raise found
    return found


def _stream_of(
    index: ShardIndex, split: str, script_args: ScriptArguments, training_args: SFTConfig
) -> RecordStream:
    return RecordStream(
        index,
        split,
        questions=script_args.questions,
        language=script_args.language,
        system_prompt=script_args.system_prompt,
        magnify=script_args.magnify,
        seed=script_args.question_seed,
        rejected=Path(training_args.output_dir) / "rejected",
        most_rejected=script_args.most_rejected,
    )


@contextlib.contextmanager
def steps_known(training_args: SFTConfig) -> Iterator[None]:
    """Let a trainer be made of a stream without `max_steps`: the loader knows its length later."""
    own = training_args.max_steps
    if own <= 0:
        training_args.max_steps = 1
    try:
        yield
    finally:
        training_args.max_steps = own


class ShardLoader:
    """The batches of one rank, epoch after epoch; a trainer takes it for a data loader.

    Parameters
    ----------
    stream : the records of all ranks.
    script_args, training_args : see `parse_arguments`.
    collate : makes a batch of rows.
    """

    # what Transformers asks of a loader when it goes on in the middle of an epoch
    batch_size = None
    drop_last = False
    prefetch_factor = None

    def __init__(
        self,
        stream: RecordStream,
        script_args: ScriptArguments,
        training_args: SFTConfig,
        collate: Callable[[list[dict]], dict],
    ):
        self.stream = stream
        self.args = training_args
        self.buffer = script_args.shuffle_buffer
        self.seed = training_args.data_seed or training_args.seed
        self.collate = _Collate(collate, stream, _length_that_cuts(script_args, training_args))
        self.epoch = 0
        self.dataset = _Epoch(self)
        self._done = 0
        self._loader: StatefulDataLoader | None = None
        self._state: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Number of batches of an epoch, the same on all ranks."""
        return self.stream.batches(self.args.per_device_train_batch_size, self.args.world_size)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; it decides the order."""
        self.epoch = epoch

    def batches(self) -> Iterator[dict]:
        """Yield the batches of an epoch.

        Where a state was loaded, an empty batch stands for each that was trained on already:
        Transformers skips as many, and they are not read again.
        """
        self._loader = self._open()
        self._done = 0
        if self._state is not None and self._state["epoch"] == self.epoch:
            self._loader.load_state_dict(self._state["loader"])
            for _ in range(self._state["done"]):
                self._done += 1
                yield {}
        self._state = None
        rows = iter(self._loader)
        while self._done < len(self):
            # where records were left out, or another rank has a batch more, one that does not count
            batch = next(rows, None) or self._uncounted()
            self._done += 1
            yield batch

    def _open(self) -> StatefulDataLoader:
        """Make the loader of an epoch."""
        args = self.args
        workers = args.dataloader_num_workers
        seed = self.seed if self.buffer > 1 else None
        windows = self.stream.windows(
            buffer=max(self.buffer, 1),
            seed=seed,
            epoch=self.epoch,
            batch_size=args.per_device_train_batch_size,
            rank=args.process_index,
            ranks=args.world_size,
            workers=max(workers, 1),
        )
        records = self.stream.records(
            windows, seed=seed, epoch=self.epoch, workers=max(workers, 1), decode=False
        )
        with warnings.catch_warnings():
            # torchdata 0.11 calls what torch 2.13 calls old
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")
            return StatefulDataLoader(
                records,
                batch_size=args.per_device_train_batch_size,
                collate_fn=self.collate,
                num_workers=workers,
                pin_memory=args.dataloader_pin_memory,
                prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            )

    def _uncounted(self) -> dict:
        """Make a batch none of whose tokens has a part in the loss."""
        batch = self.collate.own([dict(self.stream.first(1)[0])])
        batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch

    # --- go on

    def _decides(self) -> dict[str, Any]:
        values = (
            self.stream.index.digest,
            self.seed,
            self.buffer,
            self.args.per_device_train_batch_size,
            self.args.world_size,
            self.args.dataloader_num_workers,
        )
        return dict(zip(DECIDING, values, strict=True))

    def save(self, checkpoint: Path) -> None:
        """Note in a checkpoint how far this rank has come."""
        state = {
            "decides": self._decides(),
            "epoch": self.epoch,
            "done": self._done,
            "loader": self._loader.state_dict() if self._loader is not None else None,
        }
        checkpoint.mkdir(parents=True, exist_ok=True)
        write_json(checkpoint / self._name(), state)

    def load(self, checkpoint: Path) -> None:
        """Go on from where a checkpoint notes that this rank was.

        Raises
        ------
        ValueError : the note is of other shards, or of other settings that decide what comes next.
        OSError : there is no note.
        """
        file = checkpoint / self._name()
        try:
            state = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read ({one_line(error)}): a stream goes on with as many ranks as "
                "it began with; choose another output_dir to begin anew"
            ) from None
        now = self._decides()
        changed = [key for key in DECIDING if state["decides"].get(key) != now[key]]
        if changed:
            before = ", ".join(f"{key} {state['decides'].get(key)}" for key in changed)
            raise ValueError(
                f"{checkpoint} is of a stream with {before[:200]}: only with the same does it go on "
                "with the next record; choose another output_dir to begin anew"
            )
        self.epoch = state["epoch"]
        self._state = state

    def _name(self) -> str:
        return f"stream-{self.args.process_index}.json"


class _Epoch(torch.utils.data.IterableDataset):
    """What a `ShardLoader` calls its data set: Transformers makes a loader of it to skip batches.

    Its length is the number of records, as that of any data set.
    """

    def __init__(self, loader: ShardLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader.stream)

    def __iter__(self) -> Iterator[dict]:
        return self.loader.batches()


def _length_that_cuts(script_args: ScriptArguments, training_args: SFTConfig) -> int | None:
    return None if script_args.allow_cut_answers else training_args.max_length


class _Collate:
    """Collates rows, and leaves out those that cannot be trained on, as a conversion does.

    Parameters
    ----------
    own : makes a batch of rows; raises where it cannot.
    stream : lists what is left out.
    max_length : tokens from which an answer is cut, if that is not allowed.
    """

    def __init__(
        self, own: Callable[[list[dict]], dict], stream: RecordStream, max_length: int | None
    ):
        self.own = own
        self.stream = stream
        self.max_length = max_length

    def __call__(self, rows: list[dict]) -> dict | None:
        """Collate rows; None where none of them is left."""
        try:
            batch = self.own(rows)
            if not self._cuts(batch):
                return batch
        # with little memory another try makes it worse
        except MemoryError:
            raise
        except Exception:
            pass
        good = [row for row in rows if self._stands(row)]
        return self.own(good) if good else None

    def _cuts(self, batch: dict) -> bool:
        """Say whether a row fills the length to which it may have been cut."""
        if not self.max_length:
            return False
        return bool((batch["attention_mask"].sum(1) >= self.max_length).any())

    def _stands(self, row: dict) -> bool:
        """Say whether a row can be trained on alone; list it if not."""
        reason = ""
        try:
            if self._cuts(self.own([row])):
                reason = f"record: max_length={self.max_length} cuts its answer"
        except MemoryError:
            raise
        except Exception as error:  # processors raise many kinds
            reason = f"record: {one_line(error)}"
        if reason:
            self.stream.left_out.add(None, row["id"], reason)
        return not reason
