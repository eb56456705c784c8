"""The `medtune` command: each subcommand calls one function of the package and prints the result.

`app.py` makes the application, `options.py` the options that several commands share; the
subcommands stand in `running.py` (runs, plans, training, the chat page), `data.py` (sample,
convert, check, audit), `preferring.py` (prefer), `answering.py` and `people.py` (evaluate),
`comparing.py` (compare, curves) and `deploying.py` (export, serve, pacs); `printing.py` prints tables.

What a user can put right (ValueError, OSError, ImportError) is one line on stderr and exit code 1;
with `--debug` before the subcommand it is a traceback. The rooms of the package are imported inside
the subcommands, so that `medtune --help` need not wait for torch.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterator

import typer

# importing the subcommands registers them; their order here is that of --help
from . import answering, comparing, data, deploying, preferring, running  # noqa: F401, I001
from .app import app

__all__ = ["app", "main"]

# How the package's messages name an argument of a function and its value.
ARGUMENT = re.compile(r"\b([a-z][a-z_]*)=(True\b|[^\s,;()]+)")
# The argument `columns` names a pair of columns, which the option takes as OURS=THEIRS.
COLUMNS = re.compile(r"\bcolumns=\{'(\w+)': '([^']*)'\}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; always leaves by SystemExit.

    Parameters
    ----------
    arguments : what follows `medtune` on the command line; by default, those of this process.

    Examples
    --------
    >>> try:
    ...     main(["run", "no/such/run"])
    ... except SystemExit as end:
    ...     end.code
    1
    """
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        with _warnings_on_stderr():
            app(arguments)
    except (ValueError, OSError, ImportError) as error:
        if arguments[:1] == ["--debug"]:
            raise
        # what was found comes before what is wrong with it, and is not lost if a library ends the process
        sys.stdout.flush()
        message = name_options(_in_one_line(error), _options_of(arguments))
        print(f"medtune: {message}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Show what the package warns of, such as files that it leaves out, in the command's own form."""
    logger = logging.getLogger("medtune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("medtune: warning: %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _in_one_line(error: Exception) -> str:
    """Return an error's message; that of an OSError without its number, but with its file."""
    if isinstance(error, OSError) and error.filename:
        message = f"{error.strerror}: {error.filename}"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


def _options_of(arguments: list[str]) -> dict[str, str]:
    """Give the options of the subcommand that was called, by the name of their argument."""
    commands = typer.main.get_command(app).commands
    called = [word for word in arguments if word in commands]
    if not called:
        return {}
    options = {}
    for parameter in commands[called[0]].params:
        if parameter.param_type_name == "option":
            options[parameter.name] = max(parameter.opts, key=len)
    # functions call by another name what these options take
    for argument, option in (("base_url", "url"), ("questions", "question")):
        if option in options:
            options[argument] = options[option]
    return options


def name_options(message: str, options: dict[str, str]) -> str:
    """Say of a message that names arguments, as functions have them, which options these are.

    Parameters
    ----------
    message : one line that may name arguments as `name=value`.
    options : option of each argument that the command has; others stay as they are.

    Examples
    --------
    >>> options = {"image_root": "--image-root", "column": "--column", "strict": "--strict"}
    >>> name_options("give image_root=FOLDER or columns={'caption': 'NAME'}", options)
    'give --image-root FOLDER or --column caption=NAME'
    >>> name_options("set strict=True or streaming=True", options)
    'set --strict or streaming=True'
    """

    def option(found: re.Match) -> str:
        name, value = found.groups()
        if name not in options:
            return found[0]
        return options[name] if value == "True" else f"{options[name]} {value}"

    if "column" in options:
        message = COLUMNS.sub(r"--column \1=\2", message)
    # what stands there now as an option's value is not an argument
    parts = re.split(r"(--column \S+)", message)
    parts[::2] = [ARGUMENT.sub(option, part) for part in parts[::2]]
    return "".join(parts)
