"""Figures: what they show is checked on the drawn objects; drawing must not warn."""

import io
import subprocess
import sys
import warnings
from types import SimpleNamespace

import IPython.display
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.text import Text
from PIL import Image
from transformers import TrainerState

from medtune import plots

IMAGE = Image.new("RGB", (200, 100), (60, 60, 60))
CHINESE = "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。"


def pixels(figure) -> np.ndarray:
    """Draw a figure, with every warning an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def texts(figure) -> list[str]:
    """All visible words of a figure."""
    return [text.get_text().strip() for text in figure.findobj(Text)]


def test_gallery_draws_boxes_at_the_right_pixels():
    rows = [
        {"image": IMAGE, "id": "a", "roi": [0.25, 0.5, 0.75, 1.0]},
        {"image": IMAGE, "id": "b", "roi": None},
        {"image": IMAGE, "id": "c", "roi": [0.0, 0.0, 1.0, 1.0], "has_box": True},
    ]
    figure = plots.show_gallery(rows, columns=2)
    first, second, third, spare = figure.axes
    box = first.patches[-1]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (49.5, 49.5, 100, 50)
    assert not second.patches and not third.patches, "no box known, and one drawn already"
    assert not spare.get_visible()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]
    pixels(figure)


def test_gallery_names_several_boxes_and_reads_converted_records():
    boxes = {"true": [0, 0, 0.5, 0.5], "found": [0, 0, 1, 1], "missed": None}
    figure = plots.show_gallery([{"images": [IMAGE]}], boxes=[boxes])
    assert {"true", "found"} <= set(texts(figure))
    colours = {patch.get_edgecolor() for patch in figure.axes[0].patches}
    assert len(colours) == 3, "white edges and a colour each"
    pixels(plots.show_gallery([{"images": [IMAGE]}], boxes=[{"missed": None}]))


def test_chinese_is_drawn_with_a_font_that_has_it():
    assert len(plots.font_families()) == 2, (
        "a font with Chinese characters: pip install noto-cjk-sans-otc"
    )
    rows = [
        {"image": IMAGE, "reference": CHINESE, "answers": {"base": CHINESE[:9], "tuned": CHINESE}}
    ]
    pixels(plots.show_answers(rows))  # a missing glyph would warn
    pixels(plots.show_gallery([{"image": IMAGE}], titles=[CHINESE]))
    one, other = (pixels(plots.plot_bars({name: 1})) for name in ("肝", "脾"))
    assert one.shape == other.shape and (one != other).any(), (
        "not the same empty box for every character"
    )


NO_FONT = """
import importlib.util, warnings
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if "noto" in name else find_spec(name)
from medtune import plots
plots.CHINESE[:] = ["no such font"]
plots.plot_bars({"肝": 1, "脾": 2}).savefig("bars.png")
"""


@pytest.mark.slow
def test_without_such_a_font_there_is_one_hint(tmp_path):
    command = [sys.executable, "-c", NO_FONT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.count("Warning") == 1 and "noto-cjk-sans-otc" in done.stderr
    assert (tmp_path / "bars.png").exists()


def test_losses_of_two_runs_stand_over_steps_and_over_samples():
    """25 steps of 1,024 samples and 202 of 128 see the same pairs: the published pair of runs."""
    logs = {}
    for name, steps in (("batch 32", 25), ("batch 4", 202)):
        log = [{"step": step, "loss": 1 + 3.0 / step} for step in range(1, steps + 1)]
        logs[name] = [*log, {"step": steps, "eval_loss": 1.5}]
    sizes = {"batch 32": 1024, "batch 4": 128}
    figure = plots.plot_losses(logs, samples_per_step=sizes)
    over_steps, over_samples = figure.axes
    ends = [[line.get_xdata()[-1] for line in axis.lines] for axis in figure.axes]
    assert ends == [[25, 25, 202, 202], [25600, 25600, 25856, 25856]]
    assert over_steps.get_xlabel() == "optimizer step"
    assert over_samples.get_xlabel() == "samples seen"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(logs)
    colours = {line.get_color() for line in over_steps.lines}
    assert len(colours) == 2, "one a run"
    pixels(figure)


def test_a_run_whose_step_is_not_known_is_drawn_over_steps_only():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    evaluated = [{"step": 2, "eval_loss": 1.5}]
    figure = plots.plot_losses({"a": log, "b": evaluated}, samples_per_step={"a": None})
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["a", "b"]
    pixels(figure)
    first, second = plots.plot_losses({"a": log, "b": log}, samples_per_step={"b": 8}).axes
    assert (len(first.lines), len(second.lines)) == (2, 1)


def test_training_curves_show_all_points():
    steps = range(1, 6)
    log = [{"step": n, "loss": 3.0 / n, "mean_token_accuracy": n / 10} for n in steps]
    log.append({"step": 5, "eval_loss": 1.0, "eval_mean_token_accuracy": 0.5, "eval_runtime": 9})
    log.append({"train_runtime": 3})
    loss, accuracy = plots.plot_training(log).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(n, 3.0 / n) for n in steps])
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [(5, 1.0)])
    np.testing.assert_allclose(accuracy.lines[1].get_xydata(), [(5, 0.5)])
    pixels(plots.plot_training([]))


@pytest.mark.parametrize(
    "losses", [(12.0, 3.0, 0.1), (2.0, 1.5), (1.61, 1.6), (9.0, 0.001), (1e5, 1e-4), (2.0,)]
)
def test_the_loss_has_a_logarithmic_axis_with_plain_numbers(losses):
    log = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    figure = plots.plot_training(log)
    pixels(figure)
    axis = figure.axes[0]
    assert axis.get_yscale() == "log" and figure.axes[1].get_yscale() == "linear"
    low, high = axis.get_ylim()
    shown = []
    for place, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True):
        if low <= place <= high:
            shown.append(place)
            assert float(label.get_text()) == pytest.approx(place, rel=1e-3), "no power of ten"
    assert len(shown) >= 2, "so that one can read the scale"


def test_a_loss_of_zero_or_below_is_drawn_on_a_linear_axis():
    log = [{"step": 1, "loss": 0.2}, {"step": 2, "loss": 0.0}, {"step": 3, "loss": -0.1}]
    figure = plots.plot_training(log)
    assert figure.axes[0].get_yscale() == "linear"
    pixels(figure)


def test_live_plot_redraws_one_figure(monkeypatch):
    shown, updates = [], []

    class Handle:
        def update(self, figure):
            updates.append(figure)

    def display(figure, display_id):
        shown.append(figure)
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    state = TrainerState(log_history=[{"step": 1, "loss": 2.0}])
    silent = plots.live_plot()
    silent.on_log(None, state, None)
    assert not shown, "outside a notebook nothing is drawn"
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    callback = plots.live_plot(every=3600)
    callback.on_log(None, state, None)
    callback.on_log(None, state, None)
    assert (len(shown), len(updates)) == (1, 0)
    callback.on_train_end(None, state, None)
    assert (len(shown), len(updates)) == (1, 1), "the end is always drawn"


def test_scores_show_value_and_interval():
    scores = {
        "name right": {"base": 0.0, "tuned": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "BLEU-4": {
            "base": {"value": 0.1, "low": None, "high": None},
            "tuned": {"value": None, "low": None},
        },
    }
    figure = plots.plot_before_after(scores)
    (axis,) = figure.axes
    lines = [line.get_xdata().tolist() for line in axis.lines]
    assert lines == [[0.0], [0.4, 0.6], [0.5], [0.1]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["base", "tuned"]
    assert {"name right", "BLEU-4", "0.5"} <= set(texts(figure))
    pixels(figure)


def test_answers_mark_what_the_reference_lacks():
    answers = {"base": "", "tuned": "The right kidney."}
    rows = [{"image": IMAGE, "reference": "The left kidney.", "answers": answers}]
    figure = plots.show_answers(rows)
    colour = {text.get_text().strip(): text.get_color() for text in figure.axes[3].findobj(Text)}
    assert colour["right"] != colour["The"] == colour["kidney."]
    assert "(empty)" in texts(figure)
    pixels(figure)
    endless = {"base": "lung" * 99, "tuned": "肺" * 99}
    pixels(plots.show_answers([{"image": IMAGE, "reference": "A lung.", "answers": endless}]))


@given(st.text(alphabet="ab .肝脾，", max_size=40), st.text(alphabet="ab .肝脾，", max_size=40))
def test_word_differences(text, reference):
    marked = plots.same_words(text, reference)
    words = [word for word, _ in marked]
    assert "".join(words) == "".join(plots.split_words(text)), "no word is lost"
    assert all(same for _, same in plots.same_words(text, text))
    assert sum(same for _, same in marked) <= len(plots.split_words(reference))


@given(st.text(alphabet="abc 肝脾，", max_size=200), st.integers(8, 60))
@example("aa，，，，", 8)
def test_wrapped_lines_keep_words_and_width(text, width):
    lines = plots._wrap(text, width).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(plots._text_width(line) <= width for line in lines)


LOW, HIGH = st.floats(0, 0.5), st.floats(0.5, 1)
BOX = st.tuples(LOW, LOW, HIGH, HIGH)


@settings(max_examples=15, deadline=None)
@given(st.lists(BOX, min_size=1, max_size=5))
def test_heatmap_shares_are_those_of_the_boxes(boxes):
    cover = plots.plot_heatmap([*boxes, None], cells=12).axes[0].images[0].get_array()
    x, y = 7, 3  # a cell: its centre counts
    x_centre, y_centre = (x + 0.5) / 12, (y + 0.5) / 12
    inside = [x0 <= x_centre < x1 and y0 <= y_centre < y1 for x0, y0, x1, y1 in boxes]
    assert cover[y, x] == pytest.approx(np.mean(inside))


def test_lengths_and_bars_count_right():
    lengths = {"question": [10, 12], "answer": [80, 90, 100], "none": []}
    figure = plots.plot_lengths(lengths, limit=128)
    labels = {
        "question: median 11, longest 12",
        "answer: median 90, longest 100",
        "none: none",
        "limit 128",
    }
    assert labels <= set(texts(figure))
    pixels(figure)
    counts = {f"structure {number}": number for number in range(50)}
    (axis,) = plots.plot_bars(counts, highest=10).axes
    assert [bar.get_width() for bar in axis.patches] == [*range(49, 40, -1), sum(range(41))]
    assert axis.get_yticklabels()[-1].get_text() == "41 more"
    pixels(axis.figure)


def test_no_figure_stays_open():
    plots.plot_bars({"a": 1})
    assert plt.get_fignums() == []
