"""The subcommand that makes preference pairs: prefer."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Column, read_columns
from .printing import print_table


@app.command()
def prefer(
    records: Annotated[
        Path, typer.Argument(help="A converted folder; its captions are the truth.")
    ],
    answers: Annotated[
        list[Path],
        typer.Argument(
            help="Tables of a model's answers to these records, as 'medtune evaluate RECORDS "
            "--split train --out FILE' writes them."
        ),
    ],
    split: Annotated[
        str, typer.Option(help="The split of the records that the answers are about.")
    ] = "train",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="What is wrong with the rejected answer: own, removed, invented, kind or side; may "
            "be repeated. By default all of them.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the sentences that are put in.")] = 0,
    column: Column = None,
) -> None:
    """Make pairs of a better and a worse answer, for training with 'stage: dpo'.

    Both are the model's own words but for what is right in one and wrong in the other. They are
    written to RECORDS/preferences/.
    """
    from medtune.answers import read_predictions
    from medtune.records import read_records
    from medtune.rewards import KINDS, write_preferences

    # a table of others need not have the references: the records are the truth
    truth = read_records(records, split).select_columns(["id", "completion"])
    said = []
    for table in answers:
        said += read_predictions(table, columns=read_columns(column), references=truth)
    counts = write_preferences(records, said, split=split, kinds=kinds or KINDS, seed=seed)
    print_table([{"kind": kind, "pairs": number} for kind, number in counts.items()])
    print(f"{sum(counts.values())} pairs: {records / 'preferences' / f'{split}.jsonl'}")
