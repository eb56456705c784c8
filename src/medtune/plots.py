"""Figures of the course: pictures with boxes, training curves, scores with intervals, answers side by side.

Each function returns a ``matplotlib.figure.Figure``: leave it as the last line of a cell, or call ``savefig``. The
colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import functools
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence

import numpy as np

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#666666"
# Fonts with Chinese characters, as the common systems name them; the last one is a Python package of one font.
CHINESE = ["Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Heiti SC", "Microsoft YaHei"]
CHINESE += ["SimHei", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Arial Unicode MS"]


@functools.cache
def font_families() -> tuple[str, ...]:
    """Find fonts for the figures: the usual one, and one with Chinese characters if this machine has any."""
    import importlib.util

    from matplotlib import font_manager

    manager, package = font_manager.fontManager, importlib.util.find_spec("noto_cjk_sans_otc")
    if package and not {*manager.get_font_names()} & {*CHINESE}:
        manager.addfont(str(package.origin).replace("__init__.py", "NotoSansCJK-Regular.ttc"))
    chinese = [name for name in CHINESE if name in manager.get_font_names()][:1]
    if not chinese:  # one hint instead of a warning for each character
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.warn("No font for Chinese text in figures: pip install noto-cjk-sans-otc", stacklevel=2)
    return ("DejaVu Sans", *chinese)


def _drawn(function):
    """Draw with our fonts, and keep pyplot from showing the figure a second time."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        from matplotlib import pyplot as plt

        style = {"font.family": list(font_families()), "font.size": 10, "axes.grid": False, "figure.dpi": 100}
        style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "grid.color": "#dddddd"}
        style |= {"text.parse_math": False, "legend.frameon": False, "axes.axisbelow": True}
        with plt.rc_context(style):
            figure = function(*args, **kwargs)
        plt.close(figure)
        return figure

    return wrapper


def _axes(rows: int, columns: int, width: float, height: float, **ratios):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **ratios)
    return figure, axes.ravel()


