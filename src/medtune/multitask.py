"""Locate, verify, diagnose: a box head and a match head beside the language model, trained together.

A sample of a batch serves one of three purposes. To *diagnose*: question and picture, and the answer to learn. To
*verify*: question, picture and a statement that belong together (match 1), or the same with another sample's picture
(match 0). Right pictures also teach to *locate* what the question names. No answer ever stands behind a statement: it
would be copied. At inference the model drafts an answer first, and then the heads judge the draft as a statement.

Boxes are (x0, y0, x1, y1) as shares of the picture, 0..1. `classes` gives the model and the trainer; a function makes
them, so that importing this file does not load torch.
"""

import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medtune.captions import parse_caption
from medtune.generate import generate_answers
from medtune.models import image_token_id, load_tuned

TASKS = ("text", "box", "match")
METRICS = ("token_accuracy", "mean_iou", "match_accuracy")
LOGGED = [*(f"{task}_loss" for task in TASKS), *METRICS, *(f"{task}_log_variance" for task in TASKS)]
SETTINGS = {"weighting": "uncertainty", "weights": [1.0, 1.0, 1.0], "miss_weight": 10.0, "width": 256}
PROMPT, IMAGE, STATEMENT = 1, 2, 3  # kinds of tokens that the heads look at; 0 is all the rest
_MARK = "\ue000"  # stands for statement and answer while the chat template is rendered


def statement_of(answer: str) -> str:
    """Shorten an answer to what is to be verified: the structure and what is said of findings; else all of it.

    Examples
    --------
    >>> statement_of("The region, in the upper left of the image, shows the left kidney. No cyst is seen within it.")
    'left kidney: No cyst is seen within it.'
    """
    caption = parse_caption(answer)
    return ": ".join(part for part in (caption.structure, caption.target_diag) if part) or answer


