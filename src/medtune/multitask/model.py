"""The model of three tasks: a vision-language model with a box head and a match head beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from medtune.files import one_line, write_json
from medtune.models import load_tuned

from .losses import count_items, has_box, has_match, judge_boxes, judge_matches, judge_text
from .records import IGNORED, IMAGE, PROMPT, STATEMENT, Sample, encode

# Beside the adapter in the folder of a saved model.
WEIGHTS_FILE = "multitask.safetensors"
SETTINGS_FILE = "multitask.json"


@dataclass
class Settings:
    """Settings of the heads, which are saved with them.

    Parameters
    ----------
    weighting : "uncertainty" learns the weights of the three losses, "fixed" takes `weights`.
    weights : of the losses of text, box and match; a weight of 0 leaves a task out.
    miss_weight : weight of true pairs in the loss of the match.
    width : inner width of the heads.
    """

    weighting: str = "uncertainty"
    weights: Sequence[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    miss_weight: float = 10.0
    width: int = 256


def _make_settings(given: dict[str, Any]) -> Settings:
    """Check settings by name; they may come from a file."""
    names = [known.name for known in fields(Settings)]
    if not given.keys() <= set(names):
        raise ValueError(_explain_settings(given, names))
    settings = Settings(**given)
    if settings.weighting not in ("uncertainty", "fixed"):
        raise ValueError(_explain_settings(given, names))
    return settings


def _explain_settings(given: dict[str, Any], names: Sequence[str]) -> str:
    return f"{given}: there are {', '.join(names)}; weighting is uncertainty or fixed"


@dataclass
class MultiTaskOutput(ModelOutput):
    """What a `MultiTaskModel` says about a batch.

    Parameters
    ----------
    loss : the weighted sum of the three losses; only with true boxes and matches.
    tally : (3, 3): for each task the sum of its losses, their number, and the sum of its metric, in
        rows; only with true boxes and matches.
    boxes : (rows, 4), the predicted box, 0..1.
    match_logits : (rows,), above 0 if picture and statement belong together.
    """

    loss: Tensor | None = None
    tally: Tensor | None = None
    boxes: Tensor | None = None
    match_logits: Tensor | None = None


class MultiTaskModel(nn.Module):
    """A vision-language model, with or without adapter, and two heads on its last hidden states.

    The box head lets the question ask the image tokens: each votes for the four edges from where it
    stands, and attention, one map an edge, weighs the votes. The match head compares what it pools
    from the image tokens of a region with what it pools from the statement.

    Parameters
    ----------
    base : model of `transformers` or `peft`; answers are generated through it.
    weighting : "uncertainty" learns log-variances s, the loss is the sum of exp(-s)/2 * L + s/2
        (Kendall, Gal and Cipolla 2018); "fixed" takes `weights`.
    weights : of the losses of text, box and match, in the order of `TASKS`; a weight of 0 leaves a
        task out.
    miss_weight : weight of true pairs in the focal loss of the match, so that few are missed.
    width : inner width of the heads.

    Raises
    ------
    ValueError : a setting or a weighting that there is not.
    """

    def __init__(self, base: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.base = base
        self.config = base.config
        self.settings = _make_settings(settings)
        # the trainer asks the model that it is given
        self.activation_checkpointing_enable = base.activation_checkpointing_enable
        size = base.config.get_text_config().hidden_size
        self.heads = _make_heads(size, self.settings.width)

    def locate(self, hidden: Tensor, kinds: Tensor, centres: Tensor) -> Tensor:
        """Predict the box of what the prompt asks for.

        Parameters
        ----------
        hidden : (rows, tokens, size), normalised hidden states.
        kinds : (rows, tokens), kinds of the tokens.
        centres : (rows, tokens, 2), where image tokens stand in the picture, see `cells`.

        Returns
        -------
        Tensor (rows, 4) : edges are in order, but may lie outside of the picture.
        """
        asked = pool_weights(self.heads["asked"](hidden), kinds == PROMPT)
        query = (asked * hidden).sum(1, keepdim=True)
        placed = torch.cat([hidden, 2 * centres - 1], -1)  # places from -1 to 1
        tokens = torch.tanh(self.heads["token"](placed) + self.heads["query"](query))
        # each token votes for both corners, at most half a picture away from itself
        away = torch.tanh(self.heads["vote"](tokens).float()) / 2
        votes = centres.repeat(1, 1, 2) + away
        trust = pool_weights(self.heads["edges"](tokens), kinds == IMAGE)
        corners = (trust * votes).sum(1).unflatten(1, (2, 2))
        return torch.cat([corners.amin(1), corners.amax(1)], 1)

    def verify(self, hidden: Tensor, kinds: Tensor, covered: Tensor) -> Tensor:
        """Judge whether the statement is true of a region.

        Parameters
        ----------
        hidden : (rows, tokens, size), normalised hidden states.
        kinds : (rows, tokens), kinds of the tokens.
        covered : (rows, tokens), the share of each image token's cell that the region covers.

        Returns
        -------
        Tensor (rows,) : logits.
        """
        scores = self.heads["look"](hidden)
        # a logarithm in a softmax is a factor; not quite 0, for a region may cover no cell at all
        inside = covered.clamp(min=1e-4).log()[..., None]
        seen = (pool_weights(scores + inside, kinds == IMAGE) * hidden).sum(1)
        told = (pool_weights(scores, kinds == STATEMENT) * hidden).sum(1)
        compared = torch.cat([seen, told, seen * told], 1)
        return self.heads["match"](compared)[:, 0].float()

    def forward(  # noqa: PLR0913 - the names of a batch, and two that the trainer adds
        self,
        token_kinds: Tensor,
        labels: Tensor,
        boxes: Tensor | None = None,
        matches: Tensor | None = None,
        regions: Tensor | None = None,
        token_weights: Tensor | None = None,
        items: Tensor | None = None,
        parts: int = 1,
        **inputs: Tensor,
    ) -> MultiTaskOutput:
        """Predict boxes and matches; with true boxes and matches, compute the loss too.

        Parameters
        ----------
        token_kinds, labels : (rows, tokens), see `encode`.
        boxes : (rows, 4), true boxes, NaN for none.
        matches : (rows,), 1, 0, or -1 for none.
        regions : (rows, 4), where the match head looks; without them, or where they are NaN, it
            looks into the predicted box.
        token_weights : (rows, tokens), weights of the labels in the loss of the text; by default
            all are 1.
        items : (3,), the counts of a whole step, by which the losses are divided; by default those
            of the batch.
        parts : number of batches of the step: gradients add up to those of one large batch.
        **inputs : for the base model.
        """
        kept = _positions_to_learn(labels)
        output = self.base(
            **inputs, output_hidden_states=True, logits_to_keep=kept, use_cache=False
        )
        hidden = self.heads["norm"](output.hidden_states[-1].float())
        centres, size = cells(token_kinds == IMAGE, inputs.get("image_grid_thw"))
        predicted = self.locate(hidden, token_kinds, centres)
        # detached: the match must not move the box
        region = predicted.detach()
        if regions is not None:
            region = regions.where(regions.isfinite(), region)
        covered = covered_share(centres, size, region)
        match_logits = self.verify(hidden, token_kinds, covered)
        answers = {"boxes": predicted.detach().clamp(0, 1), "match_logits": match_logits}
        if boxes is None:
            return MultiTaskOutput(**answers)

        located = has_box(boxes)
        paired = has_match(matches)
        weights = None if token_weights is None else token_weights[:, 1:][:, kept]
        judged = [
            judge_text(output.logits, labels[:, 1:][:, kept], weights),
            judge_boxes(predicted[located], boxes[located]),
            judge_matches(match_logits[paired], matches[paired].float(), self.settings.miss_weight),
        ]
        losses = torch.stack([task.loss for task in judged])
        metrics = torch.stack([task.metric for task in judged])
        counts = count_items(labels, boxes, matches)
        loss = self._weigh(losses, counts if items is None else items, parts)
        tally = torch.stack([losses, counts, metrics]).detach()
        return MultiTaskOutput(loss=loss, tally=tally, **answers)

    def _weigh(self, losses: Tensor, items: Tensor, parts: int) -> Tensor:
        """Divide the sums of three losses by their numbers, weigh and add them."""
        means = losses / items.clamp(min=1e-6)  # a rank's share may be below 1
        log_variances = self.heads.log_variances
        if self.settings.weighting == "uncertainty":
            weights = torch.exp(-log_variances) / 2
            return (weights * means).sum() + log_variances.sum() / 2 / parts
        weights = means.new_tensor(self.settings.weights)
        # times 0, not left out: other ranks wait for the gradient of each parameter
        return (weights * means).sum() + 0 * log_variances.sum()

    @torch.no_grad()
    def judge(
        self,
        processor: Any,
        images: Sequence[Any],
        questions: Sequence[str],
        statements: Sequence[str],
        *,
        batch_size: int = 16,
    ) -> tuple[list[list[float]], list[float]]:
        """Locate what each question names, and say how likely its statement is true of its picture.

        Parameters
        ----------
        processor : of the base model.
        images : PIL pictures.
        questions, statements : one for each picture.
        batch_size : pictures that are judged together.

        Returns
        -------
        boxes : for each picture (x0, y0, x1, y1), 0..1.
        scores : for each picture a chance, 0..1.
        """
        samples = []
        for image, question, statement in zip(images, questions, statements, strict=True):
            samples.append(Sample(image, question, statement))
        device = self.heads.log_variances.device
        boxes = []
        scores = []
        self.eval()
        for start in range(0, len(samples), batch_size):
            batch = encode(processor, samples[start : start + batch_size])
            output = self(**{name: tensor.to(device) for name, tensor in batch.items()})
            boxes += output.boxes.tolist()
            scores += torch.sigmoid(output.match_logits).tolist()
        return boxes, scores

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the adapter (or model), and beside it the heads and their settings.

        Parameters
        ----------
        folder : where to write.
        **options : for `save_pretrained` of the base.
        """
        self.base.save_pretrained(folder, **options)
        save_file(self.heads.state_dict(), Path(folder) / WEIGHTS_FILE)
        write_json(Path(folder) / SETTINGS_FILE, asdict(self.settings))

    @classmethod
    def from_pretrained(cls, base: nn.Module, folder: str | Path) -> "MultiTaskModel":
        """Put a saved adapter and its heads onto a freshly loaded base model.

        Parameters
        ----------
        base : the base model that was trained.
        folder : what `save_pretrained` wrote.

        Raises
        ------
        OSError : a file is missing.
        ValueError : the weights do not fit; nothing may be missing.
        """
        settings = json.loads((Path(folder) / SETTINGS_FILE).read_text("utf-8"))
        model = cls(load_tuned(base, folder), **settings).to(base.device)
        try:
            load_model(model.heads, Path(folder) / WEIGHTS_FILE)
        except (RuntimeError, SafetensorError) as error:
            message = f"the heads in {folder} do not fit: {one_line(error)}"
            raise ValueError(message) from error
        return model.eval()


