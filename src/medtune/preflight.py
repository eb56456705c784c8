"""Is it really training? Checks for the first minute, before the hours: each shows what it saw, or raises.

Every check returns a small dict to look at and raises ``ValueError`` with one line when something is wrong. The batch
is always one from the trainer's own collator: ``batch = trainer.data_collator([trainer.train_dataset[i] ...])``.
"""

from __future__ import annotations

from contextlib import contextmanager

from medtune.models import compare_logits, image_token_id, load_base, load_tuned, part_of, text_logits


def answer_end(processor) -> str:
    r"""Return what the chat template puts after an answer, such as ``"<|im_end|>\n"``."""
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
    return processor.apply_chat_template([question, answer], tokenize=False).rpartition("ANSWER")[2]


def check_labels(batch, processor, answers: list[str]) -> dict:
    """Check that the loss covers exactly the answers: not the prompt, no image token, and the end token too.

    Parameters
    ----------
    batch : `input_ids` and `labels` of shape (rows, tokens); labels that do not count are -100.
    answers : the reference answer of each row.

    Returns
    -------
    dict : "rows", the "answer_tokens" and "prompt_tokens" of each, and the decoded labels of the "first".

    Raises
    ------
    ValueError : names the first row whose labels are not answer, end token and what the template puts after it.
    """
    tokenizer, tail = processor.tokenizer, answer_end(processor)
    labels, ids = batch["labels"], batch["input_ids"]
    if len(answers) != len(labels):
        raise ValueError(f"{len(labels)} rows in the batch, but {len(answers)} answers to compare them with.")
    counted = labels != -100
    if bool((labels[counted] != ids[counted]).any()):
        raise ValueError("Some labels are not the tokens of the input: the model would learn a shifted text.")
    if bool((labels == image_token_id(processor)).any()):
        raise ValueError("Image tokens are among the labels: mask them with -100.")
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(labels, counted, strict=True)]
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        # through the tokenizer and back, because some normalise the text
        expected = tokenizer.decode(tokenizer(answer + tail, add_special_tokens=False)["input_ids"])
        if text != expected:
            at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), len(text))
            wrong = f"from character {at} on they read {text[at : at + 60]!r} instead of {expected[at : at + 60]!r}"
            raise ValueError(f"Row {row}: the labels are not the answer and its end {tail!r}; {wrong}.")
    prompt = batch["attention_mask"].bool() & ~counted
    tokens = {"answer_tokens": counted.sum(1).tolist(), "prompt_tokens": prompt.sum(1).tolist()}
    return {"rows": len(texts), "first": texts[0]} | tokens


