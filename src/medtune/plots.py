"""Figures of the course: pictures with boxes, training curves, scores, answers side by side.

Needs numpy and matplotlib; `live_plot` also IPython and transformers. The file stands alone.

Each function returns a `matplotlib.figure.Figure`: leave it as the last line of a cell, or call its
`savefig`. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import difflib
import functools
import importlib.util
import itertools
import math
import re
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from matplotlib.patches import Rectangle
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "D", "^", "v", "*", "P"]
GREY = "#666666"

# Fonts with Chinese characters, as the common systems name them.
CHINESE = [
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Heiti SC",
    "Microsoft YaHei",
    "SimHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
]
# A Python package that holds nothing but such a font.
FONT_PACKAGE = "noto_cjk_sans_otc"

STYLE = {
    "font.size": 10,
    "figure.dpi": 100,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    # Captions and answers may hold dollar signs, which would start a formula.
    "text.parse_math": False,
}

# Words of an answer that the reference lacks are printed in this style.
LACKING = {"color": "#A03F00", "bbox": {"facecolor": "#FBE3D2", "edgecolor": "none", "pad": 1}}

MarkedWord = tuple[str, bool]  # a word, and whether the reference has it


# --- fonts and figures ------------------------------------------------------------------------


@functools.cache
def font_families() -> tuple[str, ...]:
    """Find fonts for the figures: the usual one, and one with Chinese characters if there is any.

    Without one, a single warning says what to install.

    Examples
    --------
    >>> font_families()[0]
    'DejaVu Sans'
    """
    manager = font_manager.fontManager
    package = importlib.util.find_spec(FONT_PACKAGE)
    if package and not set(CHINESE) & set(manager.get_font_names()):
        font = str(package.origin).replace("__init__.py", "NotoSansCJK-Regular.ttc")
        manager.addfont(font)

    installed = set(manager.get_font_names())
    for name in CHINESE:
        if name in installed:
            return ("DejaVu Sans", name)
    # Matplotlib warns of each missing character; one hint is enough.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    hint = "No font for Chinese text in figures: pip install noto-cjk-sans-otc"
    warnings.warn(hint, stacklevel=2)
    return ("DejaVu Sans",)


def _drawn(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Let a function draw with our fonts, and keep pyplot from showing its figure a second time."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs) -> Figure:
        style = STYLE | {"font.family": list(font_families())}
        with plt.rc_context(style):
            figure = function(*args, **kwargs)
        plt.close(figure)
        return figure

    return wrapper


def _grid_of_axes(
    rows: int, columns: int, size: tuple[float, float], **ratios: Sequence[float]
) -> tuple[Figure, np.ndarray]:
    """Make a figure of a size in inches, and its axes row by row."""
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **ratios
    )
    return figure, axes.ravel()


def _one_axis(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = _grid_of_axes(1, 1, (width, height))
    return figure, axes[0]


def _show_picture(axis: Axes, image: Any) -> None:
    axis.imshow(image, cmap="gray")
    axis.set(xticks=[], yticks=[])
    axis.set_anchor("S")  # pictures stand on a line, however long their titles are
    axis.spines[:].set_visible(False)


def _draw_box(
    axis: Axes, image: Any, box: Sequence[float], colour: str, name: str | None = None
) -> None:
    """Draw a box (xyxy, 0..1) with a white edge around it, which can be seen on any picture."""
    width, height = image.size
    x0, y0, x1, y1 = box
    # The middle of the first pixel is 0, so the picture begins at -0.5.
    left = x0 * width - 0.5
    top = y0 * height - 0.5
    right = x1 * width - 0.5
    bottom = y1 * height - 0.5
    corner, size = (left, top), (right - left, bottom - top)
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=3.5))
    edge = Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.8, label=name)
    axis.add_patch(edge)


# --- words and lines --------------------------------------------------------------------------


def split_words(text: str) -> list[str]:
    """Split a text into words with their punctuation; every Chinese character is a word.

    Examples
    --------
    >>> split_words("The spleen. 脾脏。")
    ['The', 'spleen.', '脾', '脏。']
    """
    return re.findall(r"[\u3400-\u9fff][，。、；：（）]*|[^\s\u3400-\u9fff]+", text)


def same_words(text: str, reference: str) -> list[MarkedWord]:
    """Mark the words of a text that stand in the same order in the reference.

    Case and punctuation do not count.

    Examples
    --------
    >>> same_words("the left kidney", "the right kidney.")
    [('the', True), ('left', False), ('kidney', True)]
    """
    words = split_words(text)
    others = split_words(reference)
    # autojunk would ignore the words that are frequent in a long reference.
    matcher = difflib.SequenceMatcher(a=_plain(words), b=_plain(others), autojunk=False)
    same: set[int] = set()
    for block in matcher.get_matching_blocks():
        same.update(range(block.a, block.a + block.size))
    return [(word, index in same) for index, word in enumerate(words)]


def _plain(words: list[str]) -> list[str]:
    return [word.strip(".,;:，。、；：").lower() for word in words]


def _text_width(text: str) -> int:
    """Give the width of a text in Latin letters: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _is_wide(word: str) -> bool:
    return _text_width(word) > len(word)


