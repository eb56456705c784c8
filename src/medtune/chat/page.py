"""The page itself, in the order in which a visitor sees it, and what each of its buttons does."""

import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from medtune.boxes import draw_box, magnify_box
from medtune.deploy import check_reach
from medtune.pairs import load_pairs, to_rgb

from .feedback import save_feedback
from .models import ChatModels, Said, answer, confidence
from .scratch import close_scratch, open_scratch
from .texts import TEXT
from .uploads import MAX_PICTURES, MAX_SIZE, Upload, open_series, read_upload

#: Questions of one conversation.
MAX_TURNS = 10
#: Characters of a question or a caption.
MAX_CHARACTERS = 2000
# Goes into the page's head: its style, and a rule for the browser to ask no other server.
HEAD = Path(__file__).with_name("head.html")


@dataclass
class Turn:
    """A question of a visitor, and what the models said."""

    #: A random key: feedback is filed under it.
    id: str
    question: str
    #: Pictures that came with this question.
    pictures: list
    #: "base" and "tuned" -> the answer.
    said: dict[str, Said] = field(default_factory=dict)
    #: The tuned model's confidence, where it is below the threshold; NaN where it names nothing.
    too_low: float | None = None

    def parts(self) -> list[dict]:
        """The question as content parts of a message."""
        images = [{"type": "image"} for _ in self.pictures]
        return [*images, {"type": "text", "text": self.question}]


@dataclass
class Visit:
    """What one visitor has on the page."""

    #: Pictures for the next question.
    pictures: list = field(default_factory=list)
    #: An earlier picture, which a question shows first; at most one.
    earlier: list = field(default_factory=list)
    #: The last upload that held a series.
    upload: Upload = field(default_factory=Upload)
    turns: list[Turn] = field(default_factory=list)
    #: The visitor has asked to stop.
    stopped: bool = False

    def shown_pictures(self) -> list:
        """All pictures that the conversation has shown so far."""
        return [picture for turn in self.turns for picture in turn.pictures]


