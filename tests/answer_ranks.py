"""What one rank does in tests/test_answers_ranks.py: it answers its share of the questions.

    torchrun ... tests/answer_ranks.py OUT SECONDS [KEY=VALUE ...]

Each picture takes so many seconds, so that there is time for a kill. With "-" for OUT the answers
are only returned. With beside=FOLDER each rank writes there what it got, and how many pictures it
saw itself.
"""

import json
import os
import sys
import time
from pathlib import Path

import tiny_qwen
import torch

from medtune.answers import generate_answers


def main(out: str, seconds: str, *settings: str) -> None:
    """Answer the questions, and note what this rank got."""
    torch.set_num_threads(1)
    options = {}
    beside = None
    for setting in settings:
        key, value = setting.split("=")
        if key == "beside":
            beside = Path(value)
        else:
            options[key] = json.loads(value)

    seen = 0

    def slowly(image):
        nonlocal seen
        seen += 1
        time.sleep(float(seconds))
        return image

    processor = tiny_qwen.make_processor()
    answers = generate_answers(
        tiny_qwen.make_model(processor),
        processor,
        tiny_qwen.make_records(),
        out=None if out == "-" else out,
        batch_size=2,
        max_new_tokens=24,
        image_transform=slowly,
        **options,
    )
    if beside:
        told = {"answers": answers, "seen": seen}
        (beside / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
