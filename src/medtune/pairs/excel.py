"""Read the tables of an Excel file; needs openpyxl."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medtune.files import one_line

from .columns import check_heading, split_of_word

EXCEL_SUFFIXES = {".xlsx", ".xlsm"}


def read_excel(table: Path, columns: dict[str, str]) -> Iterator[tuple[int | str, dict]]:
    """Yield (number of the row, record) of an Excel file; of several sheets the split is told too.

    Parameters
    ----------
    table : Path
        A file with one sheet that holds anything, or with sheets that are called after splits.
    columns : dict of str to str
        Our name -> the table's name, as the caller said.

    Yields
    ------
    tuple of int or str, and dict
        Column -> cell. Rows without any cell are left out.

    Raises
    ------
    ValueError
        openpyxl is not installed, the file is no Excel file, or it is not clear which sheet is
        meant.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(
            f"{table.name} is an Excel file: pip install openpyxl to read it, or save it as CSV"
        ) from None
    try:
        # data_only: what a formula gave, not the formula
        book = openpyxl.load_workbook(table, read_only=True, data_only=True)
    except Exception as error:  # a zip, XML or key error, as the damage has it
        raise ValueError(f"{table.name} is no Excel file ({one_line(error, 100)})") from None
    try:
        for sheet, split in _sheets_with_pairs(book, table):
            yield from _rows_of(sheet, split, table, columns)
    finally:
        book.close()


def _sheets_with_pairs(book: Any, table: Path) -> list[tuple[Any, str | None]]:
    filled = []
    for sheet in book.worksheets:
        if any(any(cell is not None for cell in row) for row in sheet.iter_rows(values_only=True)):
            filled.append(sheet)
    of_splits = [(sheet, split_of_word(sheet.title)) for sheet in filled]
    if filled and all(split for _, split in of_splits):
        return of_splits
    if len(filled) > 1:
        raise ValueError(
            f"{table.name} has {len(filled)} sheets with data: keep one, or save it as CSV"
        )
    return [(sheet, None) for sheet in filled]


def _rows_of(
    sheet: Any, split: str | None, table: Path, columns: dict[str, str]
) -> Iterator[tuple[int | str, dict]]:
    heading: list[str] = []
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        if all(cell is None for cell in cells):
            continue
        if not heading:
            heading = ["" if cell is None else str(cell) for cell in cells]
            check_heading(heading, table.name, columns)
            continue
        record = dict(zip(heading, map(_plain, cells), strict=False))
        if split:
            record.setdefault("split", split)
        # beside others a sheet is named too
        yield f"{number} of {split}" if split else number, record


def _plain(cell: Any) -> Any:
    """Give a date as text: no other kind of table has dates."""
    return cell if cell is None or isinstance(cell, str | int | float) else str(cell)
