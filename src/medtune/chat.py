"""The side-by-side page: ask a base and a tuned model about pictures, and keep what people say about the answers.

The parts work without the page: `load_models`, `answer`, `read_upload` and `save_feedback`. The page is for one's own
machine: it listens on 127.0.0.1 unless a password guards it, asks no other server, and deletes an upload after two or
three minutes; what a visitor saves is kept without metadata. Beside this file, `chat.json` has the words (English and
Chinese), the layout, and which event calls which function; `chat.html` has the style.
"""

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from . import data, dicom

# bytes of a file, or pixels of a picture or of all frames of a file; slices of an upload; a longer edge is scaled down
MAX_SIZE, MAX_SLICES, MAX_EDGE = 64_000_000, 1000, 2048
# pictures and turns of a conversation; characters of a question or a caption
MAX_PICTURES, MAX_TURNS, MAX_CHARACTERS = 8, 10, 2000
PAGE = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
TEXT = PAGE["text"]  # key -> what the page says in English, in Chinese


def load_models(base, adapter=None, *, tuned=None, heads=None, threshold=0.5, max_pixels=None, **options):
    """Load base and tuned model; an adapter shares the weights of the base.

    Parameters
    ----------
    base, adapter, tuned : folder or hub name of the base; folder of an adapter on it, or of a merged model.
    heads, threshold : folder of a multi-task model, which locates, verifies, then answers; its least match score.
    max_pixels : of a picture after resizing.
    **options : for `medtune.models.load_base`, such as dtype; the default is bfloat16 on a GPU and float32 without.

    Returns
    -------
    SimpleNamespace : `base` and `tuned` (or None), which are the same model if there is an adapter; their `processor`,
        one, so that both get the same prompt; `locate`, None or a function of picture and question; and `worker`, the
        one thread that generates: switching an adapter off is for the whole model, whoever asks.

    Raises
    ------
    ValueError, OSError : both adapter and tuned, or a model or processor that does not load: one line.
    """
    import torch

    from . import models, multitask

    if adapter and tuned:
        raise ValueError("give an adapter or a tuned (merged) model, not both")
    options = ({"dtype": "bfloat16", "device_map": {"": 0}} if torch.cuda.is_available() else {}) | options
    own = adapter if adapter and any(Path(adapter).glob("*processor_config.json")) else tuned or base
    loaded = SimpleNamespace(processor=models.load_processor(own, max_pixels=max_pixels), worker=ThreadPoolExecutor(1))
    first, loaded.locate = models.load_base(base, **options), None
    loaded.tuned = models.load_tuned(first, adapter) if adapter else tuned and models.load_base(tuned, **options)
    loaded.base = loaded.tuned if adapter else first
    if heads:
        made, locate = multitask.classes()[0], multitask.locate_verify_diagnose
        third = made.from_pretrained(models.load_base(base, **options), heads)  # on weights of its own
        loaded.locate = lambda image, text: locate(third, loaded.processor, [image], [text], threshold=threshold)[0]
    return loaded


def answer(
    models: SimpleNamespace, which: str, messages: Sequence[dict], pictures: Sequence, *,
    max_new_tokens: int = 160, do_sample: bool = False, stopped: Callable[[], bool] = bool,
) -> Iterator[dict]:  # fmt: skip
    """Answer as one of the models, word by word; when several ask at once, one after the other is answered.

    Parameters
    ----------
    models, which : what `load_models` gives; "base" or "tuned".
    messages : roles and content parts, as a chat template takes them, ending with a question.
    pictures : one for each image part, in their order.
    max_new_tokens, do_sample : longest answer; draw each token, as the model's own settings say, or take the likeliest.
    stopped : asked after every token; True ends the answer.

    Yields
    ------
    dict : "text" so far, "tokens" (the end token too), "seconds" and "first", the seconds to the first token, both
        without the time in which others were answered.
    """
    import torch
    from transformers import TextIteratorStreamer

    model, processor, shared = getattr(models, which), models.processor, models.base is models.tuned
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], images=[list(pictures)] if pictures else None, return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"do_sample": do_sample, "max_new_tokens": max_new_tokens, "streamer": streamer}
    gone, times, said = [], [], ""

    def note(ids, scores, **_):
        times.append(time.perf_counter())
        return torch.full((len(ids),), bool(stopped() or gone), device=ids.device)

    def generate():
        try:
            with model.disable_adapter() if shared and which == "base" else contextlib.nullcontext():
                times.append(time.perf_counter())
                model.generate(**inputs.to(model.device, dtype=model.dtype), **options, stopping_criteria=[note])
        finally:
            streamer.end()

    job = models.worker.submit(generate)
    try:
        for piece in streamer:
            said, seconds = said + piece, [moment - times[0] for moment in times] or [0.0]
            yield {"text": said.strip(), "tokens": len(times) - 1, "seconds": seconds[-1], "first": seconds[:2][-1]}
        job.result()  # raises what went wrong
    finally:
        gone.append(job.cancel())  # who no longer listens need not be answered to the end


