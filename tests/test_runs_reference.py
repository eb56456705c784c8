"""References: small executed copies of finished runs, without machine paths and pictures."""

# ruff: noqa: F811 (the fixture root comes from small_runs)

import base64
import io
import os
import sys

import nbformat
import pytest
from PIL import Image
from small_runs import root, write_notebook  # noqa: F401

from medtune import runs


def test_a_reference_is_small_and_names_no_machine(root):
    with pytest.raises(ValueError, match="no finished 01_look"):
        runs.write_reference("small", root=root)
    places = "import os, sys; print(os.path.abspath('x'), sys.executable, sys.prefix)"
    write_notebook(root, "02_train", body=places)
    runs.run("small", root=root)
    with pytest.raises(ValueError, match="use smaller figures"):
        runs.write_reference("small", root=root, max_mb=0.001)
    assert not (root / "papermill_runs" / "reference").exists()
    target = runs.write_reference("small", root=root)
    assert sorted(os.listdir(target)) == ["01_look.ipynb", "02_train.ipynb", "summary.json"]
    text = (target / "02_train.ipynb").read_text()
    assert str(root) not in text
    assert sys.executable not in text and sys.prefix not in text
    assert [row["run"] for row in runs.list_runs(root)] == ["small"]


def test_a_reference_of_own_data_is_refused_unless_it_is_wanted(root):
    (root / "mine.csv").write_text("image,caption")
    runs.run("small", overrides={"data": str(root / "mine.csv")}, new_name="mine", root=root)
    with pytest.raises(ValueError, match="own_data=True"):
        runs.write_reference("mine", root=root)
    assert not (root / "papermill_runs" / "reference").exists()
    assert runs.write_reference("mine", root=root, own_data=True).is_dir()


def test_a_reference_hands_no_patient_pictures_on(root):
    draw = """from IPython.display import display
display({"image/" + "png": "aGk=", "text/plain": "figure"}, raw=True)"""
    path = write_notebook(root, "01_look", body=draw)
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if cell.source == draw)
    cell.metadata["tags"] = ["shows-pictures"]
    nbformat.write(notebook, path)
    runs.run("small", root=root)
    executed = root / "papermill_runs" / "small" / "out" / "01_look.ipynb"
    assert "image/png" in executed.read_text()
    kept = (runs.write_reference("small", root=root) / "01_look.ipynb").read_text()
    nbformat.validate(nbformat.reads(kept, 4))
    assert "image/png" not in kept and "run the notebook to see it" in kept


def test_bars_and_log_lines_are_left_out_and_results_stay(root):
    body = """from tqdm.auto import tqdm
for _ in tqdm(range(3)):
    pass
print("[2026-11-30 07:31:20,066] [WARNING] [real_accelerator.py:213:get_accelerator] Setting")
print("[2026-11-30] a line of our own")
import sys
print("a library warns", file=sys.stderr)
from tqdm.notebook import tqdm as bar
list(bar(range(2)))"""
    write_notebook(root, "01_look", body=body)
    runs.run("small", root=root)
    executed = (root / "papermill_runs" / "small" / "out" / "01_look.ipynb").read_text()
    assert "widget-view" in executed and "real_accelerator.py:213:get" in executed
    kept = nbformat.reads(
        (runs.write_reference("small", root=root) / "01_look.ipynb").read_text(), 4
    )
    nbformat.validate(kept)
    (cell,) = [cell for cell in kept.cells if cell.source == body]
    said = [output.get("text", "") for output in cell.outputs]
    assert "[2026-11-30] a line of our own\n" in said
    assert not any("real_accelerator" in text or "2/2" in text or "warns" in text for text in said)


DRAW = """import base64, io
from IPython.display import display
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (1600, 400), color).save(file, "PNG")
print("drawn in", color)
display({"image/" + "png": base64.b64encode(file.getvalue()).decode(), "text/plain": "f"}, raw=True)"""


def draw_in_first(root, color: str, tags: tuple = ("shows-pictures",)) -> None:
    """Let notebook 01 draw a figure of a patient in the colour that the run's data are called."""
    path = write_notebook(root, "01_look", body=f"color = {color}\n" + DRAW)
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if cell.source.endswith(DRAW))
    cell.metadata["tags"] = list(tags)
    nbformat.write(notebook, path)


def figures_of(notebook) -> list[tuple]:
    """The types, sizes and colours of the figures of an executed notebook."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind, content in output.get("data", {}).items():
                if kind.startswith("image/"):
                    picture = Image.open(io.BytesIO(base64.b64decode(content)))
                    found.append((kind, picture.size, picture.convert("RGB").getpixel((0, 0))))
    return found


def test_figures_of_a_run_that_may_be_shown_take_the_place_of_a_patients(root):
    draw_in_first(root, '"red" if data == "sample" else "blue"')
    runs.run("small", root=root)
    kept = runs.write_reference("small", root=root) / "01_look.ipynb"
    # as other programs save it, in lines
    nbformat.write(nbformat.read(kept, 4), kept)
    drawn = {"data": str(root / "drawn.csv")}
    (root / "drawn.csv").write_text("image,caption")
    runs.run("small", overrides=drawn, new_name="drawn", root=root)

    for _ in range(2):  # a second time changes nothing
        (lent,) = runs.lend_pictures("small", "drawn", root=root)
        assert lent.startswith("01_look: ")
        kept = nbformat.read(root / "papermill_runs" / "reference" / "small" / "01_look.ipynb", 4)
        nbformat.validate(kept)
        ((kind, size, (red, _, blue)),) = figures_of(kept)
        assert (kind, size) == ("image/jpeg", (1000, 250)) and blue > 250 and red < 5
        text = nbformat.writes(kept)
        # what the reference's own run printed stays, and a line says whose the figure is
        assert "drawn in red" in text and "drawn in blue" not in text
        assert text.count("on a drawn body") == 1 and "run the notebook to see it)" not in text


def test_a_figure_is_lent_by_the_same_code_and_by_no_patient(root):
    draw_in_first(root, '"red"')
    runs.run("small", root=root)
    with pytest.raises(ValueError, match="there is no reference 'small'"):
        runs.lend_pictures("small", "small", root=root)
    runs.write_reference("small", root=root)
    with pytest.raises(ValueError, match="is on the sample, whose pictures show a patient"):
        runs.lend_pictures("small", "small", root=root)
    (root / "drawn.csv").write_text("image,caption")
    drawn = {"data": str(root / "drawn.csv")}
    runs.run("small", overrides=drawn, new_name="drawn", root=root)
    draw_in_first(root, '"green"')
    runs.run("drawn", root=root)
    assert runs.lend_pictures("small", "drawn", root=root) == []


def test_pictures_of_a_file_of_its_own_are_not_lent(root):
    draw_in_first(root, '"red"', tags=("shows-pictures", "own-pictures"))
    runs.run("small", root=root)
    runs.write_reference("small", root=root)
    (root / "drawn.csv").write_text("image,caption")
    runs.run("small", overrides={"data": str(root / "drawn.csv")}, new_name="drawn", root=root)
    assert runs.lend_pictures("small", "drawn", root=root) == []