def _make_heads(size: int, width: int) -> nn.ModuleDict:
    """Make the parts of both heads.

    Their names stand in saved files, and their order decides which random numbers each begins with.

    Parameters
    ----------
    size : width of the hidden states.
    width : inner width of the heads.
    """
    heads = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(size),
            # box head: what is asked, what each image token has to do with it, and its votes
            "asked": nn.Linear(size, 1),
            "query": nn.Linear(size, width),
            "token": nn.Linear(size + 2, width),
            "edges": nn.Linear(width, 4),
            "vote": _two_layers(width, width, 4, nn.ReLU()),
            # match head: where to look, and what was seen and told, side by side
            "look": _two_layers(size, width, 1, nn.Tanh()),
            "match": _two_layers(3 * size, width, 1, nn.ReLU()),
        }
    )
    heads.register_parameter("log_variances", nn.Parameter(torch.zeros(3)))
    return heads


def _two_layers(inputs: int, width: int, outputs: int, between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), between, nn.Linear(width, outputs))


def _positions_to_learn(labels: Tensor) -> Tensor:
    """Return the places (n,) of the tokens whose next token some row learns; place 0 if none does.

    Logits are needed only there, and they are as wide as the vocabulary.
    """
    taught = labels[:, 1:] != IGNORED
    if not taught.any():
        return taught.new_zeros(1, dtype=torch.long)
    return taught.any(0).nonzero()[:, 0]


