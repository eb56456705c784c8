"""Figures: what they show is checked on the drawn objects, and that they can be drawn without a warning."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medtune import plots

IMAGE = Image.new("RGB", (200, 100), (60, 60, 60))
CHINESE = "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。"


def pixels(figure) -> np.ndarray:
    """Draw a figure, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(file := io.BytesIO(), format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def texts(figure) -> list[str]:
    """All visible words of a figure."""
    from matplotlib.text import Text

    return [text.get_text().strip() for text in figure.findobj(Text)]


def test_gallery_draws_boxes_at_the_right_pixels():
    rows = [{"image": IMAGE, "id": "a", "roi": [0.25, 0.5, 0.75, 1.0]}, {"image": IMAGE, "id": "b", "roi": None}]
    rows.append({"image": IMAGE, "id": "c", "roi": [0.0, 0.0, 1.0, 1.0], "has_box": True})
    figure = plots.show_gallery(rows, columns=2)
    first, second, third, spare = figure.axes
    box = first.patches[-1]
    assert (*box.get_xy(), box.get_width(), box.get_height()) == (49.5, 49.5, 100, 50)
    assert not second.patches and not third.patches, "no box known, and one drawn already"
    assert not spare.get_visible()
    assert [axis.get_title() for axis in figure.axes[:3]] == ["a", "b", "c"]
    pixels(figure)


def test_gallery_names_several_boxes_and_reads_converted_records():
    figure = plots.show_gallery([{"images": [IMAGE]}], boxes=[{"true": [0, 0, 0.5, 0.5], "found": [0, 0, 1, 1]}])
    assert {"true", "found"} <= set(texts(figure))
    colours = {patch.get_edgecolor() for patch in figure.axes[0].patches}
    assert len(colours) == 3, "white edges and a colour each"


def test_chinese_is_drawn_with_a_font_that_has_it():
    assert len(plots.font_families()) == 2, "a font with Chinese characters: pip install noto-cjk-sans-otc"
    rows = [{"image": IMAGE, "reference": CHINESE, "answers": {"base": CHINESE[:9], "tuned": CHINESE}}]
    for figure in (plots.show_answers(rows), plots.show_gallery([{"image": IMAGE}], titles=[CHINESE])):
        pixels(figure)  # a missing glyph would warn
    one, other = (pixels(plots.plot_bars({name: 1})) for name in ("肝", "脾"))
    assert one.shape == other.shape and (one != other).any(), "not the same empty box for every character"


NO_FONT = """
import importlib.util, warnings
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: None if "noto" in name else find(name)
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


def test_training_curves_show_all_points():
    log = [{"step": step, "loss": 3.0 / step, "mean_token_accuracy": step / 10} for step in range(1, 6)]
    log += [{"step": 5, "eval_loss": 1.0, "eval_mean_token_accuracy": 0.5, "eval_runtime": 9}, {"train_runtime": 3}]
    loss, accuracy = plots.plot_training(log).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [(step, 3.0 / step) for step in range(1, 6)])
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [(5, 1.0)])
    np.testing.assert_allclose(accuracy.lines[1].get_xydata(), [(5, 0.5)])
    pixels(plots.plot_training([]))


def test_live_plot_redraws_one_figure(monkeypatch):
    import IPython.display
    from transformers import TrainerState

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
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    callback = plots.live_plot(every=3600)
    callback.on_log(None, state, None)
    callback.on_log(None, state, None)
    assert (len(shown), len(updates)) == (1, 0)
    callback.on_train_end(None, state, None)
    assert (len(shown), len(updates)) == (1, 1), "the end is always drawn"


def test_scores_show_value_and_interval():
    scores = {
        "name right": {"base": 0.0, "tuned": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "BLEU-4": {"base": {"value": 0.1, "low": None, "high": None}, "tuned": {"value": None, "low": None}},
    }
    figure = plots.plot_before_after(scores)
    (axis,) = figure.axes
    lines = [line.get_xdata().tolist() for line in axis.lines]
    assert lines == [[0.0], [0.4, 0.6], [0.5], [0.1]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["base", "tuned"]
    assert {"name right", "BLEU-4", "0.5"} <= set(texts(figure))
    pixels(figure)


def test_answers_mark_what_the_reference_lacks():
    rows = [{"image": IMAGE, "reference": "The left kidney.", "answers": {"base": "", "tuned": "The right kidney."}}]
    figure = plots.show_answers(rows)
    from matplotlib.text import Text

    colour = {text.get_text().strip(): text.get_color() for text in figure.axes[3].findobj(Text)}
    assert colour["right"] != colour["The"] == colour["kidney."]
    assert "(empty)" in texts(figure)
    pixels(figure)
    endless = [{"image": IMAGE, "reference": "A lung.", "answers": {"base": "lung" * 99, "tuned": "肺" * 99}}]
    pixels(plots.show_answers(endless))


@given(st.text(alphabet="ab .肝脾，", max_size=40), st.text(alphabet="ab .肝脾，", max_size=40))
def test_word_differences(text, reference):
    marked = plots.same_words(text, reference)
    assert "".join(word for word, _ in marked) == "".join(plots.split_words(text)), "no word is lost"
    assert all(same for _, same in plots.same_words(text, text))
    assert sum(same for _, same in marked) <= len(plots.split_words(reference))


@given(st.text(alphabet="abc 肝脾，", max_size=200), st.integers(8, 60))
@example("aa，，，，", 8)
def test_wrapped_lines_keep_words_and_width(text, width):
    lines = plots._wrap(text, width).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(plots._width(line) <= width for line in lines)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.5, 1)] * 2), min_size=1, max_size=5))
def test_heatmap_shares_are_those_of_the_boxes(boxes):
    cover = plots.plot_heatmap([*boxes, None], cells=12).axes[0].images[0].get_array()
    x, y = 7, 3  # a cell: its centre counts
    inside = [x0 <= (x + 0.5) / 12 < x1 and y0 <= (y + 0.5) / 12 < y1 for x0, y0, x1, y1 in boxes]
    assert cover[y, x] == pytest.approx(np.mean(inside))


def test_lengths_and_bars_count_right():
    figure = plots.plot_lengths({"question": [10, 12], "answer": [80, 90, 100], "none": []}, limit=128)
    labels = texts(figure)
    assert {"question: median 11, longest 12", "answer: median 90, longest 100", "none: none", "limit 128"} <= set(
        labels
    )
    pixels(figure)
    counts = {f"structure {number}": number for number in range(50)}
    (axis,) = plots.plot_bars(counts, highest=10).axes
    assert [bar.get_width() for bar in axis.patches] == [*range(49, 40, -1), sum(range(41))]
    assert axis.get_yticklabels()[-1].get_text() == "41 more"
    pixels(axis.figure)


def test_no_figure_stays_open():
    from matplotlib import pyplot as plt

    plots.plot_bars({"a": 1})
    assert plt.get_fignums() == []