def _width(text: str) -> int:
    """Width of a text in Latin letters: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def split_words(text: str) -> list[str]:
    """Split a text into words with their punctuation; every Chinese character is a word.

    Examples
    --------
    >>> split_words("The spleen. 脾脏。")
    ['The', 'spleen.', '脾', '脏。']
    """
    return re.findall(r"[\u3400-\u9fff][，。、；：（）]*|[^\s\u3400-\u9fff]+", text)


def same_words(text: str, reference: str) -> list[tuple[str, bool]]:
    """Mark the words of a text that stand in the same order in the reference.

    Examples
    --------
    >>> same_words("the left kidney", "the right kidney.")
    [('the', True), ('left', False), ('kidney', True)]
    """
    import difflib

    words, others = ([word.strip(".,;:，。、；：").lower() for word in split_words(t)] for t in (text, reference))
    blocks = difflib.SequenceMatcher(a=words, b=others, autojunk=False).get_matching_blocks()
    same = {index for block in blocks for index in range(block.a, block.a + block.size)}
    return [(word, index in same) for index, word in enumerate(split_words(text))]


def _lines(words: Sequence[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    """Break marked words into lines of at most `width` Latin letters; Chinese words are not spaced."""
    lines: list[list[tuple[str, bool]]] = [[]]
    pieces = ((w[i : i + n], m) for w, m in words for n in [width >> (_width(w) > len(w))] for i in range(0, len(w), n))
    for word, mark in pieces:  # an untrained model may write words without end, and a wide sign takes two places
        word += "" if _width(word) > len(word) else " "
        if lines[-1] and _width("".join(said for said, _ in lines[-1]) + word) > width:
            lines.append([])
        lines[-1].append((word, mark))
    return lines


def _wrap(text: str, width: int) -> str:
    words = [(word, True) for word in split_words(text)]
    return "\n".join("".join(word for word, _ in line).rstrip() for line in _lines(words, width))


def _box(axis, image, box, colour: str, label: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = (edge * size - 0.5 for edge, size in zip(box, image.size * 2, strict=True))  # from pixel edges
    for edge, width, name in (("white", 3.5, None), (colour, 1.8, label)):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=edge, linewidth=width, label=name))


def _show(axis, image) -> None:
    axis.imshow(image, cmap="gray")
    axis.set(xticks=[], yticks=[], anchor="S")  # room for long titles
    axis.spines[:].set_visible(False)


@_drawn
def show_gallery(
    rows: Sequence[Mapping], *, titles: Sequence[str] | None = None, boxes: Sequence | None = None, columns: int = 4
):
    """Show pictures in a grid, with boxes.

    Parameters
    ----------
    rows : pairs with `image`, or converted records with `images`.
    titles : one a picture; by default the `id`.
    boxes : for each picture a box (xyxy, 0..1), a mapping of names to boxes, or None; by default the row's `roi`,
        unless a box is drawn in the picture already (`has_box`).

    Examples
    --------
    >>> from PIL import Image
    >>> figure = show_gallery([{"image": Image.new("RGB", (64, 64)), "id": "a", "roi": [0.1, 0.1, 0.5, 0.5]}])
    >>> len(figure.axes[0].patches)  # the box and its white edge
    2
    """
    columns = max(1, min(columns, len(rows)))
    lines = -(-len(rows) // columns)
    names = [_wrap(str(name), 36) for name in (titles if titles is not None else [row.get("id", "") for row in rows])]
    height = 3.1 + 0.2 * max((name.count("\n") + 1 for name in names), default=0)
    figure, axes = _axes(lines, columns, 3.0 * columns, height * lines)
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    for number, (axis, row) in enumerate(zip(axes, rows, strict=False)):
        image = row["image"] if "image" in row else row["images"][0]
        _show(axis, image)
        drawn = boxes[number] if boxes is not None else None if row.get("has_box") else row.get("roi")
        drawn = drawn if isinstance(drawn, Mapping) else {None: drawn}
        for colour, (name, box) in zip(COLOURS * 9, drawn.items(), strict=False):
            if box is not None:
                _box(axis, image, box, colour, name)
        if any(drawn):
            axis.legend(loc="lower left", fontsize=8, frameon=True)
        axis.set_title(names[number], fontsize=9)
    return figure


def _curve(axis, log_history: Sequence[Mapping], key: str, title: str, label: str, colour: str, marker: str) -> None:
    axis.set(title=title, xlabel="optimizer step")
    axis.grid(True)
    if points := [(log["step"], log[key]) for log in log_history if key in log]:
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, linewidth=1.6)
        axis.legend(fontsize=9)


@_drawn
def plot_training(log_history: Sequence[Mapping]):
    """Draw loss and token accuracy over the steps from ``trainer.state.log_history``, training and evaluation.

    Examples
    --------
    >>> figure = plot_training([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}])
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['training', 'evaluation']
    """
    figure, axes = _axes(1, 2, 10, 3.4)
    for axis, key, title in zip(axes, ("loss", "mean_token_accuracy"), ("loss", "token accuracy"), strict=True):
        _curve(axis, log_history, key, title, "training", COLOURS[0], ".")
        _curve(axis, log_history, f"eval_{key}", title, "evaluation", COLOURS[1], "o")
    axes[1].set_ylim(0, 1)
    return figure


@_drawn
def plot_tasks(log_history: Sequence[Mapping]):
    """Draw loss, log-variance and metric of each task that a `medtune.multitask` trainer logged.

    Examples
    --------
    >>> figure = plot_tasks([{"step": 1, "box_loss": 2.0, "mean_iou": 0.1}, {"step": 2, "box_loss": 1.5}])
    >>> [[line.get_label() for line in axis.lines] for axis in figure.axes]
    [['box'], [], ['box: mean iou']]
    """
    figure, axes = _axes(1, 3, 12, 3.4)
    metrics = {"text": "token_accuracy", "box": "mean_iou", "match": "match_accuracy"}
    titles = ("loss", "log-variance s", "metric in training")
    for colour, (task, metric) in zip(COLOURS, metrics.items(), strict=False):
        labels = {f"{task}_loss": task, f"{task}_log_variance": task, metric: f"{task}: {metric.replace('_', ' ')}"}
        for axis, title, (key, label) in zip(axes, titles, labels.items(), strict=True):
            _curve(axis, log_history, key, title, label, colour, ".")
    axes[0].set_yscale("log")
    return figure


def live_plot(every: float = 5.0):
    """Make a callback for ``SFTTrainer(callbacks=[...])`` that redraws `plot_training` below the cell.

    At most once in `every` seconds, and at the end; outside a notebook nothing is drawn.
    """
    import time

    from IPython import get_ipython
    from IPython.display import display
    from transformers import TrainerCallback

    class LivePlot(TrainerCallback):
        handle, drawn = None, -math.inf

        def on_log(self, args, state, control, **kwargs):
            if not hasattr(get_ipython(), "kernel") or time.monotonic() - self.drawn < every:
                return
            figure, self.drawn = plot_training(state.log_history), time.monotonic()
            if self.handle is None:
                self.handle = display(figure, display_id=True)
            else:
                self.handle.update(figure)

        def on_train_end(self, args, state, control, **kwargs):
            self.drawn = -math.inf
            self.on_log(args, state, control)

    return LivePlot()


@_drawn
def plot_before_after(scores: Mapping[str, Mapping], *, unit: str = "score"):
    """Draw ``{score: {answerer: value}}`` as points with intervals.

    A value is a number, or a mapping with "value", "low" and "high" (None where there is no interval).

    Examples
    --------
    >>> interval = {"value": 0.6, "low": 0.5, "high": 0.7}
    >>> figure = plot_before_after({"name right": {"base": 0.1, "tuned": interval}})
    >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
    ['name right']
    """
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    figure, (axis,) = _axes(1, 1, 8, 1.2 + 0.32 * len(scores) * max(2, len(names)))
    for line, values in enumerate(scores.values()):
        for name, value in values.items():
            value = value if isinstance(value, Mapping) else {"value": value}
            if value["value"] is None:
                continue
            index = names.index(name)
            y, colour = line + (index - (len(names) - 1) / 2) * 0.7 / len(names), COLOURS[index % len(COLOURS)]
            if value.get("low") is not None:
                axis.plot([value["low"], value["high"]], [y, y], color=colour, linewidth=3, alpha=0.4)
            axis.plot(value["value"], y, marker="osD^v*P"[index % 7], color=colour, linestyle="", label=name)
            end = value["value"] if value.get("high") is None else value["high"]
            label = f"{value['value']:.3g}"
            axis.annotate(label, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(scores)), labels=[_wrap(score, 28) for score in scores])
    axis.set(ylim=(len(scores) - 0.45, -0.55), xmargin=0.08, xlabel=unit)
    axis.grid(True, axis="x")
    handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    axis.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


@_drawn
def show_answers(rows: Sequence[Mapping], *, width: int = 58):
    """Show picture, reference and answers side by side; words that the reference lacks are marked.

    Parameters
    ----------
    rows : mappings with `image`, `reference`, `answers` ({"base": text, "tuned": text}), and perhaps `roi`, `id`.
    width : letters in a line.

    Examples
    --------
    >>> from PIL import Image
    >>> row = {"image": Image.new("RGB", (64, 64)), "reference": "A spleen.", "answers": {"base": "A frame."}}
    >>> len(show_answers([row]).axes)
    3
    """
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker

    marked: dict = {"color": "#A03F00", "bbox": {"facecolor": "#FBE3D2", "edgecolor": "none", "pad": 1}}
    styles: dict[bool, dict] = {True: {"fontsize": 9}, False: {"fontsize": 9, **marked}}
    names = list(dict.fromkeys(name for row in rows for name in row["answers"]))
    texts = [[row["reference"], *(row["answers"].get(name, "") for name in names)] for row in rows]
    heights = [max(2.2, *(0.4 + 0.2 * (_wrap(text, width).count("\n") + 1) for text in line)) for line in texts]
    widths = [2.3] + [0.075 * width] * (1 + len(names))
    size = sum(widths), sum(heights) + 0.2
    figure, axes = _axes(len(rows), len(widths), *size, height_ratios=heights, width_ratios=widths)
    for (picture, *cells), row, line in zip(axes.reshape(-1, len(widths)), rows, texts, strict=True):
        _show(picture, row["image"])
        if row.get("roi") is not None:
            _box(picture, row["image"], row["roi"], COLOURS[0])
        picture.set_title(str(row.get("id", ""))[:18], fontsize=8, color=GREY)
        picture.set_anchor("N")
        for cell, name, text in zip(cells, ["reference", *names], line, strict=True):
            cell.axis("off")
            lines = _lines(same_words(text, line[0]) or [("(empty)", False)], width)
            parts = [[TextArea(word, textprops=styles[same]) for word, same in words] for words in lines]
            packed = [HPacker(children=children, pad=0, sep=0, align="baseline") for children in parts]
            title = TextArea(name, textprops={"fontsize": 12, "color": GREY})
            block = VPacker(children=[title, *packed], pad=0, sep=3, align="left")
            anchored = AnchoredOffsetbox("upper left", child=block, pad=0, borderpad=0.2, frameon=False)
            cell.add_artist(anchored).set_in_layout(False)
    return figure


@_drawn
def plot_heatmap(boxes: Sequence, *, title: str = "how often each place is covered", cells: int = 48):
    """Draw how often boxes (xyxy, 0..1) cover each place of the picture; boxes that are None are left out.

    Examples
    --------
    >>> plot_heatmap([[0.0, 0.0, 0.5, 0.5], None]).axes[0].get_title()
    'how often each place is covered (1 boxes)'
    """
    known = [box for box in boxes if box is not None]
    centres = (np.arange(cells) + 0.5) / cells
    cover = np.zeros((cells, cells))
    for x0, y0, x1, y1 in known:
        cover += np.outer((y0 <= centres) & (centres < y1), (x0 <= centres) & (centres < x1))
    figure, (axis,) = _axes(1, 1, 4.8, 4)
    shown = axis.imshow(cover / max(len(known), 1), cmap="viridis", vmin=0, extent=(0, 1, 1, 0))
    figure.colorbar(shown, ax=axis, label="share of the boxes")
    ticks, labels = [0, 1 / 3, 2 / 3, 1], ["0", "1/3", "2/3", "1"]
    axis.set(title=f"{title} ({len(known)} boxes)", xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels)
    axis.grid(True, color="white", alpha=0.4)  # the nine places that captions speak of
    return figure


@_drawn
def plot_lengths(lengths: Mapping[str, Sequence[int]], *, limit: int | None = None, unit: str = "tokens"):
    """Draw how long things are, one histogram a name, with an optional limit.

    Examples
    --------
    >>> plot_lengths({"answer": [80, 92, 101]}, limit=128).axes[0].get_xlabel()
    'tokens'
    """
    figure, (axis,) = _axes(1, 1, 8, 3)
    highest = max((max(values) for values in lengths.values() if len(values)), default=1)
    bins = np.linspace(0, max(highest, limit or 0) * 1.02 + 1, 41)
    for index, (name, values) in enumerate(lengths.items()):
        label = f"{name}: median {np.median(values):.0f}, longest {max(values)}" if len(values) else f"{name}: none"
        axis.hist(values, bins=bins, histtype="stepfilled", alpha=0.5, color=COLOURS[index % 7], label=label)
    if limit is not None:
        axis.axvline(limit, color="black", linestyle="--", label=f"limit {limit}")
    axis.set(xlabel=unit, ylabel="samples")
    axis.legend()
    return figure


@_drawn
def plot_bars(counts: Mapping[str, float], *, title: str = "", unit: str = "samples", highest: int = 30):
    """Draw numbers by name as horizontal bars, largest first; what is beyond the `highest` is summed up.

    Examples
    --------
    >>> [text.get_text() for text in plot_bars({"liver": 3, "spleen": 5}).axes[0].get_yticklabels()]
    ['spleen', 'liver']
    """
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) > highest:
        rest = ordered[highest - 1 :]
        ordered = [*ordered[: highest - 1], (f"{len(rest)} more", sum(value for _, value in rest))]
    figure, (axis,) = _axes(1, 1, 7, 0.9 + 0.24 * max(len(ordered), 2))
    bars = axis.barh(range(len(ordered)), [value for _, value in ordered], color=COLOURS[0])
    axis.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    axis.set_yticks(range(len(ordered)), labels=[name for name, _ in ordered], fontsize=9)
    axis.set(ylim=(len(ordered) - 0.4, -0.6), xmargin=0.1, xlabel=unit, title=title)
    return figure
