"""Ask a vision-language model about every sample of a data set, and sum up how fast it answered.

`generate_answers` is greedy unless told otherwise. With `out` every answer is on disk as soon as
its batch is done, and a run that was killed goes on where it stopped. The controls of an evaluation
use the same function, with other pictures.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from medtune.files import one_line, only_writer

from .backends import ServerBackend, TransformersBackend, VllmBackend
from .prompts import Preparer, Survey, survey_rows
from .ranks import find_ranks
from .resume import append, digest_of, resume
from .server import Generated

# Rows that are prepared at once, so that many worker processes can share a large batch.
ROWS_PER_PART = 32
# To compile decoding takes about a minute; from so many batches times tokens on it pays.
COMPILING_PAYS_FROM = 3000

# Of these torch has no class of its own: what malloc, mmap, fork and oneDNN say.
NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a",
)


def generate_answers(  # noqa: PLR0913 - each is a setting of its own, given by keyword
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    out: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    seed: int = 0,
    image_transform: Callable | None = None,
    pictures_from: Sequence[int] | None = None,
    question: str | None = None,
    backend: str = "transformers",
    cache_implementation: str | None = "auto",
    workers: int | None = None,
    over_ranks: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answer every sample of a data set.

    Under torchrun all processes answer together, each with a model on its own device, and each
    returns all answers.

    In float32 a greedy answer depends neither on the batch size nor on the order; in bfloat16 near
    ties may tip.

    Parameters
    ----------
    model, processor
        Model on its device, with or without adapter (it is left in evaluation mode), and its
        processor. For vLLM the model is a folder, a hub id or a `vllm.LLM`; for a server it is an
        `OpenAIServer`, and the processor is not used.
    dataset
        `datasets.Dataset` or list of dicts: converted records (`prompt`, `completion`, `images`),
        or pairs (`image`, `caption`). Neither needs a reference, `completion` or `caption`. `id`
        must be unique; without it the row number is taken.
    out
        JSON Lines file to write, and to go on from. The settings stand beside it in
        `<name>.settings.json`.
    batch_size
        Samples a batch, of similar prompt length, longest first.
    max_new_tokens
        Most tokens an answer.
    do_sample, seed
        Draw tokens instead of taking the likeliest; the same seed and batch size give the same
        answers again.
    image_transform
        Function of a PIL picture that returns the picture to show instead, or None for no picture.
    pictures_from
        For each sample the row whose pictures it is shown.
    question
        What all pairs are asked. By default each is asked its own `question`, and one that has none
        to describe the picture. Records bring their own question.
    backend
        "transformers", "vllm" (which does its own batching: give it a batch size of several
        hundred) or "openai", a server that speaks OpenAI's API, such as `medtune serve`.
    cache_implementation
        "static" compiles decoding on a GPU, which takes about a minute; "auto" does so where
        batches times tokens are 3,000 or more, so many that it pays.
    workers
        Processes that prepare pictures: by default up to 8 for a GPU, else none.
    over_ranks
        Under torchrun, share the samples out over all processes, which must all call this. If
        False, each call answers everything alone.
    **options
        For `model.generate` (`temperature`, `min_new_tokens` ...) or `vllm.SamplingParams`.

    Returns
    -------
    list of dict
        In the order of the data set: "id", "question", "answer", "reference" (str, empty without
        one), "group" and "slice" where the data set knows them, "tokens" (generated, the end token
        too) and "seconds" (its share of the batch's time). `generation_speed` sums them up.

    Raises
    ------
    ValueError
        An empty data set, a data set that streams, an id that repeats, `pictures_from` that does
        not fit, `out` made with other settings, damaged or being written by another call, a
        `backend` that there is not.
    OSError
        `out` cannot be written, memory does not suffice.
    ImportError
        `backend="vllm"` without vLLM.

    Examples
    --------
    >>> answers = generate_answers(model, processor, test, out="answers.jsonl")  # doctest: +SKIP
    >>> generate_answers("a folder", None, iter([{"image": None, "caption": ""}]))
    Traceback (most recent call last):
    ValueError: the data set streams: take a part of it, ...
    """
    _check_asked(backend, dataset)
    if backend == "openai":
        processor = None  # the server prepares questions and pictures
    survey = survey_rows(dataset, processor, question)
    donors = _check_donors(pictures_from, len(survey.samples))
    # vLLM and a server spread the work themselves
    ranks = find_ranks(over_ranks=over_ranks and backend == "transformers")
    done = {}
    with ExitStack() as held:
        if out is not None:
            settings = settings_of(
                digest_of(model),
                digest_of(processor),
                survey,
                pictures_from=None if pictures_from is None else donors,
                image_transform=image_transform,
                backend=backend,
                max_new_tokens=max_new_tokens,
                options=options,
                # a greedy answer depends neither on the seed nor on the batch
                drawn=[seed, batch_size] if do_sample else None,
            )
            done = ranks.of_first(lambda: _begin(held, Path(out), settings))

        batches = ranks.share(make_batches(survey, done, batch_size, keep_all=do_sample))
        on_gpu = backend == "transformers" and model.device.type == "cuda"
        if cache_implementation == "auto":
            tokens = len(batches) * max_new_tokens
            pays = on_gpu and _compiling_pays(model, tokens)
            cache_implementation = "static" if pays else None
        if cache_implementation == "static" and len(batches) > 1:
            _fill_up(batches, batch_size)
        # the cores that this process may use, which can be fewer than the machine has
        if workers is None:
            workers = min(8, len(os.sched_getaffinity(0))) if on_gpu else 0

        options = {"do_sample": do_sample, "max_new_tokens": max_new_tokens, **options}
        engine = _open_engine(backend, model, processor, options, cache_implementation)
        dtype = getattr(model, "dtype", None)  # what vLLM takes has none
        prepare = Preparer(dataset, processor, donors, image_transform, question, dtype)
        answered = _answer_batches(batches, prepare, engine, seed=seed, workers=workers)
        # answers are written before the next batch begins: a kill costs one batch
        quiet = ranks.rank > 0
        with tqdm(
            total=len(survey.samples), initial=len(done), unit="sample", disable=quiet
        ) as bar:
            for answers, seconds in answered:
                new = _to_records(answers, seconds, survey, done)
                if out is not None:
                    append(Path(out), new.values())
                done |= new
                bar.update(len(new))
        done = ranks.collect(done)
    return [done[sample["id"]] for sample in survey.samples]


