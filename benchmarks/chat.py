"""Twenty people at once on the chat page with the tiny model: does everybody get an answer, and how long do they wait?

    python benchmarks/chat.py --adapter papermill_runs/tiny-cpu/out/03_finetune_lora/adapter

Every visitor uploads a picture of their own and asks `--questions` questions; no more requests than that are sent.
First all come one after the other, then at once. Prints one JSON object: answers, errors, visitors whose answers
differ from those they got alone, and seconds: to the first token without others, and until both answers stand there.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client, handle_file
from PIL import Image

from medtune import chat

QUESTION = "Describe this medical image."


def visit(url: str, picture: Path, questions: int, tokens: int) -> dict:
    """One visitor: the last pair of answers, the seconds of each question, or the error."""
    seconds, said = [], []
    try:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": 120})  # the crowd shares a core or two with us
        client.predict([handle_file(picture)], 0, api_name="/upload")
        for _ in range(questions):
            start = time.perf_counter()
            *_, base, tuned = client.predict(QUESTION, False, tokens, 1, "", 0, api_name="/ask")
            seconds.append(time.perf_counter() - start)
            said.append([side[-1]["content"][0]["text"].rpartition("\n\n")[0] for side in (base, tuned)])
    except Exception as error:  # whatever goes wrong for a visitor is what we count
        return {"error": repr(error)[:300]}
    return {"seconds": seconds, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/tiny-vlm")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    models = chat.load_models(args.model, args.adapter)
    with tempfile.TemporaryDirectory() as folder:
        pictures = []
        for n in range(args.visitors):  # each sees another picture
            pictures.append(Path(folder, f"{n}.png"))
            Image.radial_gradient("L").rotate(18 * n).crop((0, 0, 256, 100 + 7 * n)).save(pictures[-1])
        page = chat.launch(models, feedback=folder, examples=[])
        try:
            alone = [visit(page.local_url, picture, args.questions, args.tokens) for picture in pictures]
            asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
            first = [next(chat.answer(models, "base", asked, [Image.open(pictures[0])]))["first"] for _ in range(3)]
            with ThreadPoolExecutor(args.visitors) as pool:
                start = time.perf_counter()
                crowd = list(pool.map(lambda p: visit(page.local_url, p, args.questions, args.tokens), pictures))
                wall = time.perf_counter() - start
        finally:
            page.close()
    served = [(one, other) for one, other in zip(crowd, alone, strict=True) if "said" in one and "said" in other]
    waits = [second for one, _ in served for second in one["seconds"]]
    result = {
        "visitors": args.visitors,
        "questions": args.visitors * args.questions,
        "answered": sum(len(one["said"]) for one, _ in served),
        "errors": [one["error"] for one in [*crowd, *alone] if "error" in one],
        "other_than_alone": sum(one["said"] != other["said"] for one, other in served),
        "first_token_seconds_alone": round(max(first), 3),
        "both_answers_seconds_alone": round(statistics.median(s for one in alone for s in one.get("seconds", [0])), 2),
        "both_answers_seconds_median": round(statistics.median(waits), 2) if waits else None,
        "both_answers_seconds_longest": round(max(waits), 2) if waits else None,
        "wall_seconds": round(wall, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
