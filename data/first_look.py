"""The first minute of the course: one held-out slice of a real CT, and what the base model says of
it, before the sample set is built.

python data/first_look.py
"""

import io
import sys
import time
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))
import build_sample  # noqa: E402

# A slice of the chest that nobody is trained on.
HELD_OUT = 84
QUESTION = "Describe this medical image."


def draw_region(level: int) -> dict:
    """Draw the first region of a held-out slice that is shown with its box, as the sample has it."""
    # the course's CT as scanned: a held-out slice is of the scanned person
    build_sample.SOURCE = build_sample.course_source(people=0)
    rows = build_sample.make_rows(build_sample.Job(level, seed=0))
    return next(row for row in rows if row["has_box"])


def ask_base(picture: Image.Image) -> str:
    """Ask the tiny base model about a picture."""
    # the libraries take longer to load than the CT: the slice is drawn first
    import transformers

    from medtune import models
    from medtune.answers import generate_answers

    transformers.utils.logging.disable_progress_bar()
    processor = models.load_processor(FOLDER / "tiny-vlm")
    model = models.load_base(FOLDER / "tiny-vlm", dtype="float32")
    rows = [{"id": "first", "image": picture, "caption": ""}]
    said = generate_answers(model, processor, rows, question=QUESTION, max_new_tokens=160)
    return said[0]["answer"]


def main() -> None:
    start = time.perf_counter()
    row = draw_region(HELD_OUT)
    answer = ask_base(Image.open(io.BytesIO(row["image"]["bytes"])))
    print(f"A slice of a real CT that no model here was trained on, and a question: {QUESTION}")
    print(f"\nThe base model:   {answer}")
    print(f"\nWhat is true:     {row['caption']}")
    print("\nIt sees where and what kind. It names no organ: that is what the course teaches it.")
    print(f"({time.perf_counter() - start:.0f} seconds)\n")


if __name__ == "__main__":
    main()