def _break_lines(words: Sequence[MarkedWord], width: int) -> list[list[MarkedWord]]:
    """Break marked words into lines of at most `width` Latin letters."""
    lines: list[list[MarkedWord]] = [[]]
    used = 0
    for word, mark in _short_pieces(words, width):
        # Chinese is written without spaces.
        spaced = word if _is_wide(word) else word + " "
        needed = _text_width(spaced)
        if lines[-1] and used + needed > width:
            lines.append([])
            used = 0
        lines[-1].append((spaced, mark))
        used += needed
    return lines


def _short_pieces(words: Sequence[MarkedWord], width: int) -> Iterator[MarkedWord]:
    """Cut words that are longer than a line: an untrained model may write words without end."""
    for word, mark in words:
        longest = width // 2 if _is_wide(word) else width
        for start in range(0, len(word), longest):
            yield word[start : start + longest], mark


def _wrap(text: str, width: int) -> str:
    """Break a text into lines of at most `width` Latin letters."""
    words = [(word, True) for word in split_words(text)]
    lines = []
    for line in _break_lines(words, width):
        lines.append("".join(word for word, _ in line).rstrip())
    return "\n".join(lines)


def _all_names(groups: Iterable[Mapping]) -> list[str]:
    """Name all that occurs in any of the groups once, in order of appearance."""
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))


# --- pictures ---------------------------------------------------------------------------------


@_drawn
def show_gallery(
    rows: Sequence[Mapping],
    *,
    titles: Sequence[str] | None = None,
    boxes: Sequence | None = None,
    columns: int = 4,
) -> Figure:
    """Show pictures in a grid, with boxes.

    Parameters
    ----------
    rows : pairs with `image`, or converted records with `images`, of which the first is shown.
    titles : one a picture; by default its `id`.
    boxes : for each picture a box (xyxy, 0..1), a mapping of names to boxes, or None; by default
        the row's `roi`, unless a box is drawn in the picture already (`has_box`).
    columns : pictures side by side, at most.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> from PIL import Image
    >>> row = {"image": Image.new("RGB", (64, 64)), "id": "a", "roi": [0.1, 0.1, 0.5, 0.5]}
    >>> figure = show_gallery([row])
    >>> len(figure.axes[0].patches)  # the box and its white edge
    2
    """
    if titles is None:
        titles = [row.get("id", "") for row in rows]
    if boxes is None:
        boxes = [_box_to_draw(row) for row in rows]
    names = [_wrap(str(title), 36) for title in titles]
    longest = max((name.count("\n") + 1 for name in names), default=0)

    columns = max(1, min(columns, len(rows)))
    lines = math.ceil(len(rows) / columns)
    height = 3.1 + 0.2 * longest
    figure, axes = _grid_of_axes(lines, columns, (3.0 * columns, height * lines))
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    for number, row in enumerate(rows):
        axis = axes[number]
        image = row["image"] if "image" in row else row["images"][0]
        _show_picture(axis, image)
        _draw_boxes(axis, image, boxes[number])
        axis.set_title(names[number], fontsize=9)
    return figure


def _box_to_draw(row: Mapping) -> Any:
    """Give the region of interest of a row, unless the picture shows it already."""
    return None if row.get("has_box") else row.get("roi")


