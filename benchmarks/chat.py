"""Twenty people at once on the chat page: does everybody get an answer, and how long do they wait?

    python benchmarks/chat.py --adapter papermill_runs/tiny-cpu/out/03_finetune_lora/adapter

Every visitor uploads a picture of their own and asks `--questions` questions of the tiny model; no
more requests than that are sent. First all come one after the other, then at once. Prints one JSON
object: answers, errors, visitors whose answers differ from those they got alone, and seconds: to
the first token without others, and until both answers stand there.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from _harness import Stopwatch, make_parser
from gradio_client import Client, handle_file
from PIL import Image

from medtune import chat

QUESTION = "Describe this medical image."


@dataclass
class Visit:
    """What a visitor saw.

    Parameters
    ----------
    seconds : until both answers to a question stood there.
    answers : the answer of the base and of the tuned model, for each question.
    error : what went wrong, or "".
    """

    seconds: list[float] = field(default_factory=list)
    answers: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""


def text_of(conversation: list[dict[str, Any]]) -> str:
    """Pick the last answer out of one side of the page, without the line on its speed."""
    return conversation[-1]["content"][0]["text"].rpartition("\n\n")[0]


def visit(picture: Path, url: str, questions: int, tokens: int) -> Visit:
    """Come as one visitor, who uploads a picture and asks."""
    seen = Visit()
    try:
        # the crowd shares a core or two with us
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 120})
        client.predict([handle_file(picture)], 0, api_name="/upload")
        for _ in range(questions):
            start = time.perf_counter()
            *_, base, tuned = client.predict(QUESTION, False, tokens, 1, "", 0, api_name="/ask")
            seen.seconds.append(time.perf_counter() - start)
            seen.answers.append((text_of(base), text_of(tuned)))
    except Exception as error:
        # whatever goes wrong for a visitor is what we count
        return Visit(error=repr(error)[:300])
    return seen


def make_pictures(folder: str, visitors: int) -> list[Path]:
    """Save a picture for each visitor, all of them different."""
    pictures = []
    for number in range(visitors):
        picture = Path(folder, f"{number}.png")
        gradient = Image.radial_gradient("L").rotate(18 * number)
        gradient.crop((0, 0, 256, 100 + 7 * number)).save(picture)
        pictures.append(picture)
    return pictures


def first_token_seconds(models: chat.ChatModels, picture: Path) -> float:
    """Give the longest wait for a first token, of three questions that nobody disturbs."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    asked = [{"role": "user", "content": content}]
    waits = []
    for _ in range(3):
        said = next(chat.answer(models, "base", asked, [Image.open(picture)]))
        waits.append(said.first)
    return max(waits)


def summarise(alone: Sequence[Visit], crowd: Sequence[Visit]) -> dict[str, Any]:
    """Compare the visits of all at once with those of each alone."""
    answered = 0
    different = 0
    waits = []
    for together, before in zip(crowd, alone, strict=True):
        if together.error or before.error:
            continue
        answered += len(together.answers)
        different += together.answers != before.answers
        waits += together.seconds
    waits_alone = []
    for before in alone:
        waits_alone += [0] if before.error else before.seconds
    return {
        "answered": answered,
        "errors": [seen.error for seen in (*crowd, *alone) if seen.error],
        "other_than_alone": different,
        "both_answers_seconds_alone": round(statistics.median(waits_alone), 2),
        "both_answers_seconds_median": round(statistics.median(waits), 2) if waits else None,
        "both_answers_seconds_longest": round(max(waits), 2) if waits else None,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="data/tiny-vlm")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    models = chat.load_models(args.model, args.adapter)
    with tempfile.TemporaryDirectory() as folder:
        pictures = make_pictures(folder, args.visitors)
        page = chat.launch(models, feedback=folder, examples=[])
        come = partial(visit, url=page.local_url, questions=args.questions, tokens=args.tokens)
        try:
            alone = [come(picture) for picture in pictures]
            first = first_token_seconds(models, pictures[0])
            watch = Stopwatch()
            with ThreadPoolExecutor(args.visitors) as pool:
                crowd = list(pool.map(come, pictures))
            wall = watch.read().wall
        finally:
            page.close()
    result = {
        "visitors": args.visitors,
        "questions": args.visitors * args.questions,
        **summarise(alone, crowd),
        "first_token_seconds_alone": round(first, 3),
        "wall_seconds": round(wall, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
