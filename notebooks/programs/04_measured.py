"""Train as `python -m medtune.training` does, and note what rank 0 holds and sends.

    torchrun --nproc-per-node 2 04_measured.py --config train.yaml

In `output_dir` there will also be `trace.json`, the profile of the second step, and
`memory.json`, the bytes that rank 0 holds at the end.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from medtune import training

# where DeepSpeed keeps its float32 copy of what is trained: stages 1 and 2, and 3
FLOAT32_COPIES = ["single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"]


class Measure(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        # the second step: the first one also sets things up
        if state.global_step == 1:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.profile.stop()
            if args.process_index == 0:
                trace = Path(args.output_dir) / "trace.json"
                self.profile.export_chrome_trace(str(trace))

    def on_train_end(self, args, state, control, model, optimizer, **kwargs):
        peak = 0
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        held = {
            "weights": size_of(weights_of(model)),
            "optimizer": size_of(tensors_of(optimizer)),
            "peak": peak,
        }
        if args.process_index == 0:
            (Path(args.output_dir) / "memory.json").write_text(json.dumps(held))


def weights_of(model) -> list:
    """The weights that this rank holds: under ZeRO-3 its shards of them."""
    return [getattr(weight, "ds_tensor", weight) for weight in model.parameters()]


def tensors_of(optimizer) -> list:
    """Adam's two numbers for each weight, and DeepSpeed's float32 copy of it."""
    tensors = []
    # accelerate wraps DeepSpeed's optimizer, which wraps Adam
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        for name in FLOAT32_COPIES:
            tensors += getattr(optimizer, name, [])
    for state_of_weight in optimizer.state.values():
        tensors += state_of_weight.values()
    return tensors


def size_of(tensors: list) -> int:
    """Bytes of all tensors in a list; an optimizer also notes plain numbers."""
    return sum(item.nbytes for item in tensors if isinstance(item, torch.Tensor))


script_args, training_args, model_args = training.parse_arguments(sys.argv[1:])
trainer = training.build_trainer(
    script_args, training_args, model_args, callbacks=[Measure()]
)
training.train_model(trainer, script_args, model_args)
training.leave_ranks()
