"""What collators that stand around TRL's have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


class AroundCollator:
    """A collator around another one.

    Parameters
    ----------
    collate : the collator inside, which makes a batch of rows.
    processor : of the model; it stays this one when the collator inside gets another.
    """

    def __init__(self, collate: Callable[[list[dict]], dict], processor: Any):
        self.collate = collate
        self.own_processor = processor

    @property
    def processor(self) -> Any:
        """The processor of TRL's collator, which `send_bytes` and `cache_features` replace."""
        return self.collate.processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self.collate.processor = processor


def rows_without(rows: list[dict], columns: Collection[str]) -> list[dict]:
    """Copy rows without some columns: collators may change the rows they get."""
    return [{key: row[key] for key in row if key not in columns} for row in rows]