def read_upload(files: Sequence[str | os.PathLike], room: int = MAX_PICTURES) -> SimpleNamespace:
    """Read PNG, JPEG and DICOM files that a stranger sent, at most `room` pictures; the files stay as they are.

    Returns
    -------
    SimpleNamespace : `pictures`, in RGB and without metadata; `slices`, (DICOM file, frame) in the order of the series;
        `windows`, those of `medtune.dicom` for CT; `refused`, (name, (why in English, in Chinese)); and `folder`, with
        copies of the DICOM files that hold no patient data, removed when nobody holds it any more.

    Examples
    --------
    >>> file = Path(tempfile.mkdtemp()) / "a.png"
    >>> _ = file.write_text("no picture")
    >>> read_upload([file]).refused[0][1][0]
    'it is no PNG, JPEG or DICOM picture'
    """
    from PIL import Image, UnidentifiedImageError

    folder, pictures, refused, frames, ct = tempfile.TemporaryDirectory(prefix="medtune-"), [], [], {}, False
    keys = {UnidentifiedImageError: "no_picture", Image.DecompressionBombError: "much"}

    def check(size):
        if size > MAX_SIZE or len(pictures) >= room or sum(frames.values()) >= MAX_SLICES:
            raise Image.DecompressionBombError

    for number, file in enumerate(map(Path, files)):
        try:
            check(file.stat().st_size)
            if data.is_dicom(file):
                about = dicom.copy_without_patient(file, bare := Path(folder.name, f"{number:05}.dcm"))
                check((about["rows"] or 0) * (about["columns"] or 0) * about["frames"])
                frames[bare.name], ct = len(dicom.read_frames(bare)), about["modality"] == "CT"
                continue
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                check(image.width * image.height)
                rgb = data.to_rgb(image)
            rgb.thumbnail((MAX_EDGE, MAX_EDGE))
            pictures.append(Image.frombytes("RGB", rgb.size, rgb.tobytes()))  # the file's metadata stay behind
        except Exception as error:  # decoders raise many kinds
            refused.append((file.name, [text.format(error) for text in TEXT[keys.get(type(error), "damaged")]]))
    series = dicom.series_files(folder.name) if frames else []
    slices = [(path, n) for one in series for path in one for n in range(frames.get(path.name, 0))]
    windows = dicom.WINDOWS if ct else {}
    return SimpleNamespace(pictures=pictures, slices=slices, windows=windows, refused=refused, folder=folder)


def save_feedback(folder: str | os.PathLike, key: str, pictures: Sequence, *, caption: str, **said: str) -> Path:
    """Keep what somebody said of an answer, as a row of JSON Lines that `medtune convert` reads; return the file.

    Parameters
    ----------
    folder : gets `feedback.jsonl` and `images/`, in PNG without metadata; one call at a time.
    key : names the answer: a later word on it replaces the former.
    pictures : several make a pair each, of one `group`; convert joins them again with `pictures_per_sample`.
    caption : what a model should learn to answer. Empty after a thumb down: convert rejects such a row, and counts it.
    **said : further columns, such as question, answer, model, and rating ("up", "down", "corrected").

    Examples
    --------
    >>> from PIL import Image
    >>> file = save_feedback(tempfile.mkdtemp(), "1", [Image.new("RGB", (9, 9))], caption="A cat.", rating="corrected")
    >>> data.load_pairs(file)[0]["caption"]
    'A cat.'
    """
    file, part = Path(folder, "feedback.jsonl"), Path(folder, ".part")
    names = [f"images/{hashlib.sha256(f'{p.size}'.encode() + p.tobytes()).hexdigest()[:32]}.png" for p in pictures]
    row = {"id": key, "image": names, "caption": caption, "group": hashlib.sha256(str(names).encode()).hexdigest()[:16]}
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, pictures, strict=True):
        picture.save(part, "PNG")
        os.replace(part, Path(folder, name))
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    lines = [line for line in lines if json.loads(line)["id"] != key] + [json.dumps(row | said, ensure_ascii=False)]
    part.write_text("\n".join(lines) + "\n", "utf-8")
    os.replace(part, file)
    return file


