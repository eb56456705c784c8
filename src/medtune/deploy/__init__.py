"""Out of the notebook: a tuned model as a file that needs no Python library, proven and served.

`convert` writes the two GGUF files of llama.cpp with what they do not say themselves, `exported`
reads such a folder, `pictures` prepares a picture as the model's own processor does, `engine` runs
llama.cpp in a process of its own (`engine_process`), `check` compares an export with Transformers,
`serve` answers over HTTP as OpenAI's API does, by an engine or by `transformers_engine`,
`requests` reads what clients send, and `reach` keeps strangers out.

`archive` finds, fetches and stores in a PACS, `reading` has a served model answer a series of it,
and `reports` writes what was said as a DICOM structured report and for FHIR.

To serve a file needs neither torch nor Transformers: what does is loaded when it is asked for.
"""

import importlib
from typing import Any

from .engine import Engine
from .exported import Exported, read_export
from .pictures import Preparation
from .reach import check_reach
from .requests import Limits
from .serve import Served, serve

# These load torch and Transformers (seconds, and hundreds of megabytes) or an extra.
_LOADED_WHEN_ASKED_FOR = {
    "Archive": "archive",
    "Gate": "reading",
    "answer_series": "reading",
    "card_id": "reading",
    "check_export": "check",
    "diagnostic_report": "reports",
    "export_gguf": "convert",
    "fetch_series": "reading",
    "structured_report": "reports",
}

__all__ = [
    "Archive",
    "Engine",
    "Exported",
    "Gate",
    "Limits",
    "Preparation",
    "Served",
    "answer_series",
    "card_id",
    "check_export",
    "check_reach",
    "diagnostic_report",
    "export_gguf",
    "fetch_series",
    "read_export",
    "serve",
    "structured_report",
]


def __getattr__(name: str) -> Any:
    """Load what the module does not have yet, as Python asks of it."""
    if name not in _LOADED_WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LOADED_WHEN_ASKED_FOR[name]}", __name__)
    return getattr(module, name)
