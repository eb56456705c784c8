"""Locate, verify, diagnose: a box head and a match head beside the language model, trained together.

A sample of a batch serves one of three purposes. To *diagnose*: question and picture, and the answer to learn. To
*verify*: question, picture and a statement that belong together (match 1), or the same with another sample's picture
(match 0). Right pictures also teach to *locate* what the question names. No answer ever stands behind a statement, or it
would be copied: at inference the model drafts its answer first, and then the heads judge the draft as a statement.

Boxes are (x0, y0, x1, y1) as shares of the picture, 0..1. `MultiTaskModel` and `MultiTaskTrainer` are classes, made when
they are first asked for, because importing this file should not load torch.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TASKS = ("text", "box", "match")
LOGGED = ("text_loss", "box_loss", "match_loss", "token_accuracy", "mean_iou", "match_accuracy")
SETTINGS = {"weighting": "uncertainty", "weights": [1.0, 1.0, 1.0], "miss_weight": 10.0, "gamma": 2.0, "width": 256}
PROMPT, IMAGE, STATEMENT = 1, 2, 3  # kinds of tokens that the heads look at; 0 is all the rest
_MARK = "\ue000"  # stands for statement and answer while the chat template is rendered


def __getattr__(name: str) -> Any:
    if name not in ("MultiTaskModel", "MultiTaskTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return {"MultiTaskModel": _model_class, "MultiTaskTrainer": _trainer_class}[name]()


def statement_of(answer: str) -> str:
    """Shorten an answer to what is to be verified: the structure and what is said of findings; else all of it.

    Examples
    --------
    >>> statement_of("The region, in the upper left of the image, shows the left kidney. No cyst is seen within it.")
    'left kidney: No cyst is seen within it.'
    """
    from medtune.captions import parse_caption

    caption = parse_caption(answer)
    return ": ".join(part for part in (caption.structure, caption.target_diag) if part) or answer


def finding_of(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Say what a record is about: its structure (column `structure`, else by `medtune.captions`) and its findings.

    Two records of which neither can be said are about the same thing only if their answers are equal.
    """
    from medtune.captions import parse_caption

    caption = parse_caption(_answer(row))
    structure, findings = row.get("structure") or caption.structure, tuple(sorted(caption.findings))
    return structure or ("" if findings else _answer(row)), findings


def check_box(box: Sequence[float] | None, name: str = "a row") -> list[float] | None:
    """Return a box as four numbers, or None where there is none.

    Raises
    ------
    ValueError : several boxes, coordinates outside 0..1 or not finite, or in the wrong order.
    """
    if box is None or not len(box):
        return None
    if len(box) != 4 or any(isinstance(edge, Sequence) for edge in box):
        raise ValueError(f"{name} has several boxes, or one that is not x0, y0, x1, y1: make a row and question of each")
    x0, y0, x1, y1 = (float(edge) for edge in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"{name} has the box {list(box)}: 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 must hold")
    return [x0, y0, x1, y1]