def build_page(models: SimpleNamespace, feedback="chat_feedback", examples: Sequence[dict] | None = None):
    """Make the page, a `gradio.Blocks`; `launch` also serves it.

    Parameters
    ----------
    models : as `load_models` gives them; without a tuned or multi-task model only the base answers.
    feedback : the folder for `save_feedback`.
    examples : rows with image, caption and caption_zh. Default: six structures of the sample set, if it is built.
    """
    import gradio as gr

    from .roi import draw_box

    ui, words, sides = {}, {}, ["base", "tuned"] if models.tuned or models.locate else ["base"]
    if examples is None:
        with contextlib.suppress(OSError):
            rows = data.load_pairs("sample", split="test", limit=200)
            examples = list({row["structure"]: row for row in rows}.values())[:6]
    empty = {"pictures": [], "upload": SimpleNamespace(slices=[], windows={}), "turns": [], "stopped": False}
    given = {"none": {"visible": not examples}, "tuned": {"visible": len(sides) > 1}}
    given["shelf"] = {"value": [row["image"] for row in examples or ()], "visible": bool(examples)}
    given["state"] = {"value": SimpleNamespace(**empty)}

    def build(nodes):  # kind, name, options ("@key" stands for a text) and what is inside
        for kind, name, options, *inner in nodes:
            keys = {prop: text[1:] for prop, text in options.items() if str(text).startswith("@")}
            ui[name] = getattr(gr, kind)(**options | {p: TEXT[k][0] for p, k in keys.items()} | given.get(name, {}))
            words.update({name: keys} if keys else {})
            with ui[name] if inner else contextlib.nullcontext():
                build(inner[0] if inner else ())

    def look(at, preset, now):  # the slice that the slider points at, if there is a series
        path, frame = now.upload.slices[int(at) - 1] if now.upload.slices else (None, 0)
        return path and dicom.read_frames(path, window=preset or None)[frame]

    def talk(lang, now):  # both conversations
        lines = {side: [] for side in sides}
        for turn, side in ((turn, side) for turn in now.turns for side in sides):
            said, new = turn["said"].get(side, {"text": "…"}), len(turn["pictures"])
            asked = TEXT["pictures"][lang].format(new) * bool(new) + " " + turn["question"]
            text = said["text"] + (f"\n\n*{TEXT['stats'][lang].format(**said)}*" if "first" in said else "")
            lines[side] += [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": text}]
        return {ui[side]: lines[side] for side in sides}

    def show(lang, now, status="", at=1, preset=""):  # all that follows from what a visitor has
        slices = now.upload.slices
        presets = [(f"{TEXT[key][lang]} {c}/{w}", key) for key, (c, w) in now.upload.windows.items()]
        return talk(lang, now) | {
            ui["state"]: now, ui["status"]: status, ui["files"]: None, ui["view"]: look(at, preset, now),
            ui["series"]: gr.Column(visible=bool(slices)), ui["several"]: gr.Column(visible=len(slices) > 1),
            ui["slider"]: gr.Slider(1, max(len(slices), 2), value=at),
            ui["window"]: gr.Dropdown([(TEXT["stored"][lang], ""), *presets], value=preset, label=TEXT["window"][lang]),
            ui["gallery"]: gr.Gallery(now.pictures, visible=bool(now.pictures)),
        }  # fmt: skip

    def add(paths, lang, now):
        upload, why = read_upload(paths or [], MAX_PICTURES - len(now.pictures)), TEXT["refused"][lang]
        now.pictures, now.upload = now.pictures + upload.pictures, upload if upload.slices else now.upload
        return show(lang, now, "\n\n".join(why.format(name, reason[lang]) for name, reason in upload.refused))

    def keep(at, preset, lang, now):
        now.pictures = [*now.pictures, look(at, preset, now)][:MAX_PICTURES]
        return show(lang, now, at=at, preset=preset)

    def choose(event: gr.SelectData, lang, now):
        row, now.upload = examples[event.index], empty["upload"]
        now.pictures = [data.to_rgb(row["image"])]
        return show(lang, now) | {ui["reference"]: row["caption_zh" if lang else "caption"]}

    def clear(lang):
        return show(lang, SimpleNamespace(**empty)) | {ui["located"]: gr.Image(None, visible=False)}

    def ask(text, sampled, longest, at, preset, lang, now):
        for mark in models.processor.tokenizer.get_added_vocab():  # such as the end of a turn, or a picture
            text = text.replace(mark, " ")
        seen = [picture for turn in now.turns for picture in turn["pictures"]]
        new = [picture for picture in (*now.pictures, look(at, preset, now)) if picture]
        new = [picture for n, picture in enumerate(new) if picture not in seen + new[:n]]
        seen, full = seen + new, len(now.turns) >= MAX_TURNS or len(seen + new) > MAX_PICTURES
        if full or not (seen and text.strip()):
            yield {ui["status"]: TEXT["full" if full else "empty"][lang]}
            return
        turn = {"id": secrets.token_hex(16), "question": text.strip()[:MAX_CHARACTERS], "pictures": new, "said": {}}
        turn["parts"] = [{"type": "image"}] * len(new) + [{"type": "text", "text": turn["question"]}]
        now.turns, now.stopped = [*now.turns, turn], False
        yield {ui["state"]: now, ui["question"]: "", ui["status"]: ""} | talk(lang, now)
        for side in sides:
            if side == "tuned" and models.locate and seen:
                found = models.worker.submit(models.locate, seen[-1], turn["question"]).result()
                turn["said"][side] = {"text": found["answer"] or TEXT["no_answer"][lang].format(found["reason"])}
                label = TEXT["match"][lang].format(found["match_score"])
                yield {ui["located"]: gr.Image(draw_box(seen[-1], found["box"]), label=label, visible=True)}
            messages = []
            for old in now.turns:
                said = {"type": "text", "text": old["said"].get(side, {}).get("text") or "…"}
                messages += [{"role": "user", "content": old["parts"]}, {"role": "assistant", "content": [said]}]
            options = {"max_new_tokens": int(longest), "do_sample": sampled, "stopped": lambda: now.stopped}
            for part in answer(models, side, messages[:-1], seen, **options) if getattr(models, side) else ():
                turn["said"][side] = part
                if part["tokens"] % 4 < 2:  # the first one at once, then every other is enough
                    yield talk(lang, now)
            yield talk(lang, now) | {ui["state"]: now}

    def stop(now):
        now.stopped = True

    def learn(lang, now, number, side, rating, caption):
        turn, pictures = now.turns[number], [p for old in now.turns[: number + 1] for p in old["pictures"]]
        said = {"question": turn["question"], "answer": turn["said"][side]["text"], "model": side, "rating": rating}
        return TEXT["kept"][lang].format(save_feedback(feedback, turn["id"] + side, pictures, caption=caption, **said))

    def vote(event: gr.LikeData, lang, now):
        number, side = event.index // 2, event.target.elem_id
        liked = ("up", now.turns[number]["said"][side]["text"]) if event.liked in (True, "Like") else ("down", "")
        return learn(lang, now, number, side, *liked)

    def correct(text, lang, now):
        said = lang, now, len(now.turns) - 1, sides[-1], "corrected", text.strip()[:MAX_CHARACTERS]
        return learn(*said) if now.turns and text.strip() else TEXT["first"][lang]

    def translate(at, preset, lang, now):
        told = {ui[name]: gr.update(**{p: TEXT[k][lang] for p, k in keys.items()}) for name, keys in words.items()}
        return told | {ui["window"]: show(lang, now, at=at, preset=preset)[ui["window"]]}

    calls = {call.__name__: call for call in (add, look, keep, choose, clear, ask, stop, vote, correct, translate)}
    # gradio's copies of what visitors sent and saw may hold a patient's name: each minute those older than 2 minutes go
    with gr.Blocks(title="medtune chat", analytics_enabled=False, delete_cache=(60, 120)) as page:
        build(PAGE["layout"])
        for triggers, name, *ends, options in PAGE["events"]:
            ends = [[ui[one] for part in end for one in PAGE["groups"].get(part, [part])] for end in ends]
            events = [getattr(ui[part], event) for part, event in (trigger.split(".") for trigger in triggers)]
            gr.on(events, calls[name], *ends, **options)
    return page


def launch(models, *, host: str = "127.0.0.1", port: int | None = None, password: str | None = None, **options):
    """Serve the page in the background; return it: `local_url` says where, `block_thread()` waits, `close()` ends it.

    Parameters
    ----------
    models, **options : as for `build_page`.
    host, port : where to listen, and by default at the first free port from 7860 on.
    password : asked of every visitor (any user name); another host than this machine needs one of 8 characters or more.

    Raises
    ------
    ValueError : another host without a password, or one that is too short.
    """
    if (host not in ("127.0.0.1", "localhost", "::1") or password) and len(password or "") < 8:
        raise ValueError(f"others can reach {host}: set a password of at least 8 characters, or stay on 127.0.0.1")
    page = build_page(models, **options).queue(max_size=64, default_concurrency_limit=4)
    settings = {"server_name": host, "server_port": port, "head_paths": Path(__file__).with_suffix(".html")}
    right = password and (lambda _, given: secrets.compare_digest(given.encode(), password.encode()))
    page.launch(auth=right, max_file_size=MAX_SIZE, **settings, **PAGE["launch"])
    print(f"medtune chat: {page.local_url} (Ctrl+C stops it)", flush=True)
    return page
