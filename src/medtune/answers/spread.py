"""Let the machines of a Ray cluster answer a data set together, into one file.

Only the process that asks writes: a batch that two machines have answered, because one was taken for
lost, stands in the file once. Pictures travel with the questions, so that the machines need to see
no disk but that of the model.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from medtune import models
from medtune.cluster import Cluster, join_cluster, name_failed
from medtune.files import only_writer
from medtune.pairs import picture_bytes

from .generate import Batch, generate_answers, make_batches, settings_of
from .prompts import survey_rows, undecoded
from .resume import append, digest_of, resume


@dataclass(frozen=True)
class Tuned:
    """A model as every machine of a cluster can load it.

    Attributes
    ----------
    base
        Folder or hub name of the base or merged model.
    adapter
        Folder of an adapter on it, if any.
    dtype
        Number type of the weights; by default that of the model, and bfloat16 on a GPU.
    """

    base: str
    adapter: str | None = None
    dtype: str | None = None


def answer_on_cluster(  # noqa: PLR0913 - each is a setting of its own, given by keyword
    tuned: Tuned,
    dataset: Any,
    *,
    ray: str,
    out: str | Path,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    question: str | None = None,
    image_transform: Callable | None = None,
) -> list[dict[str, Any]]:
    """Answer every sample of a data set greedily, on the machines of a Ray cluster.

    The answers are those of `generate_answers`, which may go on with the same file, and the other
    way round.

    Parameters
    ----------
    tuned : the model, which all machines find under the same name.
    dataset : as `generate_answers` takes it.
    ray : address of the cluster, HOST:PORT. Each process of it has one GPU, or one processor where
        the cluster has no GPUs.
    out : JSON Lines file to write, and to go on from.
    batch_size, max_new_tokens, question, image_transform : as `generate_answers` takes them; a
        transform is a function of a module.

    Returns
    -------
    list of dict : as `generate_answers` gives them, in the order of the data set.

    Raises
    ------
    ValueError : as `generate_answers` says; or a batch could not be answered: it is named, and the
        others are in the file.
    OSError : `out` cannot be written, or there is no cluster.

    Examples
    --------
    >>> answer_on_cluster(Tuned("data/tiny-vlm"), test, ray="10.0.0.1:6379", out="a.jsonl")  # doctest: +SKIP
    """
    processor = models.load_processor(tuned.adapter or tuned.base)
    survey = survey_rows(dataset, processor, question)
    out = Path(out)
    with only_writer(out, f"out={out}"), join_cluster(ray) as cluster:
        settings = settings_of(
            _digest_there(cluster, tuned),
            digest_of(processor),
            survey,
            image_transform=image_transform,
            max_new_tokens=max_new_tokens,
        )
        done = resume(out, settings)
        options = {
            "question": question,
            "max_new_tokens": max_new_tokens,
            "image_transform": image_transform,
        }
        batches = make_batches(survey, done, batch_size, keep_all=False)
        ids = [sample["id"] for sample in survey.samples]

        def take(name: str, answers: list[dict[str, Any]]) -> None:
            append(out, answers)
            done.update({answer["id"]: answer for answer in answers})

        jobs = _jobs_of(batches, undecoded(dataset), ids, (tuned, options))
        failed = cluster.each(_answer, jobs, take, title="Answering batches")
    if failed:
        what = name_failed(failed, len(batches), "batches were not answered")
        raise ValueError(f"{what}; the others are in {out}, and the same call goes on with these")
    return [done[name] for name in ids]


def _digest_there(cluster: Cluster, tuned: Tuned) -> str:
    """Load the model on one of the machines, and give what tells it from others."""
    digests = {}
    failed = cluster.each(_digest, {"model": (tuned,)}, digests.__setitem__, title="Loading")
    if failed:
        raise ValueError(f"{tuned.base} cannot be loaded on the cluster: {failed['model']}")
    return digests["model"]


def _jobs_of(
    batches: Sequence[Batch], rows: Any, ids: Sequence[str], rest: tuple
) -> Iterator[tuple[str, tuple]]:
    """Yield the arguments of each batch, with the bytes of its pictures."""
    for batch in batches:
        there = []
        for number in batch.rows:
            # an id of its own: on the other side the row has another number
            row = dict(rows[number]) | {"id": ids[number]}
            if "image" in row:
                row["image"] = _as_bytes(row["image"])
            if row.get("images"):
                row["images"] = [_as_bytes(picture) for picture in row["images"]]
            there.append(row)
        yield f"the batch of id {ids[batch.rows[0]]}", (there, *rest)


def _as_bytes(picture: Any) -> Any:
    """Give a picture without the path that it has here; one that is decoded stays so."""
    if isinstance(picture, Mapping):
        return {"bytes": picture_bytes(picture), "path": None}
    return picture


# ---- on one of the machines


@functools.lru_cache(maxsize=1)
def _load(tuned: Tuned) -> tuple[Any, Any]:
    """Load model and processor, once in a process."""
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options = {"dtype": "bfloat16", "device_map": {"": "cuda"}}
    if tuned.dtype:
        options["dtype"] = tuned.dtype
    model = models.load_base(tuned.base, **options)
    if tuned.adapter is not None:
        model = models.load_tuned(model, tuned.adapter)
    return model, models.load_processor(tuned.adapter or tuned.base)


def _digest(tuned: Tuned) -> str:
    return digest_of(_load(tuned)[0])


def _answer(
    rows: list[dict[str, Any]], tuned: Tuned, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Answer one batch."""
    model, processor = _load(tuned)
    for row in rows:
        if "image" in row:
            row["image"] = _decoded(row["image"])
        if row.get("images"):
            row["images"] = [_decoded(picture) for picture in row["images"]]
    return generate_answers(
        model, processor, rows, batch_size=len(rows), over_ranks=False, workers=0, **options
    )


def _decoded(picture: Any) -> Any:
    return datasets.Image().decode_example(picture) if isinstance(picture, Mapping) else picture