def ask(question: str) -> list[dict]:
    """Put a question about a picture as the messages that training and inference share."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _answer(row: Mapping[str, Any]) -> str:
    return row["completion"][-1]["content"][0]["text"]


def encode(processor, samples: Sequence[Mapping[str, Any]]) -> dict:
    """Make a batch, padded on the right, of samples with `image`, `question` and either `statement`, `answer` or neither.

    Returns
    -------
    dict : what the processor makes of it, and of shape (rows, tokens) `labels`, -100 but for an answer and its end, and
        `token_kinds`, which tells the heads what belongs to prompt, picture and statement.

    Raises
    ------
    ValueError : a sample with both statement and answer, which would be copied; a picture that cannot be prepared.
    """
    import torch

    texts, tails = [], []
    for sample in samples:
        statement, answer = sample.get("statement"), sample.get("answer")
        if statement and answer:
            raise ValueError("give a statement to verify or an answer to learn: an answer would be copied from it")
        reply = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
        text = processor.apply_chat_template([*ask(sample["question"] + _MARK), reply], tokenize=False)
        head, middle, end = text.split(_MARK)
        parts = ["\n" + statement if statement else "", middle, answer + end if answer else ""]
        texts.append(head + "".join(parts))
        tails.append([len("".join(parts[i:])) for i in range(3)])
    images = [[sample["image"].convert("RGB")] for sample in samples]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_offsets_mapping": True}
    try:
        batch = dict(processor(images=images, text=texts, return_tensors="pt", **options))
    except ValueError as error:
        sizes = " ".join("x".join(map(str, image.size)) for (image,) in images)
        raise ValueError(f"one of these pictures ({sizes} pixels) cannot be prepared: {error}") from error
    starts, ends = batch.pop("offset_mapping").unbind(-1)
    left = ends.amax(1, keepdim=True) - starts  # letters from a token to the end: the picture's tokens come before
    said, after, learned = (left <= tail[:, None] for tail in torch.tensor(tails).T)
    soft = getattr(processor.tokenizer, "image_token_id", None) or processor.image_token_id  # Gemma-3's is its begin
    kinds = torch.where(batch["input_ids"] == soft, IMAGE, PROMPT)
    kinds = kinds.masked_fill(said, STATEMENT).masked_fill(after, 0) * batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(~learned | (batch["attention_mask"] == 0), -100)
    return batch | {"labels": labels, "token_kinds": kinds}


@dataclass
class MultiTaskCollator:
    """Turn records into a batch in which some are to be verified, and some of these have a wrong picture.

    Parameters
    ----------
    processor : of the base model.
    question : asked instead of a record's own; ``{structure}`` in it becomes the name of the record's structure.
    negative_ratio, verify_ratio : chance of a record to get a wrong picture, or its own with a statement. Each record
        is drawn for itself, so the ratio is exact in expectation for any batch size.
    hard_negatives : take wrong pictures of the same structure with another finding, where there are any.
    pool : records to take a wrong picture from where the batch has none that fits. A record that finds none stays right.
    seed, epoch : with a record's `id` they decide what becomes of it, whatever the number of workers.

    A record has `prompt`, `completion`, one picture in `images`, and may have `id`, `roi` (its box), `structure`, and
    `shows`: all structures to be seen in its picture. A wrong picture is never one with the same structure and finding,
    nor one that shows the structure. A batch also has `regions`, where the match head looks: the true box of the
    picture that is shown (all of it if there is none); `boxes` to learn, NaN for none; `matches`, 1, 0 or -1 for none.
    """

    processor: Any
    question: str = ""
    negative_ratio: float = 0.3
    verify_ratio: float = 0.3
    hard_negatives: bool = False
    pool: Any = ()
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if min(self.negative_ratio, self.verify_ratio) < 0 or self.negative_ratio + self.verify_ratio > 1:
            raise ValueError("negative_ratio and verify_ratio must not be below 0, nor above 1 together")
        light = self.pool.remove_columns("images") if hasattr(self.pool, "remove_columns") else self.pool
        self._known = [(finding_of(row), row.get("shows") or ()) for row in light]

    def _wrong(self, row: Mapping, batch: Sequence[Mapping], rng: random.Random) -> Mapping | None:
        own, near = finding_of(row), [(finding_of(other), other.get("shows") or ()) for other in batch]
        for hard in (True, False) if self.hard_negatives else (False,):
            for records, known in ((batch, near), (self.pool, self._known)):
                others = [i for i, (other, shows) in enumerate(known) if other != own and (hard or own[0] not in shows)]
                if fits := [i for i in others if not hard or known[i][0][0] == own[0]]:
                    return records[rng.choice(fits)]
        return None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict:
        """Make a batch of tensors."""
        import torch

        samples, own = [], {"regions": [], "boxes": [], "matches": []}
        for row in rows:
            rng = random.Random(f"{self.seed} {self.epoch} {row.get('id') or _answer(row)}")
            draw, answer = rng.random() - self.negative_ratio, _answer(row)
            wrong, verify = self._wrong(row, rows, rng) if draw < 0 else None, draw < self.verify_ratio
            shown, name = wrong or row, f"row {(wrong or row).get('id')}"
            if len(shown["images"]) != 1:
                raise ValueError(f"{name} has {len(shown['images'])} pictures: the heads judge one")
            box = check_box(shown.get("roi"), name)
            question = self.question.replace("{structure}", finding_of(row)[0]) or row["prompt"][-1]["content"][-1]["text"]
            said = {"statement": statement_of(answer)} if verify else {"answer": answer}
            samples.append({"image": shown["images"][0], "question": question} | said)
            own["regions"].append(box or [0.0, 0.0, 1.0, 1.0])
            own["boxes"].append([float("nan")] * 4 if wrong or not box else box)
            own["matches"].append(int(not wrong) if verify else -1)
        return encode(self.processor, samples) | {name: torch.tensor(values) for name, values in own.items()}


def task_counts(labels, boxes, matches):
    """Count the answer tokens, boxes and pairs of a batch that have a loss: a tensor of three numbers."""
    import torch

    return torch.stack([(labels[:, 1:] != -100).sum(), boxes.isfinite().all(1).sum(), (matches >= 0).sum()])


def focal_loss(logits, labels, *, gamma: float = 2.0, miss_weight: float = 10.0):
    """Focal loss (Lin et al. 2017) of each pair; true pairs weigh `miss_weight`, so that few of them are missed."""
    import torch

    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    return loss * (1 - torch.exp(-loss)) ** gamma * torch.where(labels == 1, miss_weight, 1.0)


def _pool(scores, mask):
    """Attention of each row over the tokens of a mask, (rows, tokens, maps); zero where the mask has none."""
    import torch

    return torch.softmax(scores.float().masked_fill(~mask[..., None], -1e4), 1) * mask[..., None]


@functools.cache
def _model_class() -> type:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from torch import nn
    from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou
    from transformers.utils import ModelOutput

    class MultiTaskModel(nn.Module):
        """A vision-language model, with an adapter or not, and two small heads on its last hidden states.

        The box head lets the question ask the image tokens: each votes for the four edges from where it stands, and
        attention, one map an edge, weighs the votes. The match head compares what it pools from the image tokens of
        a region with what it pools from the statement.

        Parameters
        ----------
        base : model of `transformers` or `peft`; answers are generated through it.
        weighting : "uncertainty" learns log-variances s, the loss is the sum of exp(-s)/2 * L + s/2 (Kendall, Gal and
            Cipolla 2018); "fixed" takes `weights`, in the order of `TASKS`; a weight of 0 leaves a task out.
        miss_weight, gamma, width : see `focal_loss`; inner width of the heads.
        """

        def __init__(self, base, **settings):
            super().__init__()
            self.base, self.settings = base, SETTINGS | settings
            if self.settings.keys() != SETTINGS.keys() or self.settings["weighting"] not in ("uncertainty", "fixed"):
                raise ValueError(f"settings are {', '.join(SETTINGS)}; weighting is uncertainty or fixed, not {settings}")
            size, width = base.config.get_text_config().hidden_size, self.settings["width"]

            def net(inputs: int, outputs: int, between: type) -> nn.Module:
                return nn.Sequential(nn.Linear(inputs, width), between(), nn.Linear(width, outputs))

            parts = {"norm": nn.LayerNorm(size), "asked": nn.Linear(size, 1), "query": nn.Linear(size, width)}
            parts |= {"token": nn.Linear(size + 2, width), "edges": nn.Linear(width, 4), "votes": net(width, 4, nn.ReLU)}
            parts |= {"look": net(size, 1, nn.Tanh), "match": net(3 * size, 1, nn.ReLU)}
            self.heads = nn.ModuleDict(parts)
            self.heads.register_parameter("log_variances", nn.Parameter(torch.zeros(3)))

        def locate(self, hidden, kinds, centres):
            """Predict the box (rows, 4) of what the prompt asks for; edges are in order, but may lie outside."""
            query = (_pool(self.heads["asked"](hidden), kinds == PROMPT) * hidden).sum(1, keepdim=True)
            tokens = torch.cat([hidden, 2 * centres - 1], -1)
            tokens = torch.tanh(self.heads["token"](tokens) + self.heads["query"](query))
            votes = centres.repeat(1, 1, 2) + torch.tanh(self.heads["votes"](tokens).float()) / 2
            edges = (_pool(self.heads["edges"](tokens), kinds == IMAGE) * votes).sum(1).unflatten(1, (2, 2))
            return torch.cat([edges.amin(1), edges.amax(1)], 1)

        def verify(self, hidden, kinds, covered):
            """Logits (rows,) that the statement is true of the region, which covers a share of each image token."""
            scores = self.heads["look"](hidden)
            seen = (_pool(scores + covered.clamp(min=1e-4).log()[..., None], kinds == IMAGE) * hidden).sum(1)
            told = (_pool(scores, kinds == STATEMENT) * hidden).sum(1)
            return self.heads["match"](torch.cat([seen, told, seen * told], 1))[:, 0].float()

        def forward(self, token_kinds, labels=None, boxes=None, matches=None, regions=None, items=None, parts=1, **inputs):
            """Predict `boxes` and `match_logits`; with labels, also `loss`, and `tally`, (3, 3): sums of losses, counts, sums of metrics.

            Without `regions` the match head looks into the predicted box. `items` are the counts of a whole step and
            `parts` its number of batches, so that gradients add up to those of one large batch.
            """
            taught = torch.zeros_like(token_kinds[:, 1:]) if labels is None else labels[:, 1:] != -100
            keep = taught.any(0).nonzero()[:, 0] if taught.any() else taught.new_zeros(1, dtype=torch.long)
            # logits only where there is something to learn: they are as wide as the vocabulary
            out = self.base(**inputs, output_hidden_states=True, logits_to_keep=keep, use_cache=False)
            hidden = self.heads["norm"](out.hidden_states[-1].float())
            centres, size = _cells(token_kinds == IMAGE, inputs.get("image_grid_thw"))
            predicted = self.locate(hidden, token_kinds, centres)
            where = (predicted.detach() if regions is None else regions)[:, None]
            low, high = (centres - size / 2).maximum(where[..., :2]), (centres + size / 2).minimum(where[..., 2:])
            logits = self.verify(hidden, token_kinds, ((high - low).clamp(min=0) / size).prod(-1))
            result = ModelOutput(boxes=predicted.detach().clamp(0, 1), match_logits=logits)
            if labels is None:
                return result
            targets, valid, paired = labels[:, 1:][:, keep], boxes.isfinite().all(1), matches >= 0
            text = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            found, true, focal = predicted[valid], boxes[valid], ("gamma", "miss_weight")
            edges = nn.functional.smooth_l1_loss(found, true, beta=0.1, reduction="sum")
            overlap = (1 - generalized_box_iou(found, true).diag()).sum()
            pairs = focal_loss(logits[paired], matches[paired], **{name: self.settings[name] for name in focal}).sum()
            losses, counts, s = torch.stack([text, edges + overlap, pairs]), task_counts(labels, boxes, matches), self.heads.log_variances
            means = losses / (counts if items is None else items).clamp(min=1)
            loss = (torch.exp(-s) * means / 2).sum() + s.sum() / 2 / parts
            if self.settings["weighting"] == "fixed":
                loss = (means.new_tensor(self.settings["weights"]) * means).sum() + 0 * s.sum()
            right = [out.logits.argmax(-1) == targets, box_iou(found, true)[0].diag(), (logits > 0)[paired] == matches[paired]]
            tally = torch.stack([losses, counts, torch.stack([hits.sum() for hits in right])]).detach()
            return ModelOutput(loss=loss, tally=tally, **result)

        def gradient_checkpointing_enable(self, **options):
            """Recompute the base model's activations; gradients must pass its frozen embeddings for that."""
            self.base.gradient_checkpointing_enable(**options)
            self.base.enable_input_require_grads()

        def save_pretrained(self, folder, **options) -> None:
            """Write the adapter (or model), and beside it the heads and their settings."""
            self.base.save_pretrained(folder, **options)
            save_file(self.heads.state_dict(), Path(folder) / "multitask.safetensors")
            (Path(folder) / "multitask.json").write_text(json.dumps(self.settings, indent=1), "utf-8")

        def load_heads(self, folder):
            """Read the heads of a saved model; ValueError if keys are missing, unknown or of another shape."""
            try:
                self.heads.load_state_dict(load_file(Path(folder) / "multitask.safetensors"))
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"the heads in {folder} do not fit: {' '.join(str(error).split())[:300]}") from error
            return self

        @classmethod
        def from_pretrained(cls, base, folder):
            """Put a saved adapter and its heads onto a freshly loaded base model; nothing may be missing."""
            from medtune.models import load_tuned

            settings = json.loads((Path(folder) / "multitask.json").read_text("utf-8"))
            return cls(load_tuned(base, folder), **settings).to(base.device).load_heads(folder).eval()

    return MultiTaskModel


