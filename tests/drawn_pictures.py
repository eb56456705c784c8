"""Pairs in the form of MedTrinity: picture, id and caption, with a green box in the picture."""

from pathlib import Path

import datasets

from medtune.pairs import load_pairs


def drawn_rows(sample_path: Path, every: int) -> datasets.Dataset:
    """Every so many of the sample's pairs with a drawn box, with all that is known of them."""
    pairs = load_pairs(sample_path)
    drawn = [number for number, has_box in enumerate(pairs["has_box"]) if has_box]
    return pairs.select(drawn[::every])


def write_drawn_pairs(rows: datasets.Dataset, file: Path) -> Path:
    """Write picture, id and caption of rows to a parquet file, and nothing else that is known."""
    rows.select_columns(["image", "id", "caption"]).to_parquet(file)
    return file
