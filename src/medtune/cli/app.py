"""The typer application, and what its own options do."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, not only its message.")
    ] = False,
) -> None:
    """Fine-tune multimodal language models on medical images, and check what they learned."""
    # main looks for --debug itself; here it is declared, so that --help shows it