def _cells(image, image_grid_thw=None):
    """Centres (rows, tokens, 2) and sizes (rows, 1, 2) of the cells of image tokens, as shares of the picture."""
    import torch

    grid = image.sum(1).sqrt()[:, None].expand(-1, 2)  # Gemma-3: one square
    if image_grid_thw is not None:  # Qwen-VL: patches, several of which are merged into a token
        grid = image_grid_thw[:, 1:] / (image_grid_thw.prod(1) / image.sum(1)).sqrt()[:, None]
    high, wide = grid.round().float()[..., None].unbind(1)
    place = (image.cumsum(1) - 1).clamp(min=0)
    centres = torch.stack([(place % wide + 0.5) / wide, (place // wide + 0.5) / high], -1)
    return centres, torch.cat([1 / wide, 1 / high], 1)[:, None]


@functools.cache
def _trainer_class() -> type:
    import torch
    from transformers import Trainer, TrainerCallback

    class MultiTaskTrainer(Trainer):
        """`transformers.Trainer` for a `MultiTaskModel`, or for a base model with adapter that it wraps in one.

        Parameters
        ----------
        data_collator : by default a `MultiTaskCollator` that takes wrong pictures from the training set.
        head_learning_rate : of the heads and log-variances, which start from nothing; ``args`` has the adapter's.

        Every log entry has each task's mean loss, its metric (`token_accuracy`, `mean_iou`, `match_accuracy` at 0.5) since the
        last one, and the log-variances; see `medtune.plots.plot_tasks`.
        """

        def __init__(self, model, args, *, head_learning_rate: float = 2e-3, data_collator=None, **options):
            model = model if isinstance(model, _model_class()) else _model_class()(model)
            if data_collator is None:
                pool, seed = options["train_dataset"], args.seed
                data_collator = MultiTaskCollator(options["processing_class"], pool=pool, seed=seed)
            args.remove_unused_columns, self._seen = False, {True: 0, False: 0}
            super().__init__(model.to(args.device), args, data_collator=data_collator, **options)
            self.head_learning_rate = head_learning_rate
            self.model_accepts_loss_kwargs = True  # compute_loss divides by what counts in the whole step

            class Epoch(TrainerCallback):  # other records become negatives
                def on_epoch_begin(self, args, state, control, **kwargs):
                    data_collator.epoch = int(state.epoch or 0)

            self.add_callback(Epoch())

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            """Count what has a loss, over all batches and ranks of a step."""
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            counts = sum(task_counts(*(batch[name] for name in ("labels", "boxes", "matches"))) for batch in batches)
            return batches, self.accelerator.reduce((counts + torch.zeros(3)).to(device), "mean")  # as gradients are

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Weigh and add the three losses."""
            whole = getattr(num_items_in_batch, "ndim", 0) == 1  # not in an evaluation
            step = {"items": num_items_in_batch, "parts": self.current_gradient_accumulation_steps} if whole else {}
            out = model(**inputs, **step)
            self._seen[model.training] += out.tally
            return (out.loss, {"loss": out.loss}) if return_outputs else out.loss

        def log(self, logs, start_time=None):
            """Add what each task did since the last entry."""
            prefix, training = ("", True) if "loss" in logs else ("eval_", False)
            if prefix + "loss" in logs:
                losses, counts, right = self.accelerator.reduce(self._seen[training], "sum").cpu()
                values, self._seen[training] = torch.cat([losses, right]) / counts.clamp(min=1).repeat(2), 0
                values = dict(zip(LOGGED, values.tolist(), strict=True))
                variances = self.accelerator.unwrap_model(self.model).heads.log_variances.tolist() if training else []
                values |= {f"{task}_log_variance": s for task, s in zip(TASKS, variances, strict=False)}
                logs |= {prefix + name: value for name, value in values.items()}
            super().log(logs, start_time)

        def create_optimizer(self, model=None):
            """Give the heads a learning rate of their own."""
            if self.optimizer is None:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                base = {"params": [p for p in self.model.base.parameters() if p.requires_grad]}
                heads = {"params": list(self.model.heads.parameters()), "lr": self.head_learning_rate}
                self.optimizer = kind([base, heads], **options)
            return self.optimizer

        def _save(self, output_dir=None, state_dict=None):
            self.model.save_pretrained(output_dir or self.args.output_dir)
            self.processing_class.save_pretrained(output_dir or self.args.output_dir)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            self.model.base.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
            self.model.load_heads(resume_from_checkpoint)

    return MultiTaskTrainer


def judge(model, processor, images, questions, statements, *, batch_size: int = 16) -> tuple[list, list]:
    """Locate what each question names and say how likely each statement is true of its picture.

    Returns
    -------
    tuple : boxes, and match scores, 0..1, one a picture.
    """
    import torch

    boxes, scores, device = [], [], model.heads.log_variances.device
    rows = zip(images, questions, statements, strict=True)
    samples = [dict(zip(("image", "question", "statement"), row, strict=True)) for row in rows]
    model.eval()
    for start in range(0, len(samples), batch_size):
        batch = encode(processor, samples[start : start + batch_size])
        with torch.no_grad():
            out = model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
        boxes, scores = boxes + out.boxes.tolist(), scores + torch.sigmoid(out.match_logits).tolist()
    return boxes, scores


def choose_threshold(scores: Sequence[float], labels: Sequence[int], *, sensitivity: float = 0.95) -> float:
    """Choose the highest threshold that keeps the share `sensitivity` of the true pairs (label 1): on validation data.

    Examples
    --------
    >>> choose_threshold([0.9, 0.8, 0.3, 0.7], [1, 1, 1, 0], sensitivity=0.6)
    0.8
    """
    true = sorted((score for score, label in zip(scores, labels, strict=True) if label == 1), reverse=True)
    if not true or not 0 < sensitivity <= 1:
        raise ValueError("a threshold wants scores of true pairs, and a sensitivity above 0 and up to 1")
    return true[-int(-sensitivity * len(true) // 1) - 1]


def locate_verify_diagnose(
    model, processor, image, question, *, threshold: float, batch_size: int = 16, max_new_tokens: int = 160
):
    """Answer a question about a picture only if the answer and the picture match; lists of both are batched.

    Returns
    -------
    dict, or a list of them : "box"; "match_score", 0..1, of the drafted answer; "answer", None under `threshold`;
        "reason".
    """
    from medtune.generate import generate_answers

    alone = isinstance(question, str)
    images, questions = ([image], [question]) if alone else (list(image), list(question))
    rows = [{"prompt": ask(q), "images": [i], "completion": [{"content": ""}]} for i, q in zip(images, questions, strict=True)]
    drafts = generate_answers(model.base, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    drafts, results = [draft["answer"] for draft in drafts], []
    judged = judge(model, processor, images, questions, [statement_of(d) for d in drafts], batch_size=batch_size)
    for box, score, draft in zip(*judged, drafts, strict=True):
        passed, reason = score >= threshold, f"match {score:.3f}, threshold {threshold:.3f}"
        reason += "" if passed else ": picture and draft may not belong together, so there is no diagnosis"
        results.append({"box": box, "match_score": score, "answer": draft if passed else None, "reason": reason})
    return results[0] if alone else results


if __name__ == "__main__":
    from medtune import train

    train.main(trainer_class=_trainer_class())
