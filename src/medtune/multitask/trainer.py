"""The trainer of three tasks: it weighs their losses over a whole step, and logs each of them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from .losses import TASKS, count_items
from .model import WEIGHTS_FILE, MultiTaskModel
from .records import MultiTaskCollator

METRICS = ("token_accuracy", "mean_iou", "match_accuracy")
# What each log entry has, in this order.
LOGGED = [
    *(f"{task}_loss" for task in TASKS),
    *METRICS,
    *(f"{task}_log_variance" for task in TASKS),
]


class MultiTaskTrainer(Trainer):
    """`transformers.Trainer` for a `MultiTaskModel`.

    Every log entry has each task's mean loss and metric (`token_accuracy`, `mean_iou`,
    `match_accuracy` at 0.5) since the last one, and the log-variances; see
    `medtune.plots.plot_tasks`.

    Parameters
    ----------
    model : a `MultiTaskModel`, or a base model with adapter, which is wrapped in one.
    args : `transformers.TrainingArguments`; their learning rate is the adapter's.
    head_learning_rate : of heads and log-variances, which start from nothing.
    data_collator : by default a `MultiTaskCollator` that takes wrong pictures from the training
        set.
    **options : for `transformers.Trainer`; `processing_class` and `train_dataset` must be among
        them.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        head_learning_rate: float = 2e-3,
        data_collator: MultiTaskCollator | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, MultiTaskModel):
            model = MultiTaskModel(model)
        if data_collator is None:
            data_collator = MultiTaskCollator(
                options["processing_class"], pool=options["train_dataset"], seed=args.seed
            )
        args.remove_unused_columns = False  # the collator uses columns that no model takes
        super().__init__(model.to(args.device), args, data_collator=data_collator, **options)
        self.head_learning_rate = head_learning_rate
        # or each batch of a step would be divided by their number: compute_loss divides by what
        # counts in the whole step
        self.model_accepts_loss_kwargs = True
        # tallies since the last log entry, by the prefix of its names
        self._seen: dict[str, Tensor | int] = {"": 0, "eval_": 0}
        self.add_callback(_CountEpochs(data_collator))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Count what has a loss, over all batches and ranks of a step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = []
        for batch in batches:
            items = count_items(batch["labels"], batch["boxes"], batch["matches"])
            counts.append(items.to(device))
        in_step = torch.stack(counts).sum(0).float()
        # the mean, not the sum: ranks average their gradients
        return batches, self.accelerator.reduce(in_step, "mean")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Weigh and add the three losses."""
        if model.training:
            parts = self.current_gradient_accumulation_steps
            output = model(**inputs, items=num_items_in_batch, parts=parts)
            self._seen[""] += output.tally
        else:
            output = model(**inputs)
            self._seen["eval_"] += output.tally
        if return_outputs:
            return output.loss, {"loss": output.loss}
        return output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what each task did since the last entry."""
        prefix = "" if "loss" in logs else "eval_"
        if prefix + "loss" in logs:  # not the last entry, which sums up the run
            values = self._task_values(prefix)
            for name, value in zip(LOGGED, values, strict=True):
                logs[prefix + name] = value
            self._seen[prefix] = 0
        super().log(logs, start_time)

    def _task_values(self, prefix: str) -> list[float]:
        """Return mean losses, mean metrics and log-variances, over all ranks."""
        losses, counts, metrics = self.accelerator.reduce(self._seen[prefix], "sum").cpu()
        sums = torch.cat([losses, metrics])
        means = sums / counts.clamp(min=1).repeat(2)
        log_variances = self.accelerator.unwrap_model(self.model).heads.log_variances
        return means.tolist() + log_variances.tolist()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Give the heads a learning rate of their own."""
        if self.optimizer is None:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            trained = [weight for weight in self.model.base.parameters() if weight.requires_grad]
            groups = [
                {"params": trained},
                {"params": list(self.model.heads.parameters()), "lr": self.head_learning_rate},
            ]
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write adapter, heads and processor; Transformers would write the whole model."""
        folder = output_dir or self.args.output_dir
        self.model.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Take adapter and heads from a checkpoint."""
        self.model.base.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        load_model(self.model.heads, Path(resume_from_checkpoint) / WEIGHTS_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Leave the frozen base out of DeepSpeed's part of a checkpoint.

        Transformers does so where the model is peft's own; here it would write the base each time.
        """
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            save = type(engine).save_checkpoint
            engine.save_checkpoint = partial(save, engine, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        """Load what DeepSpeed has saved, in which the frozen base is not."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        # Transformers would insist on a whole model in the checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        deepspeed_load_checkpoint(
            self.model_wrapped, resume_from_checkpoint, load_module_strict=False
        )
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared


class _CountEpochs(TrainerCallback):
    """Tells the collator which epoch it is, so that other records become negatives."""

    def __init__(self, collator: MultiTaskCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.collator.epoch = int(state.epoch or 0)
