"""The side-by-side page: ask a base and a tuned model about pictures, and keep what people say.

`page` lays the page out and serves it; `models` answers, `uploads` reads what visitors send,
`feedback` keeps what they say, `texts` has the words in English and Chinese, `scratch` is the
folder that goes with the page. All but the page work without it. The page is for one's own machine:
it listens on 127.0.0.1 unless a password and TLS guard it, asks no other server, and deletes an
upload after two or three minutes, and all of them when it ends; what a visitor saves is kept
without metadata.
"""

from .feedback import save_feedback
from .models import ChatModels, Said, answer, find_threshold, load_models, read_threshold
from .page import build_page, launch
from .texts import TEXT
from .uploads import Upload, open_series, read_upload

__all__ = [
    "TEXT",
    "ChatModels",
    "Said",
    "Upload",
    "answer",
    "build_page",
    "find_threshold",
    "launch",
    "load_models",
    "open_series",
    "read_threshold",
    "read_upload",
    "save_feedback",
]