def check_image_tokens(batch, processor) -> dict:
    """Check that every picture has as many image tokens in the text as the vision tower will deliver.

    Parameters
    ----------
    batch : `input_ids`, and `image_grid_thw` (Qwen) or `pixel_values` of a fixed number of tokens each (Gemma-3).

    Returns
    -------
    dict : "pictures" and the "image_tokens" of each.

    Raises
    ------
    ValueError : image tokens are missing or too many, for example because a text was cut to a length.
    """
    import torch

    if "image_grid_thw" in batch:
        expected = (batch["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    elif fixed := getattr(processor, "image_seq_length", None):
        expected = [fixed] * len(batch["pixel_values"])
    else:
        raise ValueError(f"The image tokens of {type(processor).__name__} cannot be counted: neither grid nor number.")
    is_image = (batch["input_ids"] == image_token_id(processor)).int()
    edges = torch.diff(is_image, dim=1, prepend=is_image[:, :1] * 0, append=is_image[:, :1] * 0)
    starts, ends = (torch.nonzero(edges == step)[:, 1] for step in (1, -1))
    found = (ends - starts).tolist()  # runs of image tokens, row by row
    if found != expected:
        wrong = f"The text has runs of {found} image tokens, the pictures need {expected}"
        raise ValueError(f"{wrong}: set max_length=None and bound the pixels instead, a cut breaks pictures.")
    return {"pictures": len(expected), "image_tokens": expected}


@contextmanager
def _undisturbed(model):
    """Train without dropout for a moment; afterwards modes, parameters' gradients and random state are as before."""
    import torch

    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates, training = [module.p for module in dropouts], model.training
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for module in dropouts:
            module.p = 0.0
        try:
            model.zero_grad()
            yield
        finally:
            for module, rate in zip(dropouts, rates, strict=True):
                module.p = rate
            model.zero_grad()
            model.train(training)


def check_gradients(model, batch, *, step: float = 1e-3) -> dict:
    """Check that after one step every group of adapters has a gradient; the model is left as it was.

    LoRA starts with B = 0, so that A gets a gradient only once B has moved: hence the step.

    Parameters
    ----------
    model : a model with adapters, or any with parameters to train.
    batch : tensors, labels among them.
    step : length of the step along each gradient.

    Returns
    -------
    dict : for each part of the model the number of "tensors" trained and the "norm" of their gradient.

    Raises
    ------
    ValueError : nothing to train, a frozen or unreached adapter, a gradient that is zero or not finite.
    """
    import torch

    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    trained = adapters or {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("Nothing is trained: no parameter requires a gradient.")
    if frozen := [name for name, p in trained.items() if not p.requires_grad]:
        raise ValueError(f"Adapter frozen in {part_of(frozen[0])}: {frozen[0]} and {len(frozen) - 1} more.")
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    before = {name: p.detach().clone() for name, p in trained.items()}
    groups: dict[str, dict] = {}
    with _undisturbed(model):
        try:
            model.train()
            model(**inputs).loss.backward()
            with torch.no_grad():
                for p in trained.values():
                    if p.grad is not None:
                        p -= step * p.grad / p.grad.norm().clamp(min=1e-12)
            model.zero_grad()
            model(**inputs).loss.backward()
            norms = {name: float("nan") if p.grad is None else p.grad.norm().item() for name, p in trained.items()}
        finally:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(before[name])
    for name, norm in norms.items():
        group = groups.setdefault(part_of(name), {"tensors": 0, "norm": 0.0})
        group["tensors"] += 1
        group["norm"] = (group["norm"] ** 2 + norm**2) ** 0.5
        if not 0 < norm < float("inf"):
            raise ValueError(f"No gradient in {part_of(name)}: {name} has norm {norm}, so it would never learn.")
    return groups


def check_accumulation(trainer, rows: list[dict], *, tolerance: float = 5e-5) -> dict:
    """Check that one batch of n rows and n accumulated batches of one row give the same loss and gradient.

    Several models declare ``accepts_loss_kwargs = False``. Then a Trainer takes the mean of means, and short answers
    weigh more: set ``trainer.model_accepts_loss_kwargs = True``. To the loss of a mixture of experts TRL adds one that
    balances the router, which no cut leaves as it is: ``SFTConfig(router_aux_loss_coef=0.0)`` trains without.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` for example, before or after training.
    rows : of the training set, with answers of different length.
    tolerance : allowed difference, relative to the loss and to the largest gradient. In float32 a GPU rounds by 1e-5,
        and means of means differ by 1e-3 or so.

    Returns
    -------
    dict : "loss_batch", "loss_accumulated", "gradient_difference" (relative), "answer_tokens" of the rows.

    Raises
    ------
    ValueError : they differ, or the rows cannot show it because all answers have the same number of tokens.
    """
    import copy

    model, collate = trainer.model, trainer.data_collator
    state = copy.deepcopy(getattr(trainer, "_metrics", None)), getattr(trainer, "_total_train_tokens", None)
    steps, results = getattr(trainer, "current_gradient_accumulation_steps", 1), []
    for batches in ([rows], [[row] for row in rows]):
        # collators may change the rows they get
        inputs = iter([collate([copy.deepcopy(row) for row in batch]) for batch in batches])
        samples, items = trainer.get_batch_samples(inputs, len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        with _undisturbed(model):
            loss = sum(trainer.training_step(model, sample, items).item() for sample in samples)
            gradients = [p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None]
        results.append((loss, gradients))
    tokens = [int((sample["labels"] != -100).sum()) for sample in samples]
    trainer.current_gradient_accumulation_steps = steps
    if state[0] is not None:
        trainer._metrics, trainer._total_train_tokens = state
    if len(set(tokens)) < 2:
        raise ValueError(f"These rows cannot show it: their answers all have {tokens[0]} tokens, choose others.")
    (loss, gradients), (loss_accumulated, accumulated) = results
    largest = max(gradient.abs().max().item() for gradient in gradients)
    difference = max((a - b).abs().max().item() for a, b in zip(gradients, accumulated, strict=True)) / largest
    if not abs(loss - loss_accumulated) <= tolerance * abs(loss) or not difference <= tolerance:
        wrong = f"{loss:.6f} in one batch, {loss_accumulated:.6f} accumulated (gradients differ by {difference:.1e})"
        fix = "set trainer.model_accepts_loss_kwargs = True, router_aux_loss_coef=0"
        raise ValueError(f"Loss {wrong}: the mean depends on the cut; {fix}.")
    losses = {"loss_batch": loss, "loss_accumulated": loss_accumulated}
    return losses | {"gradient_difference": difference, "answer_tokens": tokens}


def check_reload(base, adapter, model, batch, *, tolerance: float = 1e-5) -> dict:
    """Check that the adapter on disk, put onto a fresh base model, gives the logits of the model in memory.

    Parameters
    ----------
    base : folder or hub name of the base model; it is loaded in the dtype and quantisation of `model`.
    adapter, model : the saved adapter and the model in memory.
    tolerance : allowed difference, relative to the largest logit.

    Returns
    -------
    dict : see `medtune.models.compare_logits`.

    Raises
    ------
    ValueError : the logits differ, or the adapter does not fit the base (missing or unexpected keys).
    """
    quantization, home = getattr(model.config, "quantization_config", None), model.device
    noted = text_logits(model, batch)
    model.to(home if quantization else "cpu")  # a card that trains it may have no room for another
    options = {"dtype": model.config.dtype, "device_map": {"": home}, "quantization_config": quantization}
    fresh = load_tuned(load_base(base, **options), adapter)
    for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
        ours.data = ours.data.to(theirs.dtype)  # TRL trains QLoRA's adapters in bfloat16, peft loads them as float32
    result = compare_logits(noted, fresh, batch)
    del fresh
    model.to(home)
    if not result["max_abs_diff"] <= tolerance * max(result["largest_logit"], 1.0):
        wrong = f"does not give back the model in memory: logits differ by up to {result['max_abs_diff']:.3g}"
        raise ValueError(f"The adapter in {adapter} {wrong}. Was it saved after the last step, from the same base?")
    return result
