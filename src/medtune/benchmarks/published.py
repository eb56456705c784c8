"""Which benchmarks are known by name, and how each was published."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it was published.

    Attributes
    ----------
    name : what `--benchmark` takes.
    title : as papers call it.
    form : which of the forms in `forms.py` its files have.
    language : of its questions, "en" or "zh".
    splits : the parts that it was published in.
    hub : its set on the hub, whose rows hold image, question and answer; None where it has none
        that is known to be whole.
    hub_files : patterns of the files to fetch from the hub, where it holds files and no rows.
    split_note : what is known about the published split and must be said beside a score; or "".
    """

    name: str
    title: str
    form: str
    language: str = "en"
    splits: tuple[str, ...] = ("train", "validation", "test")
    hub: str | None = None
    hub_files: tuple[str, ...] = ()
    split_note: str = ""


_SLAKE_FILES = ("train.json", "validation.json", "test.json", "imgs.zip")

_ALL = (
    Benchmark(
        name="vqa-rad",
        title="VQA-RAD",
        form="vqa-rad",
        splits=("train", "test"),
        hub="flaviagiammarino/vqa-rad",
        split_note="the published split is one of questions, not of pictures: the same picture "
        "stands in train and test",
    ),
    Benchmark(
        name="slake",
        title="SLAKE, English",
        form="slake",
        hub="BoKelvin/SLAKE",
        hub_files=_SLAKE_FILES,
    ),
    Benchmark(
        name="slake-zh",
        title="SLAKE, Chinese",
        form="slake",
        language="zh",
        hub="BoKelvin/SLAKE",
        hub_files=_SLAKE_FILES,
    ),
    Benchmark(
        name="path-vqa",
        title="PathVQA",
        form="path-vqa",
        hub="flaviagiammarino/path-vqa",
    ),
    Benchmark(
        name="omnimedvqa",
        title="OmniMedVQA, open access",
        form="omnimedvqa",
        splits=("test",),
        hub="foreverbeliever/OmniMedVQA",
        hub_files=("OmniMedVQA.zip",),
        split_note="there is no training part: the pictures come from public classification sets, "
        "which a model may have been trained on",
    ),
    Benchmark(
        name="iu-xray",
        title="IU X-Ray (Open-i), findings",
        form="iu-xray",
        split_note="Open-i publishes no split: the XML reports are all 'test', and only R2Gen's "
        "annotation.json has the split that papers use",
    ),
    Benchmark(name="own", title="own questions", form="pairs", splits=()),
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
"""The benchmarks by their names; "own" is any data of questions and answers."""


def find_benchmark(name: str) -> Benchmark:
    """Give a benchmark by its name.

    Parameters
    ----------
    name : a key of `BENCHMARKS`; capitals, blanks and underscores make no difference.

    Returns
    -------
    Benchmark : how it was published.

    Raises
    ------
    ValueError : no benchmark is called so.

    Examples
    --------
    >>> find_benchmark("VQA_RAD").title
    'VQA-RAD'
    """
    plain = name.strip().lower().replace("_", "-").replace(" ", "-")
    if plain not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"benchmark={name}: there is none of this name; there are {known}")
    return BENCHMARKS[plain]