def pool_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Attend to the tokens of a mask.

    Parameters
    ----------
    scores : (rows, tokens, maps).
    mask : (rows, tokens), bool.

    Returns
    -------
    Tensor (rows, tokens, maps) : weights that add up to 1 in each map; all 0 where a row has no
        such token.

    Examples
    --------
    >>> pool_weights(torch.zeros(1, 3, 1), torch.tensor([[True, True, False]])).flatten().tolist()
    [0.5, 0.5, 0.0]
    """
    mask = mask[..., None]
    # float32, and no infinity: a row of nothing but infinities would be NaN
    weights = torch.softmax(scores.float().masked_fill(~mask, -1e4), 1)
    return weights * mask


def cells(image: Tensor, image_grid_thw: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Say which cell of the picture each image token stands for.

    Image tokens go row by row from the upper left.

    Parameters
    ----------
    image : (rows, tokens), bool, where the image tokens are.
    image_grid_thw : (rows, 3), frames, height and width in patches, of Qwen-VL, which then merges
        some patches to a token; without it (Gemma-3) the tokens are a square.

    Returns
    -------
    centres : (rows, tokens, 2), x and y as shares of the picture; without meaning elsewhere.
    size : (rows, 1, 2), width and height of a cell, as shares of the picture.

    Examples
    --------
    >>> centres, size = cells(torch.tensor([[False, True, True, True, True]]))
    >>> centres[0, 1:].tolist()
    [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    >>> size.tolist()
    [[[0.5, 0.5]]]
    """
    count = image.sum(1, keepdim=True)
    if image_grid_thw is None:
        patches = torch.ones_like(count).repeat(1, 2)
    else:
        patches = image_grid_thw[:, 1:]
    # the grid of tokens has the shape of the grid of patches, and as many cells as there are tokens
    scale = (count / patches.prod(1, keepdim=True)).sqrt()
    high, wide = (patches * scale).round()[..., None].unbind(1)
    place = (image.cumsum(1) - 1).clamp(min=0)  # 0, 1, 2 ... of image tokens
    x = (place % wide + 0.5) / wide
    y = (place // wide + 0.5) / high
    size = torch.cat([1 / wide, 1 / high], 1)[:, None]
    return torch.stack([x, y], -1), size


def covered_share(centres: Tensor, size: Tensor, region: Tensor) -> Tensor:
    """Say which share of each cell a region covers.

    Parameters
    ----------
    centres, size : of the cells, see `cells`.
    region : (rows, 4), a box in each picture.

    Returns
    -------
    Tensor (rows, tokens) : 0..1.
    """
    low = (centres - size / 2).maximum(region[:, None, :2])
    high = (centres + size / 2).minimum(region[:, None, 2:])
    return ((high - low).clamp(min=0) / size).prod(-1)
