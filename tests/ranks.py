"""What one rank does in tests/test_launch.py: trainings one after the other, so that one start serves many tests.

    torchrun ... tests/ranks.py runs.json

A run is a list of arguments for `medtune.train`, or ["probe", folder, *arguments]: then rank 0 also writes logits and
greedy answers of the live model, as it stands in shards over the ranks after training. ["fail", rank,
*arguments] breaks off on that rank.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from trl import SFTTrainer

from medtune import train


def probe(trainer, folder: Path) -> None:
    """Logits and greedy answers for the first two samples, the same on every rank."""
    rows = [trainer.train_dataset[i] for i in range(2)]
    batch = trainer.data_collator([dict(row) for row in rows])
    batch.pop("labels")
    live = getattr(trainer.model_wrapped, "module", trainer.model_wrapped).eval()
    with torch.no_grad():
        found = {"logits": live(**batch).logits}
    prompts = [trainer.processing_class.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    inputs = trainer.processing_class(
        images=[row["images"] for row in rows], text=prompts, return_tensors="pt", padding=True, padding_side="left"
    )
    found["answer"] = live.generate(**inputs, max_new_tokens=8, do_sample=False, synced_gpus=True)
    if trainer.args.process_index == 0:
        torch.save({"batch": dict(batch), "inputs": dict(inputs)} | found, folder / "probe.pt")


def failing(rank: int, **keywords):
    """A trainer that breaks off on one rank, after a step."""
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
            script_args, training_args, model_args = train.parse_arguments(run[2:])
            trainer = train.build_trainer(script_args, training_args, model_args)
            train.run(trainer, script_args, model_args)
            probe(trainer, Path(run[1]))
        elif run[0] == "fail":
            train.main(run[2:], trainer_class=partial(failing, int(run[1])))
        else:
            train.main(run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
