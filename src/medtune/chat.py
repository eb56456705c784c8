"""The side-by-side page: ask a base and a tuned model about pictures, and keep what people say about the answers.

The parts work without the page: `load_models`, `answer`, `read_upload` and `save_feedback`. The page is for one's own
machine: it listens on 127.0.0.1 unless a password guards it, asks no other server, and keeps no upload but what a
visitor saves, and that without metadata. Beside this file, `chat.json` has its words, `chat.html` its style.
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import data, dicom

MAX_PICTURES, MAX_TURNS = 8, 10  # of one conversation
MAX_MEGABYTES, MAX_PIXELS, MAX_SLICES = 64, 40_000_000, 1000  # of a file (all its frames together); of one upload
MAX_EDGE, MAX_TOKENS, MAX_CHARACTERS = 2048, 512, 2000  # larger pictures are scaled down; of an answer; of a question
PAGE = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
TEXT = PAGE["text"]  # key -> what the page says in English, in Chinese
_SAVING = threading.Lock()


@dataclass
class Models:
    """The two answerers of a page; `base` may be `tuned` with its adapter switched off."""

    base: Any
    tuned: Any
    processor: Any  # of both, so that both get the same prompt
    locate: Any = None  # of a multi-task model: (picture, question) to box, match_score, answer and reason
    lock: Any = field(default_factory=threading.Lock)  # who answers holds it: the switch is the model's, for everybody


def load_models(base, adapter=None, *, tuned=None, multitask=None, max_pixels: int | None = None, **options) -> Models:
    """Load base and tuned model; an adapter shares the weights of the base.

    Parameters
    ----------
    base, adapter, tuned : folder or hub name of the base; folder of an adapter on it, or of a merged model.
    multitask : folder of a multi-task model, which locates, verifies and then answers.
    max_pixels : of a picture after resizing.
    **options : for `medtune.models.load_base`, such as dtype; the default is bfloat16 on a GPU and float32 without.

    Raises
    ------
    ValueError, OSError : both adapter and tuned, or a model or processor that does not load: one line.
    """
    import torch

    from . import models

    if adapter and tuned:
        raise ValueError("give an adapter or a tuned (merged) model, not both")
    defaults = {"dtype": "bfloat16", "device_map": {"": 0}} if torch.cuda.is_available() else {"dtype": "float32"}
    own = adapter if adapter and any(Path(adapter).glob("*processor_config.json")) else tuned or base
    processor, model = models.load_processor(own, max_pixels=max_pixels), models.load_base(base, **defaults | options)
    loaded = Models(model, None, processor)
    if adapter:
        loaded.base = loaded.tuned = models.load_tuned(model, adapter)
    elif tuned:
        loaded.tuned = models.load_base(tuned, **defaults | options)
    if multitask:
        from .multitask import load_multitask, locate_verify_diagnose

        loaded.locate = functools.partial(locate_verify_diagnose, load_multitask(multitask))
    return loaded


def answer(
    models: Models, which: str, messages: Sequence[dict], pictures: Sequence[Any], *,
    max_new_tokens: int = 160, do_sample: bool = False, stopped: Callable[[], bool] = bool,
) -> Iterator[dict]:  # fmt: skip
    """Answer as one of the models, word by word; any number of threads may call this at once, one is answered.

    Parameters
    ----------
    models, which : "base" or "tuned" of these.
    messages : roles and content parts, as a chat template takes them, ending with a question.
    pictures : one for each image part, in their order.
    max_new_tokens, do_sample : longest answer; draw each token (temperature 0.8, top-p 0.95) or take the likeliest.
    stopped : asked after every token; True ends the answer.

    Yields
    ------
    dict : "text" so far, "tokens" (the end token too), "seconds" and "first", the seconds to the first token, both
        without the time in which others were answered.
    """
    import torch
    from transformers import TextIteratorStreamer

    model, processor, off = getattr(models, which), models.processor, which == "base" and models.base is models.tuned
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], images=[list(pictures)] if pictures else None, return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"do_sample": do_sample, "pad_token_id": processor.tokenizer.pad_token_id, "streamer": streamer}
    options |= {"temperature": 0.8, "top_p": 0.95} if do_sample else {}
    left, failed, times, said = threading.Event(), [], [], ""

    def note_time(ids, scores, **_):
        times.append(time.perf_counter())
        return torch.full((len(ids),), stopped() or left.is_set(), device=ids.device)

    def generate():
        try:
            with models.lock, model.disable_adapter() if off else contextlib.nullcontext():
                times.append(time.perf_counter())
                options.update(inputs.to(model.device, dtype=model.dtype))
                model.generate(**options, max_new_tokens=max_new_tokens, stopping_criteria=[note_time])
        except Exception as error:  # in a thread of its own nobody would hear of it
            failed.append(error)
        finally:
            streamer.end()

    threading.Thread(target=generate, daemon=True).start()
    try:
        for piece in streamer:
            said, seconds = said + piece, [moment - times[0] for moment in times] or [0.0]
            yield {"text": said.strip(), "tokens": len(times) - 1, "seconds": seconds[-1], "first": seconds[:2][-1]}
    finally:
        left.set()  # who no longer listens need not be answered to the end
    if failed:
        raise failed[0]


def read_upload(files: Sequence[str | os.PathLike]) -> SimpleNamespace:
    """Read PNG, JPEG and DICOM files that a stranger sent; the files stay as they are.

    Returns
    -------
    SimpleNamespace : `pictures`, in RGB and without metadata; `slices`, (DICOM file, frame) in the order of the series;
        `windows`, whether CT windows apply; `refused`, (name, (why in English, in Chinese)); and `folder`, with copies
        of the DICOM files that hold no patient data, removed when nobody holds it any more.

    Examples
    --------
    >>> file = Path(tempfile.mkdtemp()) / "a.png"
    >>> _ = file.write_text("no picture")
    >>> read_upload([file]).refused[0][1][0]
    'it is no PNG, JPEG or DICOM picture'
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    folder, pictures, refused, frames, windows = tempfile.TemporaryDirectory(prefix="medtune-"), [], [], {}, False
    known = {UnidentifiedImageError: "no_picture", Image.DecompressionBombError: "large", OverflowError: "many"}
    for number, file in enumerate(map(Path, files)):
        try:
            if len(pictures) >= MAX_PICTURES or sum(frames.values()) >= MAX_SLICES:
                raise OverflowError
            if file.stat().st_size > MAX_MEGABYTES * 10**6:
                raise Image.DecompressionBombError
            if data.is_dicom(file):
                about = dicom.copy_without_patient(file, bare := Path(folder.name, f"{number:05}.dcm"))
                if (about["rows"] or 0) * (about["columns"] or 0) * about["frames"] > MAX_PIXELS:
                    raise Image.DecompressionBombError
                frames[bare.name], windows = len(dicom.read_frames(bare)), about["modality"] == "CT"
                continue
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                rgb = data.to_rgb(image)
            rgb.thumbnail((MAX_EDGE, MAX_EDGE))
            pictures.append(Image.fromarray(np.asarray(rgb)))  # its pixels: what else the file held stays behind
        except Exception as error:  # decoders raise many kinds
            refused.append((file.name, [text.format(error) for text in TEXT[known.get(type(error), "damaged")]]))
    series = dicom.series_files(folder.name) if frames else []
    slices = [(str(path), n) for one in series for path in one for n in range(frames.get(path.name, 0))]
    return SimpleNamespace(pictures=pictures, slices=slices, windows=windows, refused=refused, folder=folder)