class Page:
    """The components of the page, and the functions that its events call.

    A function's result is a mapping of components to what they show next. `language` is 0 for
    English and 1 for Chinese; `at` and `window` are the slice and the window that a visitor chose,
    `slices` and `apart` how many slices around it are asked about, and how many mm lie between them.
    """

    def __init__(
        self,
        models: ChatModels,
        feedback: str | os.PathLike,
        examples: Sequence[dict],
        scratch: Path,
        series: Upload | None = None,
    ):
        self.models = models
        self.feedback = feedback
        self.examples = examples
        self.scratch = scratch
        self.series_of_page = series
        self.sides = ["base"]
        if models.tuned or models.locate:
            self.sides.append("tuned")
        # component -> {its property: key in TEXT}; `translate` goes through it
        self.words: dict[Any, dict[str, str]] = {}

    def say(self, component: Any, **texts: str) -> Any:
        """Set texts of a component in English, and note their keys for other languages.

        The component must be made with the English text already; this only notes.
        """
        self.words[component] = texts
        return component

    # --- the page, from top to bottom -------------------------------------------------------------

    def lay_out(self) -> None:
        """Make the components, within an open `gradio.Blocks`."""
        self.visit = gr.State(Visit())
        self.language = gr.Radio(
            [("English", 0), ("中文", 1)], value=0, show_label=False, container=False
        )
        self.notice = self.say(gr.Markdown(_english("notice"), elem_id="notice"), value="notice")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self.lay_out_pictures()
                self.lay_out_examples()
                self.lay_out_settings()
            with gr.Column(scale=5, min_width=300):
                self.lay_out_question()
                self.lay_out_answers()
                self.lay_out_correction()

    def lay_out_pictures(self) -> None:
        self.files = gr.File(
            label=_english("files"), file_count="multiple", height=140, elem_id="files"
        )
        self.say(self.files, label="files")
        self.status = gr.Markdown(elem_id="status")
        self.gallery = gr.Gallery(
            label=_english("asked"),
            columns=4,
            height=170,
            object_fit="contain",
            interactive=False,
            visible=False,
            format="png",
            buttons=[],
            elem_id="gallery",
        )
        self.say(self.gallery, label="asked")
        # earlier and now stand beside each other
        with gr.Row():
            self.before = gr.Image(
                label=_english("earlier"),
                visible=False,
                interactive=False,
                height=340,
                min_width=120,
                format="png",
                buttons=[],
                elem_id="before",
            )
            self.say(self.before, label="earlier")
            self.view = gr.Image(
                label=_english("series"),
                visible=False,
                interactive=False,
                height=340,
                min_width=120,
                format="png",
                elem_id="view",
                buttons=["fullscreen"],
            )
            self.say(self.view, label="series")
        with gr.Column(visible=False, elem_id="series") as self.series:
            self.window = gr.Dropdown(
                [("", "")], label=_english("window"), value="", elem_id="window"
            )
            self.say(self.window, label="window")
            with gr.Column(visible=False) as self.several:
                self.slider = gr.Slider(1, 1000, label=_english("slice"), step=1, elem_id="slice")
                self.say(self.slider, label="slice")
                self.slab = gr.Slider(
                    1, MAX_PICTURES, value=1, label=_english("slab"), step=1, elem_id="slab"
                )
                self.say(self.slab, label="slab")
                self.apart = gr.Number(
                    None, label=_english("apart"), minimum=0, elem_id="apart", min_width=80
                )
                self.say(self.apart, label="apart")
                self.around = gr.Gallery(
                    label=_english("around"),
                    columns=4,
                    height=170,
                    object_fit="contain",
                    interactive=False,
                    visible=False,
                    format="png",
                    buttons=[],
                    elem_id="around",
                )
                self.say(self.around, label="around")
                self.keep_button = self.say(gr.Button(_english("keep"), size="sm"), value="keep")
        self.earlier = gr.File(
            label=_english("earlier_file"), file_count="multiple", height=140, elem_id="earlier"
        )
        self.say(self.earlier, label="earlier_file")

    def lay_out_examples(self) -> None:
        with gr.Accordion(_english("examples")) as accordion:
            self.say(accordion, label="examples")
            self.shelf = gr.Gallery(
                [row["image"] for row in self.examples],
                columns=3,
                height=230,
                object_fit="cover",
                allow_preview=False,
                show_label=False,
                buttons=[],
                visible=bool(self.examples),
                elem_id="shelf",
            )
            self.reference = gr.Textbox(
                label=_english("reference"), interactive=False, elem_id="reference"
            )
            self.say(self.reference, label="reference")
            no_examples = gr.Markdown(_english("no_examples"), visible=not self.examples)
            self.say(no_examples, value="no_examples")

    def lay_out_settings(self) -> None:
        with gr.Accordion(_english("settings"), open=False) as accordion:
            self.say(accordion, label="settings")
            self.sampled = gr.Checkbox(False, label=_english("sample"))
            self.say(self.sampled, label="sample")
            self.longest = gr.Slider(16, 512, value=160, step=16, label=_english("length"))
            self.say(self.longest, label="length")

    def lay_out_question(self) -> None:
        self.question = gr.Textbox(
            _english("describe"),
            label=_english("question"),
            lines=2,
            max_length=MAX_CHARACTERS,
            elem_id="question",
        )
        self.say(self.question, value="describe", label="question")
        with gr.Row():
            self.ask_button = gr.Button(_english("ask"), variant="primary", min_width=80)
            self.stop_button = gr.Button(_english("stop"), min_width=80)
            self.clear_button = gr.Button(_english("clear"), min_width=80)
        self.say(self.ask_button, value="ask")
        self.say(self.stop_button, value="stop")
        self.say(self.clear_button, value="clear")

    def lay_out_answers(self) -> None:
        with gr.Row():
            look = {"height": 430, "min_width": 290, "buttons": ["copy"]}
            self.base = gr.Chatbot(label=_english("base"), elem_id="base", **look)
            self.tuned = gr.Chatbot(
                label=_english("tuned"), elem_id="tuned", visible="tuned" in self.sides, **look
            )
        self.say(self.base, label="base")
        self.say(self.tuned, label="tuned")
        self.located = gr.Image(
            label=_english("located"),
            visible=False,
            interactive=False,
            height=300,
            format="png",
            elem_id="located",
            buttons=[],
        )
        self.say(self.located, label="located")

    def lay_out_correction(self) -> None:
        with gr.Accordion(_english("correct"), open=False) as accordion:
            self.say(accordion, label="correct")
            self.best = gr.Textbox(
                label=_english("best"), lines=3, max_length=MAX_CHARACTERS, elem_id="best"
            )
            self.say(self.best, label="best")
            self.save_button = self.say(gr.Button(_english("save")), value="save")

    def who(self) -> list:
        """The components that say who asks."""
        return [self.language, self.visit]

    def shown(self) -> list:
        """The components that `show` fills."""
        shown = [self.visit, self.status, self.files, self.view, self.gallery, self.series]
        shown += [self.several, self.window, self.slider, self.earlier, self.before]
        return [*shown, self.slab, self.apart, self.around, self.base, self.tuned]

    # --- which event calls which function ---------------------------------------------------------

    def connect(self) -> None:
        """Connect the components to the functions below."""
        who = self.who()
        where = [self.slider, self.window]
        around = [self.slab, self.apart]
        chats = [self.base, self.tuned]
        shown = self.shown()
        private = {"api_visibility": "private"}
        # one word of feedback after the other, for they go to one file
        saving = {**private, "concurrency_limit": 1, "concurrency_id": "feedback"}

        self.files.upload(self.add, [self.files, *who], shown, api_name="upload")
        gr.on(
            [self.slider.input, self.window.input, self.slab.input, self.apart.input],
            self.turn_to,
            [*where, *around, *who],
            [self.view, self.around, self.status],
            show_progress="hidden",
            trigger_mode="always_last",
            **private,
        )
        self.keep_button.click(self.keep, [*where, *around, *who], shown, **private)
        self.earlier.upload(
            self.add_earlier,
            [self.earlier, self.question, *where, *around, *who],
            [*shown, self.question],
            api_name="earlier",
        )
        self.shelf.select(self.choose, who, [*shown, self.reference], **private)
        gr.on(
            [self.ask_button.click, self.question.submit],
            self.ask,
            # what came last stands last: programs that ask by these places go on
            [self.question, self.sampled, self.longest, *where, *who, *around],
            [self.visit, self.question, self.status, self.located, *chats],
            concurrency_limit=1,
            api_name="ask",
        )
        self.stop_button.click(self.stop, [self.visit], [], queue=False, **private)
        self.clear_button.click(self.clear, [self.language], [*shown, self.located], **private)
        gr.on([self.base.like, self.tuned.like], self.vote, who, [self.status], **saving)
        self.save_button.click(self.correct, [self.best, *who], [self.status], **saving)
        self.language.input(self.translate, [*where, *who], list(self.words), **private)

    # --- what the functions show ------------------------------------------------------------------

    def look(self, at: float, window: str, visit: Visit):
        """The slice that the slider points at; None where there is no series."""
        if not visit.upload.count:
            return None
        return visit.upload.picture(int(at) - 1, window)

    def look_around(
        self, at: float, window: str, slices: float, apart: float | None, visit: Visit
    ) -> tuple[list, ValueError | None]:
        """The slices that are asked about, none where there is no series; and why there are none."""
        if not visit.upload.count:
            return [], None
        if slices <= 1:
            return [self.look(at, window, visit)], None
        try:
            return visit.upload.slab(int(at) - 1, int(slices), apart, window), None
        except ValueError as error:
            return [], error

    def turn_to(  # noqa: PLR0913 - gradio passes each component's value as an argument
        self,
        at: float,
        window: str,
        slices: float,
        apart: float | None,
        language: int,
        visit: Visit,
    ) -> dict:
        """Show another slice, and those around it."""
        around, why_none = self.look_around(at, window, slices, apart, visit)
        status = self.about_series(language, visit)
        if why_none:
            status = TEXT["no_slab"][language].format(why_none)
        return {
            self.view: self.look(at, window, visit),
            self.around: gr.Gallery(around, visible=len(around) > 1),
            self.status: status,
        }

    def about_series(self, language: int, visit: Visit) -> str:
        """How far apart the slices are, or why nobody knows."""
        upload = visit.upload
        if upload.spacing is not None:
            return TEXT["spacing"][language].format(upload.count, upload.spacing)
        if upload.no_spacing:
            return TEXT["no_spacing"][language].format(upload.no_spacing)
        return ""

    def conversation(self, side: str, language: int, visit: Visit) -> list[dict]:
        """The messages of one side, as its Chatbot takes them."""
        lines = []
        for turn in visit.turns:
            asked = turn.question
            if turn.pictures:
                asked = TEXT["pictures"][language].format(len(turn.pictures)) + " " + asked
            said = turn.said.get(side, Said("…"))
            text = said.text
            if said.tokens is not None:
                stats = TEXT["stats"][language].format(
                    tokens=said.tokens, seconds=said.seconds, first=said.first
                )
                text += f"\n\n*{stats}*"
            if side == "tuned" and turn.too_low is not None:
                text = f"**{self.refusal(turn.too_low, language)}**\n\n{text}"
            lines.append({"role": "user", "content": asked.strip()})
            lines.append({"role": "assistant", "content": text})
        return lines

    def refusal(self, confidence_found: float, language: int) -> str:
        """What is said of an answer that is less sure than the threshold."""
        if math.isnan(confidence_found):
            return TEXT["names_nothing"][language]
        return TEXT["unsure"][language].format(confidence_found, self.models.least)

    def talk(self, language: int, visit: Visit) -> dict:
        """Both conversations."""
        return {
            getattr(self, side): self.conversation(side, language, visit) for side in self.sides
        }

    def windows(self, language: int, visit: Visit, chosen: str):
        """The windows to choose from, in words of the language."""
        choices = [(TEXT["stored"][language], "")]
        for key, (centre, width) in visit.upload.windows.items():
            choices.append((f"{TEXT[key][language]} {centre}/{width}", key))
        return gr.Dropdown(choices, value=chosen, label=TEXT["window"][language])

    def show(  # noqa: PLR0913 - gradio passes each component's value as an argument
        self,
        language: int,
        visit: Visit,
        status: str = "",
        at: float = 1,
        window: str = "",
        around: Sequence = (),
    ) -> dict:
        """All that follows from what a visitor has."""
        slices = visit.upload.count
        earlier = visit.earlier[0] if visit.earlier else None
        # what is not shown is not asked about: of another series, one slice
        is_slab = len(around) > 1
        return self.talk(language, visit) | {
            self.visit: visit,
            self.status: status,
            self.files: None,
            self.view: gr.Image(self.look(at, window, visit), visible=slices > 0),
            self.series: gr.Column(visible=slices > 0),
            self.several: gr.Column(visible=slices > 1),
            self.slider: gr.Slider(1, max(slices, 2), value=at),
            self.window: self.windows(language, visit, window),
            self.gallery: gr.Gallery(visit.pictures, visible=bool(visit.pictures)),
            self.earlier: None,
            self.before: gr.Image(earlier, visible=earlier is not None),
            self.slab: gr.update() if is_slab else 1,
            self.apart: gr.update() if is_slab else None,
            self.around: gr.Gallery(list(around), visible=is_slab),
        }

    def begin(self, language: int, visit: Visit) -> dict:
        """Show the series that the page was opened with, if it was with one."""
        if self.series_of_page:
            visit.upload = self.series_of_page
        return self.show(language, visit, self.about_series(language, visit))

    # --- what a visitor does ----------------------------------------------------------------------

    def add(self, paths: list[str] | None, language: int, visit: Visit) -> dict:
        """Take uploaded files, and say which were refused."""
        upload = read_upload(paths or [], MAX_PICTURES - len(visit.pictures), scratch=self.scratch)
        visit.pictures = visit.pictures + upload.pictures
        lines = self.refused(upload, language)
        if upload.count:
            visit.upload = upload
            lines.append(self.about_series(language, visit))
        return self.show(language, visit, "\n\n".join(line for line in lines if line))

    def refused(self, upload: Upload, language: int) -> list[str]:
        """Say which files were refused, and why."""
        words = TEXT["refused"][language]
        return [words.format(name, reasons[language]) for name, reasons in upload.refused]

    def add_earlier(  # noqa: PLR0913 - gradio passes each component's value as an argument
        self,
        paths: list[str] | None,
        question: str,
        at: float,
        window: str,
        slices: float,
        apart: float | None,
        language: int,
        visit: Visit,
    ) -> dict:
        """Take an earlier picture, of a series the middle slice, to stand beside the new one."""
        upload = read_upload(paths or [], 1, scratch=self.scratch)
        if upload.pictures:
            visit.earlier = upload.pictures
        elif upload.count:
            # shown in the window of the new one, so that they can be compared
            known = window if window in upload.windows else ""
            visit.earlier = [upload.picture(upload.count // 2, known)]
        if visit.earlier and question.strip() in ("", *TEXT["describe"]):
            question = TEXT["compare"][language]
        around, _ = self.look_around(at, window, slices, apart, visit)
        status = "\n\n".join(self.refused(upload, language))
        shown = self.show(language, visit, status, at, window, around)
        return shown | {self.question: question}

    def keep(  # noqa: PLR0913 - gradio passes each component's value as an argument
        self,
        at: float,
        window: str,
        slices: float,
        apart: float | None,
        language: int,
        visit: Visit,
    ) -> dict:
        """Put the shown slices among the pictures of the next question."""
        around, why_none = self.look_around(at, window, slices, apart, visit)
        status = TEXT["no_slab"][language].format(why_none) if why_none else ""
        visit.pictures = [*visit.pictures, *around][:MAX_PICTURES]
        return self.show(language, visit, status, at, window, around)

    def choose(self, event: gr.SelectData, language: int, visit: Visit) -> dict:
        """Take an example in place of what is there."""
        row = self.examples[event.index]
        visit.upload = Upload()
        visit.pictures = [to_rgb(row["image"])]
        # a model that locates regions is not shown where they are
        if row.get("magnified") and not self.models.locate:
            visit.pictures.append(to_rgb(row["magnified"]))
        caption = row["caption_zh"] if language else row["caption"]
        return self.show(language, visit) | {self.reference: caption}

    def clear(self, language: int) -> dict:
        """Start anew."""
        return self.begin(language, Visit()) | {self.located: gr.Image(None, visible=False)}

    def stop(self, visit: Visit) -> None:
        """End the answer that is being written."""
        visit.stopped = True

    def ask(  # noqa: PLR0913 - gradio passes each component's value as an argument
        self,
        text: str,
        sampled: bool,
        longest: float,
        at: float,
        window: str,
        language: int,
        visit: Visit,
        slices: float = 1,
        apart: float | None = None,
    ) -> Iterator[dict]:
        """Ask both models, one after the other, and show the answers as they grow."""
        question = self.without_marks(text).strip()[:MAX_CHARACTERS]
        around, why_none = self.look_around(at, window, slices, apart, visit)
        if why_none:
            yield {self.status: TEXT["no_slab"][language].format(why_none)}
            return
        new = self.new_pictures(visit, around)
        pictures = visit.shown_pictures() + new
        if len(visit.turns) >= MAX_TURNS or len(pictures) > MAX_PICTURES:
            yield {self.status: TEXT["full"][language]}
            return
        if not pictures or not question:
            yield {self.status: TEXT["empty"][language]}
            return
        turn = Turn(secrets.token_hex(16), question, new)
        visit.turns = [*visit.turns, turn]
        visit.stopped = False
        yield {self.visit: visit, self.question: "", self.status: ""} | self.talk(language, visit)
        for side in self.sides:
            if side == "tuned" and self.models.locate:
                yield self.locate(turn, pictures[-1], language)
            if getattr(self.models, side):
                stream = answer(
                    self.models,
                    side,
                    self.messages(side, visit),
                    pictures,
                    max_new_tokens=int(longest),
                    do_sample=sampled,
                    stopped=lambda: visit.stopped,
                )
                for said in stream:
                    turn.said[side] = said
                    # the first token at once, then every other step is enough
                    if said.tokens % 4 < 2:
                        yield self.talk(language, visit)
                if side == "tuned":
                    self.doubt(turn, visit, pictures)
            yield self.talk(language, visit) | {self.visit: visit}

    def doubt(self, turn: Turn, visit: Visit, pictures: list) -> None:
        """Note of a finished answer whether the model was less sure than it should be."""
        said = turn.said.get("tuned")
        if self.models.least is None or visit.stopped or not said or not said.text:
            return
        found = confidence(self.models, self.messages("tuned", visit), pictures, said.text)
        # NaN is not below anything: an answer that names nothing is not given either
        if not found >= self.models.least:
            turn.too_low = found

    def without_marks(self, text: str) -> str:
        """A question without tokens of the chat template, such as the end of a turn."""
        if self.models.processor is None:
            return text  # the server has the template, and refuses them
        for mark in self.models.processor.tokenizer.get_added_vocab():
            text = text.replace(mark, " ")
        return text

    def new_pictures(self, visit: Visit, slices: list) -> list:
        """The pictures of a question, each once, the earlier first, without those shown before."""
        known = visit.shown_pictures()
        new = []
        for picture in [*visit.earlier, *visit.pictures, *slices]:
            if picture not in known + new:
                new.append(picture)
        return new

    def messages(self, side: str, visit: Visit) -> list[dict]:
        """The conversation of one side, ending with the new question."""
        messages = []
        for turn in visit.turns:
            said = turn.said.get(side)
            text = said.text if said and said.text else "…"
            reply = [{"type": "text", "text": text}]
            messages.append({"role": "user", "content": turn.parts()})
            messages.append({"role": "assistant", "content": reply})
        return messages[:-1]

    def locate(self, turn: Turn, picture, language: int) -> dict:
        """Let the multi-task model locate, verify and answer; show its box and match score."""
        found = self.models.worker.submit(self.models.locate, picture, turn.question).result()
        text = found["answer"] or TEXT["no_answer"][language].format(found["reason"])
        turn.said["tuned"] = Said(text)
        label = TEXT["match"][language].format(found["match_score"])
        image = draw_box(picture, found["box"])
        return {self.located: gr.Image(image, label=label, visible=True)}

    def learn(  # noqa: PLR0913 - all of it is one row of feedback
        self, language: int, visit: Visit, number: int, side: str, rating: str, caption: str
    ) -> str:
        """Save a word on an answer as training data, and say where."""
        turn = visit.turns[number]
        pictures = [picture for old in visit.turns[: number + 1] for picture in old.pictures]
        file = save_feedback(
            self.feedback,
            turn.id + side,
            pictures,
            caption=caption,
            question=turn.question,
            answer=turn.said[side].text,
            model=side,
            rating=rating,
        )
        # not the whole path: a visitor from elsewhere need not know the folders of this machine
        return TEXT["kept"][language].format(f"{file.parent.name}/{file.name}")

    def vote(self, event: gr.LikeData, language: int, visit: Visit) -> str:
        """Save a thumb up with the answer, or a thumb down without a caption."""
        number = event.index // 2  # each turn is a question and an answer
        side = event.target.elem_id
        if event.liked in (True, "Like"):
            liked = visit.turns[number].said[side].text
            return self.learn(language, visit, number, side, "up", liked)
        return self.learn(language, visit, number, side, "down", "")

    def correct(self, text: str, language: int, visit: Visit) -> str:
        """Save a better caption for the pictures of the last question."""
        caption = text.strip()[:MAX_CHARACTERS]
        if not visit.turns or not caption:
            return TEXT["first"][language]
        last = len(visit.turns) - 1
        return self.learn(language, visit, last, self.sides[-1], "corrected", caption)

    def translate(self, at: float, window: str, language: int, visit: Visit) -> dict:
        """Say everything in the other language."""
        told = {}
        for component, keys in self.words.items():
            texts = {name: TEXT[key][language] for name, key in keys.items()}
            told[component] = gr.update(**texts)
        return told | {self.window: self.windows(language, visit, window)}


def _english(key: str) -> str:
    return TEXT[key][0]


class _ChatPage(gr.Blocks):
    """A page that deletes what visitors sent when it ends."""

    def close(self, verbose: bool = True) -> None:
        """End the page: stop serving, and delete what is left of uploads."""
        super().close(verbose)
        self.forget()

    def block_thread(self) -> None:
        """Wait until Ctrl-C or `close`, and end the page."""
        try:
            super().block_thread()
        finally:
            self.close(verbose=False)

    def forget(self) -> None:
        """Leave the private folder, once: with the last page of a process it goes."""
        if not getattr(self, "has_left", False):
            self.has_left = True
            close_scratch()


def build_page(
    models: ChatModels,
    feedback: str | os.PathLike = "chat_feedback",
    examples: Sequence[dict] | None = None,
    series: str | os.PathLike | None = None,
) -> gr.Blocks:
    """Make the page; `launch` also serves it.

    Parameters
    ----------
    models : as `load_models` gives them; without a tuned or multi-task model only the base answers.
    feedback : the folder for `save_feedback`.
    examples : rows with image, caption and caption_zh, and perhaps a second picture `magnified`.
        Default: six structures of the sample set,
        if it is built.
    series : a folder of DICOM slices, or a NIfTI file, that every visitor finds open.

    Raises
    ------
    ValueError, OSError : there is no such series: one line.
    """
    if examples is None:
        examples = _sample_examples()
    # before any component is made: each asks then where it may keep files
    scratch = open_scratch()
    try:
        opened = None if series is None else open_series(series, scratch=scratch)
    except BaseException:
        close_scratch()
        raise
    page = Page(models, feedback, examples, scratch, opened)
    # gradio's copies of what visitors sent and saw may hold a patient's name: each minute those
    # older than two minutes are deleted
    with _ChatPage(title="medtune chat", analytics_enabled=False, delete_cache=(60, 120)) as blocks:
        page.lay_out()
        page.connect()
        if opened:
            blocks.load(page.begin, page.who(), page.shown(), api_visibility="private")
    return blocks


def _sample_examples() -> list[dict]:
    """One row each of six structures of the sample set; none where it is not built."""
    with contextlib.suppress(OSError):
        rows = load_pairs("sample", split="test", limit=200)
        examples = list({row["structure"]: row for row in rows}.values())[:6]
        # the course's models are trained with the region shown once more
        return [row | {"magnified": magnify_box(row["image"], row["roi"])} for row in examples]
    return []


def launch(  # noqa: PLR0913 - each is a setting that a caller names
    models: ChatModels,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    password: str | None = None,
    tls_cert: str | os.PathLike | None = None,
    tls_key: str | os.PathLike | None = None,
    **options: Any,
) -> gr.Blocks:
    """Serve the page in the background.

    Uploads lie in a private folder, which goes when the page ends: by `close()`, with the process,
    by a signal, or, after `kill -9`, when the next page starts.

    Parameters
    ----------
    models, **options : as for `build_page`.
    host : address to listen on. Another than one of this machine alone needs a password and TLS.
    port : where to listen; by default the first free port from 7860 on.
    password : asked of every visitor (any user name), 8 characters or more.
    tls_cert, tls_key : PEM files of a certificate (with its chain) and of its private key, without
        a passphrase: the page is then served as https.

    Returns
    -------
    gradio.Blocks : the page: its `local_url` says where, `block_thread()` waits, `close()` ends it.

    Raises
    ------
    ValueError : another host without a password or TLS, a password that is too short, or a
        certificate and a key that do not belong together.
    OSError : a file of these is missing, or the port is taken.
    """
    check_reach(host, password, tls_cert, tls_key)

    def is_right(_: str, given: str) -> bool:
        # takes the same time wherever the first difference lies
        return secrets.compare_digest(given.encode(), password.encode())

    page = build_page(models, **options)
    page.queue(max_size=64, default_concurrency_limit=4)
    try:
        page.launch(
            auth=is_right if password else None,
            server_name=host,
            server_port=port,
            ssl_certfile=os.fspath(tls_cert) if tls_cert else None,
            ssl_keyfile=os.fspath(tls_key) if tls_key else None,
            # gradio calls its own page once at the start: a hospital's own authority, or a name
            # that is not this address, must not stop it. Visitors' browsers check as always
            ssl_verify=False,
            max_file_size=MAX_SIZE,
            head_paths=HEAD,
            inline=False,
            prevent_thread_lock=True,
            quiet=True,
            # nothing that leaves this machine, nothing that stays on it
            share=False,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            footer_links=[],
        )
    except BaseException:
        page.close(verbose=False)
        raise
    print(f"medtune chat: {page.local_url} (Ctrl+C stops it)", flush=True)
    return page
