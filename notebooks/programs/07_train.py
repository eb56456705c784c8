"""Train with a box head and a match head, as `python -m medtune.training` does without.

    torchrun --nproc-per-node 2 07_train.py heads.json --config train.yaml

`heads.json` has what `MultiTaskModel`, `MultiTaskCollator` and `MultiTaskTrainer` are
told beyond the keys of the YAML file. In `output_dir` there will be `log.json` and the
folder `model`: the adapter, and the two heads beside it.
"""

import json
import sys
from pathlib import Path

from medtune import training
from medtune.multitask import MultiTaskCollator, MultiTaskModel, MultiTaskTrainer

settings = json.loads(Path(sys.argv[1]).read_text("utf-8"))


def make_trainer(*, model, args, train_dataset, processing_class, **options):
    """Called by `build_trainer` instead of TRL's trainer, with the same keywords."""
    collator = MultiTaskCollator(
        processing_class, pool=train_dataset, seed=args.seed, **settings["collator"]
    )
    return MultiTaskTrainer(
        MultiTaskModel(model, **settings["model"]),
        args,
        train_dataset=train_dataset,
        data_collator=collator,
        processing_class=processing_class,
        **settings["trainer"],
        **options,
    )


training.main(sys.argv[2:], trainer_class=make_trainer)
training.leave_ranks()
