"""Answers of a vision-language model to a whole data set: in batches, resumable, with control pictures.

`generate_answers` is greedy unless told otherwise. With `out` every answer is on disk as soon as its batch is done, and
a run that was killed goes on where it stopped. The controls of an evaluation use the same function: `shuffle_pictures`
(for `pictures_from`), `grey_picture` and `no_picture` (for `image_transform`).
"""

import hashlib
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image


def generate_answers(
    model: Any, processor: Any, dataset: Any, *, out: str | Path | None = None, batch_size: int = 8,
    max_new_tokens: int = 256, do_sample: bool = False, seed: int = 0, image_transform: Callable | None = None,
    pictures_from: Sequence[int] | None = None, question: str = "Describe this medical image.",
    backend: str = "transformers", cache_implementation: str | None = "auto", workers: int | None = None,
    **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer every sample of a data set.

    In float32 a greedy answer depends neither on the batch size nor on the order; in bfloat16 near ties may tip.

    Parameters
    ----------
    model, processor
        Model on its device, with or without adapter (it is left in evaluation mode), and its processor. For vLLM the
        model is a folder, a hub id or a `vllm.LLM`.
    dataset
        `datasets.Dataset` or list of dicts: converted records (`prompt`, `completion`, `images`), or pairs (`image`,
        `caption`), which are all asked `question`. `id` must be unique; without it the row number is taken.
    out
        JSON Lines file to write, and to go on from. The settings stand beside it in `<name>.settings.json`.
    batch_size, max_new_tokens
        Samples a batch (of similar prompt length, longest first) and most tokens an answer.
    do_sample, seed
        Draw tokens instead of taking the likeliest; the same seed and batch size give the same answers again.
    image_transform
        Function of a PIL picture that returns the picture to show instead, or None for no picture.
    pictures_from
        For each sample the row whose pictures it is shown.
    backend
        "transformers" or "vllm" (which does its own batching: give it a batch size of several hundred).
    cache_implementation
        "static" compiles decoding on a GPU, which takes about a minute; "auto" does so where batches times tokens are
        3,000 or more, so many that it pays.
    workers
        Processes that prepare pictures: by default up to 8 for a GPU, else none.
    **options
        For `model.generate` (`temperature`, `min_new_tokens` ...) or `vllm.SamplingParams`.

    Returns
    -------
    list of dict
        In the order of the data set: "id", "question", "answer", "reference" (str), "tokens" (generated, the end
        token too) and "seconds" (its share of the batch's time). `generation_speed` sums them up.

    Raises
    ------
    ValueError
        An empty data set, an id that repeats, `out` made with other settings or damaged.
    ImportError
        `backend="vllm"` without vLLM.
    """
    from torch import Generator
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    if not hasattr(dataset, "__getitem__"):
        raise ValueError("the data set streams: take a part of it, list(dataset.take(100)), to have it answered")
    samples, lengths, data = _survey(dataset, processor, question)
    donors = list(range(len(samples)) if pictures_from is None else map(int, pictures_from))
    if len(donors) != len(samples) or not set(donors) <= set(range(len(samples))):
        raise ValueError(f"pictures_from must hold {len(samples)} row numbers, one a sample")
    transform = getattr(image_transform, "__qualname__", type(image_transform).__name__)
    settings = {"model": _describe(model), "processor": _describe(processor), "data": data}
    settings |= {"pictures_from": None if pictures_from is None else donors, "image_transform": transform}
    settings |= {"backend": backend, "max_new_tokens": max_new_tokens, "options": options}
    settings |= {"drawn": [seed, batch_size] if do_sample else None}  # a greedy answer depends on neither
    done = {} if out is None else _resume(Path(out), settings)

    order = sorted(range(len(samples)), key=lambda i: -lengths[i])
    if not do_sample:  # drawn answers need the batches of the first start, greedy ones can be packed anew
        order = [i for i in order if samples[i]["id"] not in done]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    todo = [(n, batch) for n, batch in enumerate(batches) if any(samples[i]["id"] not in done for i in batch)]
    on_gpu = backend == "transformers" and model.device.type == "cuda"
    if cache_implementation == "auto":
        pays = on_gpu and len(todo) * max_new_tokens >= 3000 and getattr(model, "_can_compile_fullgraph", False)
        cache_implementation = "static" if pays else None
    if cache_implementation == "static" and len(todo) > 1:  # compiled for one size of batch: repeat the last sample
        todo = [(n, batch + batch[-1:] * (batch_size - len(batch))) for n, batch in todo]
    options = {"do_sample": do_sample, "max_new_tokens": max_new_tokens, **options}
    ask = _vllm if backend == "vllm" else _transformers
    answer = ask(model, processor, options, seed, cache_implementation)
    prepare = partial(_prepare, dataset, processor, donors, image_transform, question, getattr(model, "dtype", None))
    workers = (min(8, len(os.sched_getaffinity(0))) if on_gpu else 0) if workers is None else workers
    own = Generator()  # or the loader would draw from the global one
    parts = [[b[at : at + 32] for at in range(0, len(b), 32)] for _, b in todo]  # many processes share a batch
    loader = iter(DataLoader(sum(parts, []), batch_size=None, collate_fn=prepare, num_workers=workers, generator=own))
    with tqdm(total=len(samples), initial=len(done), unit="sample") as bar:
        start = time.perf_counter()
        for (number, batch), some in zip(todo, parts, strict=True):
            answers = dict(zip(batch, answer([next(loader) for _ in some], number), strict=True))
            seconds, start = (time.perf_counter() - start) / len(answers), time.perf_counter()
            new = {samples[i]["id"]: samples[i] | {"answer": text, "tokens": tokens, "seconds": round(seconds, 6)}
                   for i, (text, tokens) in answers.items() if samples[i]["id"] not in done}  # fmt: skip
            if out is not None:
                _append(Path(out), new.values())
            done |= new
            bar.update(len(new))
    return [done[sample["id"]] for sample in samples]


def generation_speed(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum up the speed of a run, in the names that Transformers and LLaMA-Factory print.

    Examples
    --------
    >>> generation_speed([{"tokens": 30, "seconds": 0.5}, {"tokens": 10, "seconds": 0.5}])["predict_tokens_per_second"]
    40.0
    """
    seconds, tokens = (sum(answer[name] for answer in answers) for name in ("seconds", "tokens"))
    a_second = [round(number / max(seconds, 1e-9), 3) for number in (len(answers), tokens)]
    speed = {"predict_runtime": round(seconds, 4), "predict_samples_per_second": a_second[0]}
    return speed | {"predict_tokens_per_second": a_second[1], "predict_samples": len(answers), "predict_tokens": tokens}


def grey_picture(image: Any) -> Any:
    """Return an even grey picture of the same size."""
    return Image.new("RGB", image.size, (128, 128, 128))


def no_picture(image: Any) -> None:
    """Show no picture: the question alone is asked."""


def shuffle_pictures(dataset: Any, seed: int = 0) -> list[int]:
    """Choose for each sample another row whose pictures it is shown: a derangement, to give as `pictures_from`.

    No sample gets a picture of its own structure (column `structure`, else of its own caption), unless more than half
    of all samples share it: then as few as possible do.

    Examples
    --------
    >>> rows = [{"structure": name} for name in ("liver", "liver", "spleen", "spleen")]
    >>> sorted(shuffle_pictures(rows)[:2])
    [2, 3]
    """
    keys = [row.get("structure") or _parts(row, "")[2] for row in _undecoded(dataset)]
    n, rng, count = len(keys), random.Random(seed), Counter(keys)
    if n < 2:
        raise ValueError("shuffle_pictures needs at least two samples")
    rows = sorted(range(n), key=lambda i: (-count[keys[i]], keys[i], rng.random()))
    step = count[keys[rows[0]]] % n or 1  # rows of a structure stand together: this step leads out of each
    donors = {row: rows[(place + step) % n] for place, row in enumerate(rows)}

    def allowed(row: int, donor: int) -> bool:
        return row != donor and (keys[row] != keys[donor] or len(count) == 1)

    for _ in range(20 * n):
        a, b = rng.randrange(n), rng.randrange(n)
        if allowed(a, donors[b]) and allowed(b, donors[a]):
            donors[a], donors[b] = donors[b], donors[a]
    return [donors[row] for row in range(n)]


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Read what `generate_answers` wrote; a last line that a kill cut short is left out."""
    try:
        return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and generate again") from error


def _resume(out: Path, settings: dict[str, Any]) -> dict[str, dict]:
    """Return the answers on file, if these settings made them, and cut off a line that was not finished."""
    beside, now = out.with_suffix(".settings.json"), json.dumps(settings, indent=1, default=str)
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(now, encoding="utf-8")  # read only once `out` has an answer, so it need not be whole before
        return {}
    old, new = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}, json.loads(now)
    if changed := [name for name in new | old if new.get(name) != old.get(name)]:
        raise ValueError(f"{out} was made with other settings ({', '.join(changed)}): delete it or choose another out")
    answers = {answer["id"]: answer for answer in read_answers(out)}
    os.truncate(out, out.read_bytes().rfind(b"\n") + 1)
    return answers


def _append(out: Path, answers: Iterable[dict]) -> None:
    with open(out, "a", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
        file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())


def _describe(thing: Any) -> str:
    """Digest of a processor's settings, or of a model's configuration and 16 numbers of each of its weights."""
    import torch

    if isinstance(thing, str | Path):
        return str(thing)
    digest = hashlib.sha256(str(getattr(thing, "chat_template", "")).encode())
    for part in ("config", "generation_config", "image_processor"):
        digest.update(getattr(thing, part).to_json_string().encode() if hasattr(thing, part) else b"")
    for name, weight in thing.named_parameters() if isinstance(thing, torch.nn.Module) else ():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            flat = weight.detach().flatten()
            digest.update(flat[:: max(1, flat.numel() // 16)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _parts(row: Mapping[str, Any], question: str) -> tuple[list[dict], list, str]:
    """Take messages, pictures and reference from a converted record or from a pair."""
    if "prompt" in row:
        return row["prompt"], row.get("images") or [], _text(row["completion"][-1])
    pictures = [row["image"]] if row.get("image") is not None else []
    content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}], pictures, row.get("caption") or ""


def _text(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _without_pictures(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [part for part in message["content"] if part["type"] != "image"]}


def _undecoded(dataset: Any) -> Any:
    """Give the rows with their pictures as bytes or paths."""
    from datasets import Dataset, Image, List

    for name, feature in (("image", Image(decode=False)), ("images", List(Image(decode=False)))):
        if isinstance(dataset, Dataset) and name in dataset.column_names:
            dataset = dataset.cast_column(name, feature)
    return dataset


def _survey(dataset: Any, processor: Any, question: str) -> tuple[list[dict], list[int], str]:
    """Collect ids, questions and references, the prompts' lengths (tokens, about), and a digest of it all."""
    samples, texts, pixels, digest = [], [], [], hashlib.sha256()
    for i, row in enumerate(_undecoded(dataset)):
        messages, pictures, reference = _parts(row, question)
        samples.append({"id": str(row.get("id", i)), "question": _text(messages[-1]), "reference": reference})
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        digest.update(json.dumps([samples[-1], texts[-1]]).encode())
        pixels.append(0)
        for picture in pictures:
            data = picture
            if isinstance(picture, Mapping):
                data = picture["bytes"] or Path(picture["path"]).read_bytes()
                picture = Image.open(io.BytesIO(data))
            pixels[-1] += picture.width * picture.height
            digest.update(data if isinstance(data, bytes) else data.tobytes())
    repeated = [name for name, times in Counter(sample["id"] for sample in samples).items() if times > 1]
    if repeated or not samples:
        raise ValueError(f"id {repeated[0]!r} occurs more than once" if repeated else "there is no sample to answer")
    tokens = processor.tokenizer(texts)["input_ids"]
    return samples, [len(t) + area // 1024 for t, area in zip(tokens, pixels, strict=True)], digest.hexdigest()


def _prepare(dataset, processor, donors, image_transform, question, dtype, batch):
    """Make the inputs of a part of a batch, in a worker process if there are any; without a dtype for vLLM."""
    texts, images = [], []
    for i in batch:
        messages, pictures, _ = _parts(dataset[i], question)
        if donors[i] != i:
            wanted, pictures = len(pictures), _parts(dataset[donors[i]], question)[1]
            if len(pictures) != wanted:
                raise ValueError(f"row {i} wants {wanted} pictures, row {donors[i]} has {len(pictures)}")
        pictures = [image_transform(p) for p in pictures] if image_transform else pictures
        if pictures and pictures[0] is None:
            pictures = []
            messages = [m if isinstance(m["content"], str) else _without_pictures(m) for m in messages]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        images.append(pictures)
    if dtype is None:
        data = [{"multi_modal_data": {"image": pictures}} if pictures else {} for pictures in images]
        return [{"prompt": text, **pictures} for text, pictures in zip(texts, data, strict=True)]
    shown = images if any(images) else None
    return processor(text=texts, images=shown, return_tensors="pt", padding=True, padding_side="left").to(dtype=dtype)


def _join(parts, pad):
    """One batch of its parts, padded on the left as a processor does."""
    from torch import cat
    from torch.nn.utils.rnn import pad_sequence

    batch = {}
    for key, first in parts[0].items():
        some = [part[key] for part in parts]
        if first.shape == parts[0]["input_ids"].shape:
            rows, fill = [row for part in some for row in part], pad if key == "input_ids" else 0
            batch[key] = pad_sequence(rows, batch_first=True, padding_value=fill, padding_side="left")
        else:
            batch[key] = cat(some)
    return batch


def _transformers(model, processor, options, seed, kind):
    import torch

    end = model.generation_config.eos_token_id
    ends = {*end} if isinstance(end, list) else {processor.tokenizer.eos_token_id if end is None else end}
    options = {"use_cache": True, "pad_token_id": processor.tokenizer.pad_token_id, **options}
    text, longest = getattr(model.config, "text_config", None), 0
    fold = kind == "static" and getattr(text, "_attn_implementation", None) == "sdpa" and _folded()
    attend = model.set_attn_implementation if fold else lambda names: None
    model.eval()

    def answer(parts, number):
        nonlocal longest
        inputs = _join([part.to(model.device) for part in parts], processor.tokenizer.pad_token_id)
        width = inputs["input_ids"].shape[1]
        # a cache that keeps its size is compiled once; a size that is no multiple of 8 is slow
        longest = max(longest, -(-(width + options["max_new_tokens"]) // 64) * 64)
        static = {"cache_implementation": kind, "max_cache_len": longest} if kind else {}
        attend({"text_config": fold})
        try:
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seed + number)
                rows = model.generate(**inputs, **options, **static)[:, width:].tolist()
        finally:
            attend({"text_config": "sdpa"})
        counts = [next((k + 1 for k, token in enumerate(row) if token in ends), len(row)) for row in rows]
        cut = [row[:count] for row, count in zip(rows, counts, strict=True)]
        texts = processor.tokenizer.batch_decode(cut, skip_special_tokens=True)
        return [(text.strip(), count) for text, count in zip(texts, counts, strict=True)]

    return answer


@cache
def _folded() -> str:
    """Name a way to attend in decoding: heads that share keys and values are so many queries of one head.

    SDPA with a mask would copy keys and values for each of them, and those are most of what a step reads.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        query = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # rows, keys' heads, heads that share them, width
        result = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return result.flatten(1, 2).unsqueeze(1), None

    AttentionInterface.register("folded", attend)
    AttentionMaskInterface.register("folded", sdpa_mask)
    return "folded"


def _vllm(model, processor, options, seed, kind):
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ImportError("backend='vllm' needs vLLM: pip install vllm (Linux, with a GPU)") from error
    llm = LLM(str(model)) if isinstance(model, str | Path) else model
    options = {"max_tokens": options.pop("max_new_tokens"), **options}
    options = options if options.pop("do_sample") else {**options, "temperature": 0.0}

    def answer(parts, number):
        parameters = SamplingParams(seed=seed + number, **options)
        outputs = [request.outputs[0] for request in llm.generate(sum(parts, []), parameters, use_tqdm=False)]
        return [(output.text.strip(), len(output.token_ids)) for output in outputs]

    return answer