def _draw_boxes(axis: Axes, image: Any, boxes: Any) -> None:
    """Draw one box, several with names, or none."""
    named = boxes if isinstance(boxes, Mapping) else {None: boxes}
    for colour, (name, box) in zip(itertools.cycle(COLOURS), named.items(), strict=False):
        if box is not None:
            _draw_box(axis, image, box, colour, name)
    handles, _ = axis.get_legend_handles_labels()
    if handles:
        axis.legend(loc="lower left", fontsize=8, frameon=True)


@_drawn
def show_answers(rows: Sequence[Mapping], *, width: int = 58) -> Figure:
    """Show picture, reference and answers side by side; words that the reference lacks are marked.

    Parameters
    ----------
    rows : mappings with `image`, `reference`, `answers` ({"base": text, "tuned": text}), and
        perhaps `roi` and `id`.
    width : letters in a line.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> from PIL import Image
    >>> image = Image.new("RGB", (64, 64))
    >>> row = {"image": image, "reference": "A spleen.", "answers": {"base": "A frame."}}
    >>> len(show_answers([row]).axes)
    3
    """
    names = _all_names([row["answers"] for row in rows])
    texts = []
    for row in rows:
        answers = [row["answers"].get(name, "") for name in names]
        texts.append([row["reference"], *answers])

    heights = [_height_of(line, width) for line in texts]
    widths = [2.3] + [0.075 * width] * (1 + len(names))
    size = (sum(widths), sum(heights) + 0.2)
    figure, axes = _grid_of_axes(
        len(rows), len(widths), size, height_ratios=heights, width_ratios=widths
    )
    titles = ["reference", *names]
    cells = axes.reshape(-1, len(widths))
    for row, line, (picture, *columns) in zip(rows, texts, cells, strict=True):
        _show_source(picture, row)
        for axis, title, text in zip(columns, titles, line, strict=True):
            _write_answer(axis, title, same_words(text, line[0]), width)
    return figure


def _height_of(texts: list[str], width: int) -> float:
    """Give the height in inches of a row that holds these texts, and a picture."""
    heights = [2.2]
    for text in texts:
        lines = _wrap(text, width).count("\n") + 1
        heights.append(0.4 + 0.2 * lines)
    return max(heights)


def _show_source(axis: Axes, row: Mapping) -> None:
    _show_picture(axis, row["image"])
    if row.get("roi") is not None:
        _draw_box(axis, row["image"], row["roi"], COLOURS[0])
    axis.set_title(str(row.get("id", ""))[:18], fontsize=8, color=GREY)
    axis.set_anchor("N")


def _write_answer(axis: Axes, title: str, words: list[MarkedWord], width: int) -> None:
    """Write marked words below a title. Each word is a text of its own, so it can have a colour."""
    axis.axis("off")
    lines = [TextArea(title, textprops={"fontsize": 12, "color": GREY})]
    for line in _break_lines(words or [("(empty)", False)], width):
        parts = []
        for word, same in line:
            style = {"fontsize": 9} if same else {"fontsize": 9} | LACKING
            parts.append(TextArea(word, textprops=style))
        lines.append(HPacker(children=parts, pad=0, sep=0, align="baseline"))
    block = VPacker(children=lines, pad=0, sep=3, align="left")
    anchored = AnchoredOffsetbox("upper left", child=block, pad=0, borderpad=0.2, frameon=False)
    # The layout would otherwise shrink all cells to the longest line.
    axis.add_artist(anchored).set_in_layout(False)


# --- training ---------------------------------------------------------------------------------


@_drawn
def plot_training(log_history: Sequence[Mapping]) -> Figure:
    """Draw loss and token accuracy over the steps, in training and in evaluation.

    The axis of the loss is logarithmic: it shows the step from 0.2 to 0.1 as large as that from 12
    to 6. If a loss is 0 or below, as some have, the axis is linear.

    Parameters
    ----------
    log_history : `trainer.state.log_history`.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}]
    >>> figure = plot_training(log)
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['training', 'evaluation']
    """
    figure, (loss, accuracy) = _grid_of_axes(1, 2, (10, 3.4))
    loss.set_title("loss")
    _curve(loss, log_history, "loss", "training", COLOURS[0], ".")
    _curve(loss, log_history, "eval_loss", "evaluation", COLOURS[1], "o")
    _use_log_scale(loss)

    accuracy.set_title("token accuracy")
    _curve(accuracy, log_history, "mean_token_accuracy", "training", COLOURS[0], ".")
    _curve(accuracy, log_history, "eval_mean_token_accuracy", "evaluation", COLOURS[1], "o")
    accuracy.set_ylim(0, 1)
    return figure


