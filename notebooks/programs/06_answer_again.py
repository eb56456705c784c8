"""Load a saved model, ask about held-out pictures and print the answers.

    python 06_answer_again.py MODEL RECORDS --samples 20 > answers.json

It knows the folder and nothing of the notebook that wrote it.
"""

import argparse
import json

from medtune.answers import generate_answers
from medtune.models import load_base, load_processor
from medtune.records import read_records

parser = argparse.ArgumentParser(description="Answer again, from a saved model.")
parser.add_argument("model", help="folder with the saved model")
parser.add_argument("records", help="folder with the records of 02")
parser.add_argument(
    "--samples", type=int, default=20, help="held-out pairs to ask about"
)
parser.add_argument("--batch-size", type=int, default=10)
parser.add_argument("--max-new-tokens", type=int, default=160, help="longest answer")
parser.add_argument("--dtype", default="float32")
parser.add_argument("--device", default="cpu")
parser.add_argument("--seed", type=int, default=0, help="choice of the pairs")
chosen = parser.parse_args()

test = read_records(chosen.records, "test").shuffle(seed=chosen.seed)
test = test.select(range(min(chosen.samples, len(test))))
processor = load_processor(chosen.model)
model = load_base(chosen.model, dtype=chosen.dtype, device_map={"": chosen.device})

answers = generate_answers(
    model,
    processor,
    test,
    batch_size=chosen.batch_size,
    max_new_tokens=chosen.max_new_tokens,
    seed=chosen.seed,
)
# one line of JSON, after whatever the libraries may have printed
print(json.dumps([row["answer"] for row in answers]))