def finding_of(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Say what a record is about: its structure (column `structure`, else by `medtune.captions`) and its findings.

    Two records of which neither can be said are about the same thing only if their answers are equal.
    """
    caption = parse_caption(_answer(row))
    structure, findings = row.get("structure") or caption.structure, tuple(sorted(caption.findings))
    return structure or ("" if findings else _answer(row)), findings


def check_box(box: Sequence[float] | None, name: str = "a row") -> list[float] | None:
    """Return a box as four numbers, or None where there is none.

    Raises
    ------
    ValueError : several boxes, coordinates outside 0..1 or not finite, or in the wrong order.
    """
    edges = [] if box is None else np.ravel(box).astype(float).tolist()
    if edges and not (len(edges) == 4 and 0 <= edges[0] < edges[2] <= 1 and 0 <= edges[1] < edges[3] <= 1):
        raise ValueError(f"{name} has the box {box}, not x0 < x1, y0 < y1 in 0..1; of several boxes make several rows")
    return edges or None


def ask(question: str) -> list[dict]:
    """Put a question about a picture as the messages that training and inference share."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _answer(row: Mapping[str, Any]) -> str:
    return row["completion"][-1]["content"][0]["text"]


def encode(processor, samples: Sequence[Mapping[str, Any]], own: Sequence[tuple] = ()) -> dict:
    """Make a batch of samples with `image`, `question`, and `statement` or `answer` or neither, padded on the right.

    Returns
    -------
    dict : what the processor makes of it, and, of shape (rows, tokens), `labels`, -100 but for an answer and its end,
        and `token_kinds`, which tells the heads what belongs to prompt, picture and statement; and if `own` has
        them for each sample, `regions`, `boxes` and `matches`, see `MultiTaskCollator`.
    """
    import torch

    texts, tails = [], []
    for sample in samples:
        reply = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
        text = processor.apply_chat_template([*ask(sample["question"] + _MARK), reply], tokenize=False)
        head, middle, end = text.split(_MARK)
        statement, answer = sample.get("statement"), sample.get("answer")  # never both: one would be copied
        parts = [f"\n{statement}" if statement else "", middle, answer + end if answer and not statement else ""]
        texts.append(head + "".join(parts))
        tails.append([len("".join(parts[i:])) for i in range(3)])
    images = [[sample["image"].convert("RGB")] for sample in samples]
    options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_offsets_mapping": True}
    batch = dict(processor(images=images, text=texts, return_tensors="pt", **options))
    starts, ends = batch.pop("offset_mapping").unbind(-1)
    left = ends.amax(1, keepdim=True) - starts  # characters from a token to the end: they tell the parts apart
    said, after, learned = (left <= tail[:, None] for tail in torch.tensor(tails).T)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    before = torch.where(ids == image_token_id(processor), IMAGE, PROMPT)
    kinds = before.masked_fill(said, STATEMENT).masked_fill(after, 0) * mask
    batch |= {"labels": ids.masked_fill(~learned | (mask == 0), -100), "token_kinds": kinds}
    return batch | dict(zip(("regions", "boxes", "matches"), map(torch.tensor, zip(*own, strict=True)), strict=False))


@dataclass
class MultiTaskCollator:
    """Turn records into a batch in which some are to be verified, and some of these have a wrong picture.

    Parameters
    ----------
    processor : of the base model.
    question : asked instead of a record's own; ``{structure}`` in it becomes the name of the record's structure.
    negative_ratio, verify_ratio : chance of a record to get a wrong picture, or its own with a statement. Each record
        is drawn for itself, so the ratio is exact in expectation for any batch size.
    predicted_ratio : chance that the match head looks into the box that is predicted, as it does at inference, and not
        into the true one.
    hard_negatives : take wrong pictures of the same structure with another finding, where there are any.
    pool : records to take wrong pictures from; by default those of the batch. A record that finds none stays right.
    seed, epoch : with a record's `id` they decide what becomes of it, whatever the number of workers.

    A record has `prompt`, `completion`, one picture in `images`, and may have `id`, `roi` (its box), `structure`, and
    `shows`: all structures to be seen in its picture. A wrong picture is never one with the same structure and finding,
    nor one that shows the structure. A batch also has `regions`, where the match head looks: the true box of the
    picture that is shown, or NaN for the predicted one; `boxes` to learn, NaN for none; `matches`, 1, 0 or -1 for none.
    """

    processor: Any
    question: str = ""
    negative_ratio: float = 0.3
    verify_ratio: float = 0.3
    predicted_ratio: float = 0.5
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
        records, known = (self.pool, self._known) if self._known else (batch, near)
        fits = [i for i, (other, shows) in enumerate(known) if other != own and own[0] not in shows]
        if self.hard_negatives:
            fits = [i for i, (other, _) in enumerate(known) if other != own and other[0] == own[0]] or fits
        return records[rng.choice(fits)] if fits else None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict:
        """Make a batch of tensors."""
        samples, own, none = [], [], [np.nan] * 4
        for row in rows:
            rng = random.Random(f"{self.seed} {self.epoch} {row.get('id') or _answer(row)}")
            draw, answer = rng.random() - self.negative_ratio, _answer(row)
            wrong, verify = self._wrong(row, rows, rng) if draw < 0 else None, draw < self.verify_ratio
            shown, name = wrong or row, f"row {(wrong or row).get('id')}"
            if len(shown["images"]) != 1:
                raise ValueError(f"{name} has {len(shown['images'])} pictures: the heads judge one")
            box = check_box(shown.get("roi"), name)
            said = {"statement": statement_of(answer)} if verify else {"answer": answer}
            question = self.question.replace("{structure}", finding_of(row)[0])
            said["question"] = question or row["prompt"][-1]["content"][-1]["text"]
            samples.append({"image": shown["images"][0]} | said)
            region = box if box and rng.random() >= self.predicted_ratio else none
            own.append((region, none if wrong or not box else box, int(not wrong) if verify else -1))
        return encode(self.processor, samples, own)


@functools.cache
def classes() -> tuple[type, type]:
    """Give the classes `MultiTaskModel`, a ``torch.nn.Module``, and `MultiTaskTrainer`, a ``transformers.Trainer``.

    Examples
    --------
    >>> [made.__name__ for made in classes()]
    ['MultiTaskModel', 'MultiTaskTrainer']
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_model, save_file
    from torch import nn
    from transformers import Trainer, TrainerCallback
    from transformers.loss.loss_for_object_detection import box_iou, generalized_box_iou
    from transformers.utils import ModelOutput

    def pool(scores, mask):
        """Attention (rows, tokens, maps) over the tokens of a mask; zero where it has none."""
        return torch.softmax(scores.float().masked_fill(~mask[..., None], -1e4), 1) * mask[..., None]

    def cells(image, image_grid_thw=None):
        """Centres (rows, tokens, 2) and sizes (rows, 1, 2) of the image tokens' cells, as shares of the picture."""
        count = image.sum(1, keepdim=True)  # Gemma-3 has one square, Qwen-VL a grid of patches that are merged
        patches = image_grid_thw[:, 1:] if image_grid_thw is not None else torch.ones_like(count).repeat(1, 2)
        high, wide = (patches * (count / patches.prod(1, keepdim=True)).sqrt()).round()[..., None].unbind(1)
        place = (image.cumsum(1) - 1).clamp(min=0)
        centres = torch.stack([(place % wide + 0.5) / wide, (place // wide + 0.5) / high], -1)
        return centres, torch.cat([1 / wide, 1 / high], 1)[:, None]

    def count(labels, boxes, matches, **others):
        """Answer tokens, boxes and pairs that have a loss."""
        return torch.stack([(labels[:, 1:] != -100).sum(), boxes.isfinite().all(1).sum(), (matches >= 0).sum()])

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
        miss_weight : weight of true pairs in the focal loss (Lin et al. 2017) of the match, so that few are missed.
        width : inner width of the heads.
        """

        def __init__(self, base, **settings):
            super().__init__()
            self.base, self.config, self.settings = base, base.config, SETTINGS | settings
            self.activation_checkpointing_enable = base.activation_checkpointing_enable
            if self.settings.keys() != SETTINGS.keys() or self.settings["weighting"] not in ("uncertainty", "fixed"):
                raise ValueError(f"{settings}: there are {', '.join(SETTINGS)}; weighting is uncertainty or fixed")
            size, width = base.config.get_text_config().hidden_size, self.settings["width"]

            def net(inputs: int, outputs: int, between: type) -> nn.Module:
                return nn.Sequential(nn.Linear(inputs, width), between(), nn.Linear(width, outputs))

            parts = {"norm": nn.LayerNorm(size), "asked": nn.Linear(size, 1), "query": nn.Linear(size, width)}
            parts |= {"token": nn.Linear(size + 2, width), "edges": nn.Linear(width, 4)}
            parts |= {"vote": net(width, 4, nn.ReLU), "look": net(size, 1, nn.Tanh), "match": net(3 * size, 1, nn.ReLU)}
            self.heads = nn.ModuleDict(parts)
            self.heads.register_parameter("log_variances", nn.Parameter(torch.zeros(3)))

        def locate(self, hidden, kinds, centres):
            """Predict the box (rows, 4) of what the prompt asks for; edges are in order, but may lie outside."""
            query = (pool(self.heads["asked"](hidden), kinds == PROMPT) * hidden).sum(1, keepdim=True)
            tokens = torch.cat([hidden, 2 * centres - 1], -1)
            tokens = torch.tanh(self.heads["token"](tokens) + self.heads["query"](query))
            votes = centres.repeat(1, 1, 2) + torch.tanh(self.heads["vote"](tokens).float()) / 2
            edges = (pool(self.heads["edges"](tokens), kinds == IMAGE) * votes).sum(1).unflatten(1, (2, 2))
            return torch.cat([edges.amin(1), edges.amax(1)], 1)

        def verify(self, hidden, kinds, covered):
            """Logits (rows,) that the statement is true of the region, which covers a share of each image token."""
            scores = self.heads["look"](hidden)
            seen = (pool(scores + covered.clamp(min=1e-4).log()[..., None], kinds == IMAGE) * hidden).sum(1)
            told = (pool(scores, kinds == STATEMENT) * hidden).sum(1)
            return self.heads["match"](torch.cat([seen, told, seen * told], 1))[:, 0].float()

        def forward(self, token_kinds, labels, boxes=None, matches=None, regions=None, items=None, parts=1, **inputs):
            """Predict `boxes` and `match_logits`; with true boxes and matches, compute `loss` and `tally` too.

            `tally`, (3, 3), holds for each task the sum of its losses, their number, and the sum of its metric.

            Without `regions`, or where they are NaN, the match head looks into the predicted box. `items` are the
            counts of a whole step, `parts` its number of batches: gradients add up to those of one large batch.
            """
            taught = labels[:, 1:] != -100
            keep = taught.any(0).nonzero()[:, 0] if taught.any() else taught.new_zeros(1, dtype=torch.long)
            # logits only where there is something to learn: they are as wide as the vocabulary
            out = self.base(**inputs, output_hidden_states=True, logits_to_keep=keep, use_cache=False)
            hidden = self.heads["norm"](out.hidden_states[-1].float())
            centres, size = cells(token_kinds == IMAGE, inputs.get("image_grid_thw"))
            predicted = self.locate(hidden, token_kinds, centres)
            where = predicted.detach() if regions is None else regions.where(regions.isfinite(), predicted.detach())
            low = (centres - size / 2).maximum(where[:, None, :2])
            high = (centres + size / 2).minimum(where[:, None, 2:])
            logits = self.verify(hidden, token_kinds, ((high - low).clamp(min=0) / size).prod(-1))
            result = ModelOutput(boxes=predicted.detach().clamp(0, 1), match_logits=logits)
            if boxes is None:
                return result
            targets, valid, paired = labels[:, 1:][:, keep], boxes.isfinite().all(1), matches >= 0
            text = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            found, true, judged, match = predicted[valid], boxes[valid], logits[paired], matches[paired].float()
            edges = nn.functional.smooth_l1_loss(found, true, beta=0.1, reduction="sum")
            overlap = (1 - generalized_box_iou(found, true).diag()).sum()
            pairs = nn.functional.binary_cross_entropy_with_logits(judged, match, reduction="none")
            pairs = pairs * (1 - torch.exp(-pairs)) ** 2 * (1 + match * (self.settings["miss_weight"] - 1))
            losses, s = torch.stack([text, edges + overlap, pairs.sum()]), self.heads.log_variances
            counts, learned = count(labels, boxes, matches), self.settings["weighting"] == "uncertainty"
            means = losses / (counts if items is None else items).clamp(min=1e-6)  # a rank's share may be below 1
            weights = torch.exp(-s) / 2 if learned else means.new_tensor(self.settings["weights"])
            loss = (weights * means).sum() + s.sum() * learned / 2 / parts
            right = [out.logits.argmax(-1) == targets, box_iou(found, true)[0].diag(), (judged > 0) == (match > 0)]
            tally = torch.stack([losses, counts, torch.stack([hits.sum() for hits in right])]).detach()
            return ModelOutput(loss=loss, tally=tally, **result)

        @torch.no_grad()
        def judge(self, processor, images, questions, statements, *, batch_size: int = 16) -> tuple[list, list]:
            """Locate what each question names, and say how likely (0..1) each statement is true of its picture."""
            boxes, scores, names = [], [], ("image", "question", "statement")
            samples = [dict(zip(names, row, strict=True)) for row in zip(images, questions, statements, strict=True)]
            self.eval()
            for start in range(0, len(samples), batch_size):
                batch = encode(processor, samples[start : start + batch_size])
                out = self(**{key: value.to(self.heads.log_variances.device) for key, value in batch.items()})
                boxes, scores = boxes + out.boxes.tolist(), scores + torch.sigmoid(out.match_logits).tolist()
            return boxes, scores

        def save_pretrained(self, folder, **options) -> None:
            """Write the adapter (or model), and beside it the heads and their settings."""
            self.base.save_pretrained(folder, **options)
            save_file(self.heads.state_dict(), Path(folder) / "multitask.safetensors")
            (Path(folder) / "multitask.json").write_text(json.dumps(self.settings, indent=1), "utf-8")

        @classmethod
        def from_pretrained(cls, base, folder):
            """Put a saved adapter and its heads onto a freshly loaded base model; nothing may be missing."""
            settings = json.loads((Path(folder) / "multitask.json").read_text("utf-8"))
            model = cls(load_tuned(base, folder), **settings).to(base.device)
            try:
                load_model(model.heads, Path(folder) / "multitask.safetensors")
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"the heads in {folder} do not fit: {' '.join(str(error).split())[:300]}") from error
            return model.eval()

    class MultiTaskTrainer(Trainer):
        """`transformers.Trainer` for a `MultiTaskModel`, or for a base model with adapter that it wraps in one.

        Parameters
        ----------
        data_collator : by default a `MultiTaskCollator` that takes wrong pictures from the training set.
        head_learning_rate : of heads and log-variances, which start from nothing; ``args`` has the adapter's.

        Every log entry has each task's mean loss and metric (`token_accuracy`, `mean_iou`, `match_accuracy` at 0.5)
        since the last one, and the log-variances; see `medtune.plots.plot_tasks`.
        """

        def __init__(self, model, args, *, head_learning_rate: float = 2e-3, data_collator=None, **options):
            model = model if isinstance(model, MultiTaskModel) else MultiTaskModel(model)
            processor, train = options["processing_class"], options["train_dataset"]
            data_collator = data_collator or MultiTaskCollator(processor, pool=train, seed=args.seed)
            args.remove_unused_columns, self._seen = False, {"": 0, "eval_": 0}
            super().__init__(model.to(args.device), args, data_collator=data_collator, **options)
            # compute_loss divides by what counts in the whole step
            self.head_learning_rate, self.model_accepts_loss_kwargs = head_learning_rate, True

            class Epoch(TrainerCallback):  # other records become negatives
                def on_epoch_begin(self, args, state, control, **kwargs):
                    data_collator.epoch = int(state.epoch or 0)

            self.add_callback(Epoch())

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            """Count what has a loss, over all batches and ranks of a step."""
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            counts = torch.stack([count(**batch).to(device) for batch in batches]).sum(0).float()
            return batches, self.accelerator.reduce(counts, "mean")  # ranks average their gradients

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """Weigh and add the three losses."""
            step = {"items": num_items_in_batch, "parts": self.current_gradient_accumulation_steps}
            out = model(**inputs, **(step if model.training else {}))
            self._seen["" if model.training else "eval_"] += out.tally
            return (out.loss, {"loss": out.loss}) if return_outputs else out.loss

        def log(self, logs, start_time=None):
            """Add what each task did since the last entry."""
            prefix = "" if "loss" in logs else "eval_"
            if prefix + "loss" in logs:
                losses, counts, right = self.accelerator.reduce(self._seen[prefix], "sum").cpu()
                values = (torch.cat([losses, right]) / counts.clamp(min=1).repeat(2)).tolist()
                values += self.accelerator.unwrap_model(self.model).heads.log_variances.tolist()
                logs |= {prefix + name: value for name, value in zip(LOGGED, values, strict=True)}
                self._seen[prefix] = 0
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
            load_model(self.model.heads, Path(resume_from_checkpoint) / "multitask.safetensors")

    return MultiTaskModel, MultiTaskTrainer


def choose_threshold(scores: Sequence[float], sensitivity: float = 0.95) -> float:
    """Choose the highest threshold that the share `sensitivity` of true pairs, with these scores, does not fall under.

    Examples
    --------
    >>> choose_threshold([0.9, 0.8, 0.3, 0.7], sensitivity=0.75)
    0.7
    """
    return sorted(scores)[int((1 - sensitivity) * len(scores))]


def locate_verify_diagnose(model, processor, images, questions, *, threshold, batch_size=16, max_new_tokens=160):
    """Answer questions, one about each picture, but give no answer that does not match its picture.

    Parameters
    ----------
    model, processor : a `MultiTaskModel` and its processor.
    images, questions : pictures (PIL), and a question about each.
    threshold : least match score, 0..1, of a draft that is given as an answer; see `choose_threshold`.

    Returns
    -------
    list of dict : "box"; "match_score", 0..1, of the drafted answer; "answer", None under `threshold`; "reason".
    """
    pairs = zip(images, questions, strict=True)
    rows = [{"prompt": ask(text), "images": [image], "completion": [{"content": ""}]} for image, text in pairs]
    drafts = generate_answers(model.base, processor, rows, batch_size=batch_size, max_new_tokens=max_new_tokens)
    drafts, results = [draft["answer"] for draft in drafts], []
    judged = model.judge(processor, images, questions, [statement_of(d) for d in drafts], batch_size=batch_size)
    for box, score, draft in zip(*judged, drafts, strict=True):
        passed, reason = score >= threshold, f"match {score:.3f}, threshold {threshold:.3f}"
        reason += "" if passed else ": picture and draft may not belong together, so there is no diagnosis"
        results.append({"box": box, "match_score": score, "answer": draft if passed else None, "reason": reason})
    return results