def _curve(  # noqa: PLR0913 - where, what, and how a curve looks
    axis: Axes, log_history: Sequence[Mapping], key: str, label: str, colour: str, marker: str
) -> None:
    """Draw one logged value over the steps, if it was logged."""
    axis.set_xlabel("optimizer step")
    axis.grid(True)
    logs = [log for log in log_history if key in log]
    if not logs:
        return
    steps = [log["step"] for log in logs]
    values = [log[key] for log in logs]
    axis.plot(steps, values, color=colour, marker=marker, label=label, linewidth=1.6)
    axis.legend(fontsize=9)


def _use_log_scale(axis: Axes) -> None:
    """Make the vertical axis logarithmic, with ticks such as 0.2 and 5 instead of powers of ten."""
    if not axis.lines:
        return
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    if min(values) <= 0:
        return
    axis.set_yscale("log")
    # Within four decades there is room for three ticks in each. Where less than two of these lie
    # in the range of the values, the locator finds other round numbers.
    crowded = max(values) > 10_000 * min(values)
    axis.yaxis.set_major_locator(LogLocator(subs=(1,) if crowded else (1, 2, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_locator(NullLocator())


@_drawn
def plot_losses(
    logs: Mapping[str, Sequence[Mapping]],
    *,
    samples_per_step: Mapping[str, int | None] | None = None,
) -> Figure:
    """Draw the losses of several runs in one picture: over the steps, and over the samples seen.

    Two runs over the same pairs whose steps differ in size do not end at the same step. Over the
    samples they do, and over the steps one sees which of them was updated more often.

    Parameters
    ----------
    logs : `trainer.state.log_history` of each run, by its name.
    samples_per_step : how many samples a step of each run sees, on all its ranks; a run without it
        is drawn over the steps only.

    Returns
    -------
    matplotlib.figure.Figure : the figure. Lines are the loss in training, points that of
        evaluations.

    Examples
    --------
    >>> log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}]
    >>> figure = plot_losses({"a": log, "b": log}, samples_per_step={"a": 8, "b": 64})
    >>> [float(line.get_xdata()[-1]) for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    [16.0, 128.0]
    """
    sizes = samples_per_step or {}
    known = {name: size for name, size in sizes.items() if size and name in logs}
    figure, axes = _grid_of_axes(1, 2 if known else 1, (10 if known else 6, 3.8))
    over_steps = axes[0]
    over_steps.set_xlabel("optimizer step")
    for number, (name, log) in enumerate(logs.items()):
        _losses_of(over_steps, log, name, number, 1)
    if known:
        over_samples = axes[1]
        over_samples.set_xlabel("samples seen")
        for number, (name, log) in enumerate(logs.items()):
            if name in known:
                _losses_of(over_samples, log, name, number, known[name])
    for axis in axes:
        axis.set_title("loss: lines in training, points in evaluation")
        axis.grid(True)
        _use_log_scale(axis)
    # one legend for both, below them, where long names have room
    handles, labels = over_steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9)
    return figure


def _losses_of(axis: Axes, log: Sequence[Mapping], name: str, number: int, size: int) -> None:
    """Draw a run's loss over steps of a size, in training and in evaluation."""
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[number % len(MARKERS)]
    styles = {
        "loss": {"linestyle": "-", "linewidth": 1.6},
        "eval_loss": {"linestyle": "none", "marker": marker},
    }
    # the legend names a run once
    label = name
    for key, style in styles.items():
        entries = [entry for entry in log if key in entry]
        if not entries:
            continue
        places = [entry["step"] * size for entry in entries]
        losses = [entry[key] for entry in entries]
        axis.plot(places, losses, color=colour, label=label, **style)
        label = None


@_drawn
def plot_tasks(log_history: Sequence[Mapping]) -> Figure:
    """Draw loss, log-variance and metric of each task that a `medtune.multitask` trainer logged.

    Parameters
    ----------
    log_history : `trainer.state.log_history`.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> log = [{"step": 1, "box_loss": 2.0, "mean_iou": 0.1}, {"step": 2, "box_loss": 1.5}]
    >>> figure = plot_tasks(log)
    >>> [[line.get_label() for line in axis.lines] for axis in figure.axes]
    [['box'], [], ['box: mean iou']]
    """
    figure, (loss, variance, metric) = _grid_of_axes(1, 3, (12, 3.4))
    loss.set_title("loss")
    variance.set_title("log-variance s")
    metric.set_title("metric in training")
    metrics = {"text": "token_accuracy", "box": "mean_iou", "match": "match_accuracy"}
    for colour, (task, key) in zip(COLOURS, metrics.items(), strict=False):
        _curve(loss, log_history, f"{task}_loss", task, colour, ".")
        _curve(variance, log_history, f"{task}_log_variance", task, colour, ".")
        label = f"{task}: {key.replace('_', ' ')}"
        _curve(metric, log_history, key, label, colour, ".")
    _use_log_scale(loss)
    return figure


def live_plot(every: float = 5.0) -> Any:
    """Make a callback for `SFTTrainer(callbacks=[...])` that draws `plot_training` as it goes on.

    The figure stands below the cell and is redrawn. Outside a notebook nothing is drawn.

    Parameters
    ----------
    every : seconds between two drawings, at least; the end of a training is always drawn.

    Returns
    -------
    transformers.TrainerCallback : the callback.

    Examples
    --------
    >>> live_plot().on_log(None, None, None)  # here is no notebook
    """
    # Only training needs these two, so that the other figures work without them.
    from IPython import get_ipython
    from IPython.display import display
    from transformers import TrainerCallback

    class LivePlot(TrainerCallback):
        def __init__(self):
            self.handle = None  # the figure below the cell, once there is one
            self.last = -math.inf  # when it was drawn, in seconds

        def on_log(self, args, state, control, **kwargs):
            in_notebook = hasattr(get_ipython(), "kernel")
            if not in_notebook or time.monotonic() - self.last < every:
                return
            figure = plot_training(state.log_history)
            self.last = time.monotonic()
            if self.handle is None:
                self.handle = display(figure, display_id=True)
            else:
                self.handle.update(figure)

        def on_train_end(self, args, state, control, **kwargs):
            self.last = -math.inf
            self.on_log(args, state, control)

    return LivePlot()


# --- scores and counts ------------------------------------------------------------------------


@_drawn
def plot_before_after(scores: Mapping[str, Mapping], *, unit: str = "score") -> Figure:
    """Draw the scores of several answerers as points with intervals.

    Parameters
    ----------
    scores : {score: {answerer: value}}. A value is a number, or a mapping with "value", "low" and
        "high"; these are None where there is no interval, and "value" where there is no score.
    unit : what the horizontal axis is called.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> interval = {"value": 0.6, "low": 0.5, "high": 0.7}
    >>> figure = plot_before_after({"name right": {"base": 0.1, "tuned": interval}})
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['name right']
    """
    names = _all_names(scores.values())
    height = 1.2 + 0.32 * len(scores) * max(2, len(names))
    figure, axis = _one_axis(8, height)
    middle = (len(names) - 1) / 2
    for line, values in enumerate(scores.values()):
        for name, value in values.items():
            index = names.index(name)
            # The answerers of one score share 0.7 of the height of its line.
            y = line + (index - middle) * 0.7 / len(names)
            _draw_score(axis, value, y, name, index)

    axis.set_yticks(range(len(scores)), labels=[_wrap(score, 28) for score in scores])
    axis.set(ylim=(len(scores) - 0.45, -0.55), xmargin=0.08, xlabel=unit)
    axis.grid(True, axis="x")
    # An answerer has a point in each line, and one entry in the legend.
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axis.legend(entries.values(), entries.keys(), **place)
    return figure


def _draw_score(axis: Axes, score: Any, y: float, name: str, index: int) -> None:
    """Draw a score as a point with its number, over a bar for its interval if it has one."""
    if not isinstance(score, Mapping):
        score = {"value": score}
    value, low, high = score["value"], score.get("low"), score.get("high")
    if value is None:
        return
    colour = COLOURS[index % len(COLOURS)]
    marker = MARKERS[index % len(MARKERS)]
    if low is not None:
        axis.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.4)
    axis.plot(value, y, marker=marker, color=colour, linestyle="", label=name)
    end = value if high is None else high
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axis.annotate(f"{value:.3g}", (end, y), fontsize=8, **place)


@_drawn
def plot_risk_coverage(curves: Mapping[str, tuple[Sequence, Sequence]]) -> Figure:
    """Draw how often answers are wrong against how many are given.

    Parameters
    ----------
    curves : {name: (coverage, risk)}, both 0..1, as `medtune.scores.risk_coverage` gives them.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> axis = plot_risk_coverage({"test": ([0.5, 1.0], [0.0, 0.2])}).axes[0]
    >>> axis.get_xlabel()
    'questions answered, the surest first, percent'
    """
    figure, axis = _one_axis(7, 3.6)
    for number, (name, (coverage, risk)) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(100 * np.asarray(coverage), 100 * np.asarray(risk), color=colour, label=name)
    axis.set(
        xlim=(0, 100),
        ylim=(0, None),
        xlabel="questions answered, the surest first, percent",
        ylabel="of these wrong, percent",
    )
    axis.grid(True)
    axis.legend()
    return figure


@_drawn
def plot_reliability(table: Sequence[Mapping[str, float]]) -> Figure:
    """Draw how often answers are right against how sure they were.

    Parameters
    ----------
    table : rows with `confidence` and `right`, both 0..1, and the number of `answers`, as
        `medtune.scores.calibration_table` gives them.

    Returns
    -------
    matplotlib.figure.Figure : the figure; on the dotted line the answers are as often right as they
        say.

    Raises
    ------
    ValueError : the table has no rows.

    Examples
    --------
    >>> figure = plot_reliability([{"confidence": 0.5, "right": 0.8, "answers": 12}])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['12']
    """
    if not table:
        raise ValueError("table is empty: there is nothing to draw")
    figure, axis = _one_axis(4.5, 4)
    axis.plot([0, 100], [0, 100], color=GREY, linestyle=":")
    sure = [100 * row["confidence"] for row in table]
    right = [100 * row["right"] for row in table]
    axis.plot(sure, right, color=COLOURS[0], marker="o")
    for x, y, row in zip(sure, right, table, strict=True):
        axis.annotate(str(row["answers"]), (x, y), (4, -10), textcoords="offset points", fontsize=8)
    axis.set(
        xlim=(0, 105),
        ylim=(0, 105),
        xlabel="confidence, percent",
        ylabel="right, percent",
    )
    axis.grid(True)
    return figure


@_drawn
def plot_heatmap(
    boxes: Sequence, *, title: str = "how often each place is covered", cells: int = 48
) -> Figure:
    """Draw how often boxes cover each place of the picture.

    Parameters
    ----------
    boxes : boxes (xyxy, 0..1); those that are None are left out.
    title : stands above, with the number of boxes.
    cells : the picture is divided into so many columns and rows.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> plot_heatmap([[0.0, 0.0, 0.5, 0.5], None]).axes[0].get_title()
    'how often each place is covered (1 boxes)'
    """
    known = [box for box in boxes if box is not None]
    centres = (np.arange(cells) + 0.5) / cells
    cover = np.zeros((cells, cells))
    for x0, y0, x1, y1 in known:
        rows = (y0 <= centres) & (centres < y1)
        columns = (x0 <= centres) & (centres < x1)
        cover += np.outer(rows, columns)
    share = cover / max(len(known), 1)

    figure, axis = _one_axis(4.8, 4)
    shown = axis.imshow(share, cmap="viridis", vmin=0, extent=(0, 1, 1, 0))
    figure.colorbar(shown, ax=axis, label="share of the boxes")
    axis.set_title(f"{title} ({len(known)} boxes)")
    # The lines divide the picture into the nine places that captions speak of.
    thirds, labels = [0, 1 / 3, 2 / 3, 1], ["0", "1/3", "2/3", "1"]
    axis.set_xticks(thirds, labels=labels)
    axis.set_yticks(thirds, labels=labels)
    axis.grid(True, color="white", alpha=0.4)
    return figure


@_drawn
def plot_box_sizes(boxes: Sequence, *, title: str = "how large the boxes are") -> Figure:
    """Draw how often boxes have each width and height, on a logarithmic scale of colours.

    Parameters
    ----------
    boxes : boxes (xyxy, 0..1); those that are None are left out.
    title : stands above, with the number of boxes.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> plot_box_sizes([[0.0, 0.0, 0.5, 0.5], None]).axes[0].get_title()
    'how large the boxes are (1 boxes)'
    """
    known = [box for box in boxes if box is not None]
    widths = [x1 - x0 for x0, _, x1, _ in known]
    heights = [y1 - y0 for _, y0, _, y1 in known]
    figure, axis = _one_axis(4.8, 4)
    *_, shown = axis.hist2d(
        widths, heights, bins=30, range=[(0, 1), (0, 1)], norm="log", cmap="viridis"
    )
    figure.colorbar(shown, ax=axis, label="boxes")
    axis.set_title(f"{title} ({len(known)} boxes)")
    axis.set(xlabel="width, share of the picture", ylabel="height, share of the picture")
    return figure


@_drawn
def plot_positions(positions: Mapping[str, Sequence[float]], *, unit: str = "slice") -> Figure:
    """Draw where on one line the members of each group lie, a row of squares a group.

    Parameters
    ----------
    positions : numbers by the name of the group, such as the slices of each split.
    unit : what the horizontal axis is called.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> axis = plot_positions({"train": [0, 1, 2], "test": [6, 7]}).axes[0]
    >>> [text.get_text() for text in axis.get_yticklabels()]
    ['train', 'test']
    """
    figure, axis = _one_axis(9, 0.7 + 0.3 * max(len(positions), 1))
    for row, values in enumerate(positions.values()):
        colour = COLOURS[row % len(COLOURS)]
        axis.scatter(values, [row] * len(values), marker="s", s=16, color=colour)
    axis.set_yticks(range(len(positions)), labels=list(positions))
    axis.set(ylim=(len(positions) - 0.4, -0.6), xlabel=unit)
    return figure


@_drawn
def plot_lengths(
    lengths: Mapping[str, Sequence[int]], *, limit: int | None = None, unit: str = "tokens"
) -> Figure:
    """Draw how long things are, one histogram a name.

    Parameters
    ----------
    lengths : the lengths by name; a name may have none.
    limit : a length that is drawn as a line.
    unit : what lengths are counted in.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> plot_lengths({"answer": [80, 92, 101]}, limit=128).axes[0].get_xlabel()
    'tokens'
    """
    figure, axis = _one_axis(8, 3)
    highest = max((max(values) for values in lengths.values() if len(values)), default=1)
    bins = np.linspace(0, max(highest, limit or 0) * 1.02 + 1, 41)
    for colour, (name, values) in zip(itertools.cycle(COLOURS), lengths.items(), strict=False):
        label = f"{name}: none"
        if len(values):
            label = f"{name}: median {np.median(values):.0f}, longest {max(values)}"
        style = {"histtype": "stepfilled", "alpha": 0.5, "color": colour}
        axis.hist(values, bins=bins, label=label, **style)
    if limit is not None:
        axis.axvline(limit, color="black", linestyle="--", label=f"limit {limit}")
    axis.set(xlabel=unit, ylabel="samples")
    # above the bars: beside the last ones its marks would look like bars
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    return figure


@_drawn
def plot_bars(
    counts: Mapping[str, float], *, title: str = "", unit: str = "samples", highest: int = 30
) -> Figure:
    """Draw numbers by name as horizontal bars, largest first.

    Parameters
    ----------
    counts : the numbers by name.
    title : stands above.
    unit : what is counted.
    highest : bars at most; the last one sums up what has no bar of its own.

    Returns
    -------
    matplotlib.figure.Figure : the figure.

    Examples
    --------
    >>> axis = plot_bars({"liver": 3, "spleen": 5}).axes[0]
    >>> [text.get_text() for text in axis.get_yticklabels()]
    ['spleen', 'liver']
    """
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) > highest:
        rest = ordered[highest - 1 :]
        total = sum(value for _, value in rest)
        ordered = [*ordered[: highest - 1], (f"{len(rest)} more", total)]
    names = [name for name, _ in ordered]
    values = [value for _, value in ordered]
    places = range(len(ordered))

    figure, axis = _one_axis(7, 0.9 + 0.24 * max(len(ordered), 2))
    bars = axis.barh(places, values, color=COLOURS[0])
    axis.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    axis.set_yticks(places, labels=names, fontsize=9)
    axis.set(ylim=(len(ordered) - 0.4, -0.6), xmargin=0.1, xlabel=unit, title=title)
    return figure
