"""What one rank does in tests/test_training_launch.py: trainings one after the other.

    torchrun ... tests/training_ranks.py runs.json

So one start serves many tests. A run is a list of arguments for `medtune.training`, or
["probe", folder, *arguments]: then rank 0 also writes logits and greedy answers of the live model,
as it stands in shards over the ranks after training. ["fail", rank, *arguments] breaks off on that
rank.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from trl import SFTTrainer

from medtune import training


def train_and_probe(folder: Path, words: list[str]) -> None:
    """Train; then compute logits and greedy answers for the first two samples, on every rank."""
    script_args, training_args, model_args = training.parse_arguments(words)
    trainer = training.build_trainer(script_args, training_args, model_args)
    training.train_model(trainer, script_args, model_args)

    rows = [trainer.train_dataset[number] for number in range(2)]
    batch = trainer.data_collator([dict(row) for row in rows])
    batch.pop("labels")
    live = getattr(trainer.model_wrapped, "module", trainer.model_wrapped).eval()
    with torch.no_grad():
        logits = live(**batch).logits

    processor = trainer.processing_class
    prompts = []
    for row in rows:
        prompts.append(processor.apply_chat_template(row["prompt"], add_generation_prompt=True))
    inputs = processor(
        images=[row["images"] for row in rows],
        text=prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    answer = live.generate(**inputs, max_new_tokens=8, do_sample=False, synced_gpus=True)
    if trainer.args.process_index == 0:
        found = {"batch": dict(batch), "inputs": dict(inputs), "logits": logits, "answer": answer}
        torch.save(found, folder / "probe.pt")


def failing(rank: int, **keywords):
    """Make a trainer that breaks off on one rank, after a step."""
    trainer = SFTTrainer(**keywords)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 1 and trainer.args.process_index == rank:
            raise OSError("the disk of this rank is broken")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    return trainer


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        if run[0] == "probe":
            train_and_probe(Path(run[1]), run[2:])
        elif run[0] == "fail":
            training.main(run[2:], trainer_class=partial(failing, int(run[1])))
        else:
            training.main(run)
    training.leave_ranks()
