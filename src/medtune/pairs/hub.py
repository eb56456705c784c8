"""Load pairs from the Hugging Face hub, and say in one line why the hub gives none."""

import re

import datasets

from medtune.files import one_line

from .sets import with_our_columns

# An error can have a long chain of causes: the kind that matters stands among the first.
_MOST_CAUSES = 9


def load_from_hub(  # noqa: PLR0913 - each is an option of load_pairs
    name: str,
    config: str | None,
    split: str,
    *,
    streaming: bool,
    limit: int | None,
    columns: dict[str, str],
    salt: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load image, id and caption of a set on the hub.

    Parameters
    ----------
    name : str
        The set, such as "UCSC-VLAA/MedTrinity-25M".
    config : str or None
        One of its configurations, such as "25M_demo".
    split : str
        One of its splits.
    streaming : bool
        Give a stream that downloads as you go.
    limit : int or None
        The first rows only, held in memory unless streaming, without downloading the rest.
    columns : dict of str to str
        Our name -> the set's name.
    salt : str or None
        What ids that are made up or are file names, and numbers of patients, are hashed with.

    Returns
    -------
    datasets.Dataset or datasets.IterableDataset
        With the columns image, id and caption, and whatever else the set has.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, ValueError
        There is no such set, it is gated, the hub is out of reach, or anything else: one line.
    """
    in_memory = limit is not None and not streaming
    try:
        # a set of which only some rows are wanted is streamed too: the rest is not downloaded
        as_stream = streaming or limit is not None
        pairs = datasets.load_dataset(name, config, split=split, streaming=as_stream)
        pairs = with_our_columns(pairs, name, columns, salt)
        if limit is not None:
            pairs = pairs.take(limit)
        # One row at least, so that a refusal shows here and not in the middle of a run; undecoded,
        # so that a picture that cannot be decoded is left to reject_reason.
        few = pairs if in_memory else pairs.take(1)
        rows = list(few.cast_column("image", datasets.Image(decode=False)))
        if in_memory:
            pairs = datasets.Dataset.from_list(rows, features=pairs.features)
    except Exception as error:  # the hub client, pyarrow and datasets raise dozens of kinds
        raise _explained(name, error) from None
    if not rows:
        raise ValueError(f"{name} holds no pairs")
    return pairs


def _explained(name: str, error: BaseException) -> Exception:
    """Put the many ways in which the hub does not give a set into one line of four kinds."""
    causes = _causes(error)
    kinds = " ".join(type(cause).__name__ for cause in causes)
    text = " ".join(one_line(cause) for cause in causes)
    # an unknown set and a gated one share a class: only the words tell them apart
    if "DatasetNotFoundError" in kinds and "gated" not in text:
        return FileNotFoundError(
            f"no path {name} here and no such hub data set (a private one needs `hf auth login`)"
        )
    if re.search(r"GatedRepoError|gated dataset|\b40[13]\b", f"{kinds} {text}"):
        page = f"https://huggingface.co/datasets/{name}"
        return PermissionError(
            f"the hub refuses {name}: request access at {page}, then run `hf auth login`"
        )
    if re.search(r"ConnectionError|OfflineMode|ConnectError|Timeout", kinds):
        return ConnectionError(
            f"no path {name} here, and no hub in reach (offline?); HF_ENDPOINT can name a mirror"
        )
    line = one_line(error).split(" Example of usage")[0]
    return ValueError(line if name in line else f"cannot load {name}: {line}")


def _causes(error: BaseException) -> list[BaseException]:
    """Give an error and what led to it, the latest first."""
    causes = [error]
    while len(causes) < _MOST_CAUSES:
        cause = causes[-1].__cause__ or causes[-1].__context__
        if cause is None:
            break
        causes.append(cause)
    return causes