def settings_of(  # noqa: PLR0913 - each is a line of the file
    model: str,
    processor: str,
    survey: Survey,
    *,
    pictures_from: Sequence[int] | None = None,
    image_transform: Callable | None = None,
    backend: str = "transformers",
    max_new_tokens: int,
    options: Mapping[str, Any] | None = None,
    drawn: list[int] | None = None,
) -> dict[str, Any]:
    """List what answers depend on, in the order of the file that stands beside them.

    Parameters
    ----------
    model, processor : the digests of both.
    survey : of the data set.
    pictures_from, image_transform, backend, max_new_tokens : as `generate_answers` has them.
    options : what it was given besides.
    drawn : seed and batch size, where answers are drawn.
    """
    return {
        "model": model,
        "processor": processor,
        "data": survey.digest,
        "pictures_from": pictures_from,
        "image_transform": _name_of(image_transform),
        "backend": backend,
        "max_new_tokens": max_new_tokens,
        "options": options or {},
        "drawn": drawn,
    }


def _begin(held: ExitStack, out: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keep others from the file of answers, and give those that it holds already."""
    held.enter_context(only_writer(out, f"out={out}"))
    return resume(out, settings)


def _check_asked(backend: str, dataset: Any) -> None:
    """Refuse a backend that there is not, and a data set without an end."""
    if backend not in ("transformers", "vllm", "openai"):
        raise ValueError(f"backend={backend!r}: use 'transformers', 'vllm' or 'openai'")
    if not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "the data set streams: take a part of it, list(dataset.take(100)), to have it answered"
        )


def _open_engine(
    backend: str,
    model: Any,
    processor: Any,
    options: Mapping[str, Any],
    cache_implementation: str | None,
) -> TransformersBackend | VllmBackend | ServerBackend:
    """Make what answers the batches."""
    if backend == "vllm":
        return VllmBackend(model, options)
    if backend == "openai":
        return ServerBackend(model, options)
    return TransformersBackend(model, processor, options, cache_implementation)


@dataclass
class Batch:
    """Some rows that are answered together.

    Parameters
    ----------
    number : its place among all batches of the run, whether they are done or not; it goes into the
        seed.
    rows : row numbers in the data set; a row that repeats only fills up the batch.
    """

    number: int
    rows: list[int]

    def parts(self) -> list[list[int]]:
        """Cut the rows into the parts that are prepared at once."""
        starts = range(0, len(self.rows), ROWS_PER_PART)
        return [self.rows[start : start + ROWS_PER_PART] for start in starts]


def _check_donors(pictures_from: Sequence[int] | None, total: int) -> list[int]:
    """Return for each row the row whose pictures it is shown."""
    if pictures_from is None:
        return list(range(total))
    donors = [int(row) for row in pictures_from]
    if len(donors) != total or not set(donors) <= set(range(total)):
        raise ValueError(f"pictures_from must hold {total} row numbers, one a sample")
    return donors


def _name_of(image_transform: Callable | None) -> str:
    """Name a transform as settings files do: a function by its name, an object by its class."""
    return getattr(image_transform, "__qualname__", type(image_transform).__name__)


def make_batches(
    survey: Survey, done: Mapping[str, Any], batch_size: int, *, keep_all: bool
) -> list[Batch]:
    """Pack what is to be answered into batches.

    Drawn answers need the batches of the first start (`keep_all`), for a batch shares one random
    state; greedy answers can be packed anew.
    """
    unanswered = set()
    for row, sample in enumerate(survey.samples):
        if sample["id"] not in done:
            unanswered.add(row)
    # similar lengths need little padding; with the longest first, memory that does not suffice
    # shows at once
    order = sorted(range(len(survey.samples)), key=lambda row: -survey.lengths[row])
    if not keep_all:
        order = [row for row in order if row in unanswered]
    batches = []
    for number, start in enumerate(range(0, len(order), batch_size)):
        rows = order[start : start + batch_size]
        if unanswered.intersection(rows):
            batches.append(Batch(number, rows))
    return batches


def _compiling_pays(model: Any, tokens: int) -> bool:
    return tokens >= COMPILING_PAYS_FROM and getattr(model, "_can_compile_fullgraph", False)


def _fill_up(batches: list[Batch], batch_size: int) -> None:
    """Repeat the last row of a batch that is too small: decoding is compiled for one size."""
    for batch in batches:
        missing = batch_size - len(batch.rows)
        batch.rows += batch.rows[-1:] * missing


def _answer_batches(
    batches: Sequence[Batch],
    prepare: Preparer,
    engine: TransformersBackend | VllmBackend | ServerBackend,
    *,
    seed: int,
    workers: int,
) -> Iterator[tuple[dict[int, Generated], float]]:
    """Yield of each batch what was said about each row, and the seconds that one row took.

    The time of a batch is all that passed since the one before it, the waiting for pictures
    included.
    """
    inputs = _load(batches, prepare, workers)
    start = time.perf_counter()
    for batch in batches:
        with _lack_of_memory_in_one_line(len(batch.rows)):
            parts = [next(inputs) for _ in batch.parts()]
            generated = engine.answer(parts, seed + batch.number)
        # by row, so that a row which fills up the batch counts once
        answers = dict(zip(batch.rows, generated, strict=True))
        now = time.perf_counter()
        seconds = (now - start) / len(answers)
        start = now
        yield answers, seconds


@contextmanager
def _lack_of_memory_in_one_line(rows: int) -> Iterator[None]:
    """Raise `OSError` where memory did not suffice, in this process or in one that loads data."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if "DataLoader worker" in text and not isinstance(error, MemoryError):
            raise OSError(
                "a process that prepares pictures died, mostly because memory ran out: "
                f"set workers=0 or fewer ({one_line(text)})"
            ) from error
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if known or any(words in text for words in NO_MEMORY):
            raise OSError(
                f"memory ran out for a batch of {rows} samples: set a smaller batch_size, "
                f"max_pixels or max_new_tokens ({one_line(error)})"
            ) from error
        raise


def _tokenize_alone(worker: int) -> None:
    """Let a process that prepares pictures use no threads of the tokenizer.

    It inherits their locks, but not the threads: with TOKENIZERS_PARALLELISM=true it would wait for
    them for ever.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _load(batches: Sequence[Batch], prepare: Preparer, workers: int) -> Iterator[Any]:
    """Prepare the parts of all batches, in order; workers do so ahead of their use."""
    parts = []
    for batch in batches:
        parts += batch.parts()
    loader = DataLoader(
        parts,
        batch_size=None,
        collate_fn=prepare,
        num_workers=workers,
        worker_init_fn=_tokenize_alone,
        # the loader draws a seed for its workers, and would take it from the global generator
        generator=torch.Generator(),
    )
    return iter(loader)


def _to_records(
    answers: Mapping[int, Generated], seconds: float, survey: Survey, done: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write new answers as they stand in the file, by id.

    A batch that is drawn again may hold answers that are done: they stay as they are.
    """
    records = {}
    for row, generated in answers.items():
        sample = survey.samples[row]
        if sample["id"] in done:
            continue
        records[sample["id"]] = {
            **sample,
            "answer": generated.text,
            "tokens": generated.tokens,
            "seconds": round(seconds, 6),
        }
    return records


def generation_speed(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum up the speed of a run, in the names that Transformers and LLaMA-Factory print.

    Parameters
    ----------
    answers : what `generate_answers` returns, or any dicts with "tokens" and "seconds".

    Returns
    -------
    dict : "predict_runtime" in seconds, "predict_samples_per_second", "predict_tokens_per_second",
        and the numbers "predict_samples" and "predict_tokens".

    Examples
    --------
    >>> answers = [{"tokens": 30, "seconds": 0.5}, {"tokens": 10, "seconds": 0.5}]
    >>> generation_speed(answers)["predict_tokens_per_second"]
    40.0
    """
    seconds = sum(answer["seconds"] for answer in answers)
    tokens = sum(answer["tokens"] for answer in answers)
    divisor = max(seconds, 1e-9)  # no answers took no time
    return {
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(len(answers) / divisor, 3),
        "predict_tokens_per_second": round(tokens / divisor, 3),
        "predict_samples": len(answers),
        "predict_tokens": tokens,
    }