_read_frames = functools.lru_cache(maxsize=4)(dicom.read_frames)


def _digest(picture: Any) -> str:
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]


def save_feedback(folder: str | os.PathLike, key: str, pictures: Sequence[Any], *, caption: str, **said: str) -> Path:
    """Keep what somebody said of an answer, as a row of JSON Lines that `medtune convert` reads; return the file.

    Parameters
    ----------
    folder : gets `feedback.jsonl` and `images/`, in PNG without metadata.
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
    folder, names = Path(folder), [f"images/{_digest(picture)}.png" for picture in pictures]
    row = {"id": key, "image": names, "caption": caption} | said
    row["group"] = hashlib.sha256("".join(names).encode()).hexdigest()[:16]
    file, part = folder / "feedback.jsonl", folder / ".part"
    with _SAVING:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, pictures, strict=True):
            picture.save(part, "PNG")
            os.replace(part, folder / name)
        lines = file.read_text("utf-8").splitlines() if file.exists() else []
        lines = [line for line in lines if json.loads(line)["id"] != key] + [json.dumps(row, ensure_ascii=False)]
        part.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(part, file)
    return file



def build_page(models: Models, feedback: str | os.PathLike = "chat_feedback", examples: Sequence[dict] | None = None):
    """Make the page, a `gradio.Blocks`; `launch` also serves it.

    Parameters
    ----------
    models : whose answers to show; without a tuned or multi-task model those of the base alone.
    feedback : the folder for `save_feedback`.
    examples : rows with image, caption and caption_zh. Default: six structures of the sample set, if it is built.
    """
    import gradio as gr

    from .roi import draw_box

    ui, words, sides = SimpleNamespace(), {}, ["base", "tuned"] if models.tuned or models.locate else ["base"]
    if examples is None:
        with contextlib.suppress(OSError):
            rows = data.load_pairs("sample", split="test", limit=200)
            examples = list({row["structure"]: row for row in rows}.values())[:6]
    known = {name: {"visible": bool(examples)} for name in ("shelf", "reference")}
    known["shelf"]["value"] = [row["image"] for row in examples or ()]
    known |= {"none": {"visible": not examples}, "tuned": {"visible": sides[-1] == "tuned"}}

    def build(nodes):  # kind, name, options ("@key" stands for a text) and what is inside
        for kind, name, options, *inner in nodes:
            keys = {prop: text[1:] for prop, text in options.items() if str(text).startswith("@")}
            options = options | {prop: TEXT[key][0] for prop, key in keys.items()} | known.get(name, {})
            setattr(ui, name, part := getattr(gr, kind)(**options))
            words.update({part: keys} if keys else {})
            with part if inner else contextlib.nullcontext():
                build(inner[0] if inner else ())

    def visit():
        return SimpleNamespace(pictures=[], upload=None, turns=[], stopped=False)

    def look(at, preset, now):  # the slice that the slider points at, if there is a series
        path, frame = now.upload.slices[int(at) - 1] if now.upload else (None, 0)
        return [_read_frames(path, window=preset or None)[frame]] if path else []

    def show(lang, now, status="", at=1, preset=""):  # all that follows from what a visitor has
        slices, windows = (now.upload.slices, now.upload.windows) if now.upload else ([], False)
        presets = [(f"{TEXT[key][lang]} {c}/{w}", key) for key, (c, w) in dicom.WINDOWS.items() if windows]
        return talk(lang, now) | {
            state: now, ui.status: status, ui.files: None, ui.view: (look(at, preset, now) or [None])[0],
            ui.gallery: gr.Gallery(now.pictures, visible=bool(now.pictures)), ui.series: gr.Column(visible=bool(slices)),
            ui.window: gr.Dropdown([(TEXT["stored"][lang], ""), *presets], value=preset),
            ui.slider: gr.Slider(1, max(len(slices), 2), value=at, visible=len(slices) > 1),
        }  # fmt: skip

    def talk(lang, now):
        lines = {side: [] for side in sides}
        for turn, side in ((turn, side) for turn in now.turns for side in sides):
            said, new = turn["said"].get(side, {"text": "…"}), len(turn["pictures"])
            asked = TEXT["pictures"][lang].format(new) * bool(new) + " " + turn["question"]
            text = said["text"] + (f"\n\n*{TEXT['stats'][lang].format(**said)}*" if "first" in said else "")
            lines[side] += [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": text}]
        return {getattr(ui, side): lines[side] for side in sides}

    def add(paths, lang, now):
        upload = read_upload(paths or [])
        for path in paths or []:
            os.unlink(path)  # it may hold the patient's name
        many = [("", TEXT["many"])] if len(now.pictures + upload.pictures) > MAX_PICTURES else []
        now.pictures, now.upload = (now.pictures + upload.pictures)[:MAX_PICTURES], upload if upload.slices else now.upload
        return show(lang, now, "\n\n".join(TEXT["refused"][lang].format(n, why[lang]) for n, why in upload.refused + many))

    def keep(at, preset, lang, now):
        now.pictures = (now.pictures + look(at, preset, now))[:MAX_PICTURES]
        return show(lang, now, at=at, preset=preset)

    def choose(event: gr.SelectData, lang, now):
        row, now.upload = examples[event.index], None
        now.pictures = [data.to_rgb(row["image"])]
        return show(lang, now) | {ui.reference: row["caption"] if lang == 0 else row["caption_zh"]}

    def ask(text, sampled, longest, at, preset, lang, now):
        for mark in models.processor.tokenizer.get_added_vocab():  # such as the end of a turn, or a picture
            text = text.replace(mark, " ")
        seen = [picture for turn in now.turns for picture in turn["pictures"]]
        new = [picture for picture in now.pictures + look(at, preset, now) if picture not in seen]
        full = "many" if len(seen + new) > MAX_PICTURES else "full" if len(now.turns) >= MAX_TURNS else None
        if problem := full or (None if text.strip() else "empty"):
            yield {ui.status: TEXT[problem][lang]}
            return
        turn = {"id": secrets.token_hex(16), "question": text.strip()[:MAX_CHARACTERS], "pictures": new, "said": {}}
        now.turns, now.stopped, seen = [*now.turns, turn], False, seen + new
        yield {state: now, ui.question: "", ui.status: ""} | talk(lang, now)
        for side in sides:
            if side == "tuned" and models.locate and seen:
                with models.lock:
                    found = models.locate(seen[-1], turn["question"])
                turn["said"][side] = {"text": found["answer"] or TEXT["no_answer"][lang].format(found["reason"])}
                label = TEXT["match"][lang].format(found["match_score"])
                yield {ui.located: gr.Image(draw_box(seen[-1], found["box"]), label=label, visible=True)}
            shown, messages = 0.0, []
            for old in now.turns:
                parts = [{"type": "image"}] * len(old["pictures"]) + [{"type": "text", "text": old["question"]}]
                said = [{"type": "text", "text": old["said"].get(side, {}).get("text") or "…"}]
                messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
            options = {"do_sample": sampled, "max_new_tokens": max(1, min(int(longest), MAX_TOKENS))}
            parts = answer(models, side, messages[:-1], seen, stopped=lambda: now.stopped, **options)
            for turn["said"][side] in parts if getattr(models, side) else ():
                if time.monotonic() - shown > 0.1:
                    shown = time.monotonic()
                    yield talk(lang, now)
            yield talk(lang, now) | {state: now}

    def stop(now):
        now.stopped = True

    def learn(lang, now, number, side, rating, caption):
        turn = now.turns[number]
        pictures = [picture for old in now.turns[: number + 1] for picture in old["pictures"]]
        said = {"caption": caption, "question": turn["question"], "answer": turn["said"][side]["text"]}
        file = save_feedback(feedback, f"{turn['id']}-{side}", pictures, **said, model=side, rating=rating)
        return TEXT["kept"][lang].format(file)

    def vote(event: gr.LikeData, lang, now):
        number, side, up = event.index // 2, event.target.elem_id, event.liked in (True, "Like")
        text = now.turns[number]["said"][side]["text"]
        return learn(lang, now, number, side, "up" if up else "down", text if up else "")

    def correct(text, lang, now):
        if now.turns and text.strip():
            return learn(lang, now, len(now.turns) - 1, sides[-1], "corrected", text.strip()[:MAX_CHARACTERS])
        return TEXT["empty" if now.turns else "first"][lang]

    def translate(lang, at, preset, now):
        told = {part: gr.update(**{prop: TEXT[key][lang] for prop, key in keys.items()}) for part, keys in words.items()}
        return show(lang, now, at=at, preset=preset) | told

    with gr.Blocks(title="medtune chat", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        state = gr.State(visit())
        build(PAGE["layout"])
        where, who = [ui.slider, ui.window], [ui.language, state]
        chats = [getattr(ui, side) for side in sides]
        shown = [state, ui.status, ui.files, ui.view, ui.gallery, ui.series, ui.window, ui.slider, *chats]
        hidden = {"api_visibility": "private"}
        ui.files.upload(add, [ui.files, *who], shown, api_name="upload")
        moved = [ui.slider.input, ui.window.input]
        gr.on(moved, lambda *a: look(*a)[0], [*where, state], ui.view, show_progress="hidden", trigger_mode="always_last", **hidden)
        ui.keep.click(keep, [*where, *who], shown, **hidden)
        ui.shelf.select(choose, who, [*shown, ui.reference], **hidden)
        inputs, outputs = [ui.question, ui.sampled, ui.longest, *where, *who], [state, ui.question, ui.status, ui.located, *chats]
        gr.on([ui.ask.click, ui.question.submit], ask, inputs, outputs, concurrency_limit=1, api_name="ask")
        ui.stop.click(stop, state, queue=False, **hidden)
        ui.clear.click(lambda lang: show(lang, visit()), ui.language, shown, **hidden)
        for chat in chats:
            chat.like(vote, who, ui.status, **hidden)
        ui.save.click(correct, [ui.best, *who], ui.status, **hidden)
        ui.language.input(translate, [ui.language, *where, state], list({*shown, *words}), **hidden)
    return page


def launch(
    models: Models, *, host: str = "127.0.0.1", port: int | None = None, password: str | None = None,
    feedback: str | os.PathLike = "chat_feedback", examples: Sequence[dict] | None = None, block: bool = True,
):  # fmt: skip
    """Serve the page, by default until it is interrupted.

    Parameters
    ----------
    models, feedback, examples : as for `build_page`.
    host, port : where to listen, and by default at the first free port from 7860 on.
    password : asked of every visitor (any user name); another host than this machine needs one of 8 characters or more.
    block : wait; if False return the page, whose `local_url` says where it is and whose `close()` ends it.

    Raises
    ------
    ValueError : another host without a password, or one that is too short.
    """
    import gradio as gr

    if (host not in ("127.0.0.1", "localhost", "::1") or password) and len(password or "") < 8:
        raise ValueError(f"others can reach {host}: set a password of at least 8 characters, or stay on 127.0.0.1")
    page = build_page(models, feedback, examples).queue(max_size=64, default_concurrency_limit=4)

    page.launch(
        server_name=host, server_port=port, auth=password and (lambda user, given: secrets.compare_digest(given.encode(), password.encode())), share=False, quiet=True, ssr_mode=False,
        max_file_size=MAX_MEGABYTES * 10**6, run_history=False, footer_links=[], enable_monitoring=False, inbrowser=False,
        head_paths=Path(__file__).with_suffix(".html"), prevent_thread_lock=True,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )  # fmt: skip
    print(f"medtune chat: {page.local_url}" + " (Ctrl+C stops it)" * block)
    if block:
        page.block_thread()
    return page
