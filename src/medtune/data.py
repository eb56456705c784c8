"""Load image-text pairs from whatever holds them, and judge a single pair.

A *pair* is a row with `image`, `id` and `caption`, plus whatever else the source knows (`group`, `split`, `roi`, ...).
A picture stays the bytes or the file that the source holds and is decoded when you read `row["image"]`; see the bytes
themselves with `dataset.cast_column("image", datasets.Image(decode=False))`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    from PIL import Image

ALIASES = {  # our name -> the names that published sets give the same thing, best first
    "image": ("image_path", "file_name", "filename", "path", "images"),
    "id": ("image_id", "uid"),
    "caption": ("text", "report", "findings", "description"),
}
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
TABLES = {".csv", ".tsv", ".json", ".jsonl"}
DICOM = {".dcm", ".dicom", ".ima"}
NO_TABLES = {"dataset_info.json", "rejected.jsonl", "convert.json", "check.json", "summary.json"}
TURNS = {"messages", "conversations", "prompt", "completion", "instruction", "output", "history", "system"}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


def load_pairs(
    source: str | os.PathLike, *, config: str | None = None, split: str | None = None, streaming: bool = False,
    limit: int | None = None, window: Any = None, columns: dict[str, str] | None = None,
    captions: str | os.PathLike | None = None, image_root: str | os.PathLike | None = None,
    allow_empty_captions: bool = False, salt: str | None = None, strict: bool = True,
) -> datasets.Dataset | datasets.IterableDataset:  # fmt: skip
    """Load pairs from parquet, the hub, a table of captions, ShareGPT JSON, DICOM files, or a folder of any of these.

    Parameters
    ----------
    source : "sample" (the built sample set), a hub id such as "UCSC-VLAA/MedTrinity-25M", or the path of a parquet file
        of a CSV, TSV, JSON or JSONL of captions or dialogues (messages, conversations, prompt/completion), of a DICOM
        file, or of a folder: parquet shards, or pictures with one table beside them.
    config, split : configuration of a hub set, such as "25M_demo" (or after a colon in `source`); the split to keep, by
        the column `split`, by file names such as `test-00000.parquet` or `test.jsonl`, or by the hub's splits (there
        the default is "train").
    streaming : return an IterableDataset that reads as you go: memory and disk stay flat.
    limit : the first rows only, held in memory, without reading or downloading the rest.
    window, salt : for DICOM: a CT window, see `medtune.dicom.WINDOWS`; a secret that makes the hashed patient groups
        agree between calls (without one, groups are numbered as they come).
    columns : our name -> the source's name, where they differ: `{"caption": "impression"}`. Common names are known.
    captions, image_root : the table of captions, where it is not the only one in the folder; the folder that pictures
        may not lie outside of (default: where the table is); their names are relative to either.
    allow_empty_captions : load pictures or DICOM files that have no table, with the caption "".
    strict : raise on the first bad row of a table. If False, it becomes a row whose column `problem` says why, which
        `reject_reason` reports, so that the rest goes on and nothing is lost silently.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, ValueError : one line: what, where, and what to do.

    Examples
    --------
    >>> import pathlib, tempfile, PIL.Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.new("L", (8, 8)).save(folder / "a.png")
    >>> _ = (folder / "captions.csv").write_text("image,caption\\na.png,A black square.\\n")
    >>> load_pairs(folder)[0]["caption"]
    'A black square.'
    """
    name, path, columns = str(source), Path(source).expanduser(), columns or {}
    if name == "sample":
        path = _find_sample()
    if not path.exists():
        name, _, given = name.partition(":")
        if path.suffix in TABLES | DICOM | {".parquet"} or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise FileNotFoundError(f"no such file or folder: {name}")
        return _from_hub(name, config or given or None, split or "train", streaming, limit, columns)
    plan = dict(columns=columns, strict=strict, window=window, salt=salt, split=split)
    shards = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] * (path.suffix == ".parquet")
    if shards and not captions:
        if split and (named := [f for f in shards if _split_of(f) == split]):
            shards, plan["split"] = named, None
        return _from_rows(name, shards, plan, streaming, limit, _parquet_features(shards, plan))
    tables = [Path(captions)] if captions else _find_tables(path)
    base = (path if path.is_dir() else path.parent).resolve()
    root = Path(image_root).expanduser().resolve() if image_root else base
    if not tables:
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        found = [str(f.absolute()) for f in found if f.suffix.lower() in PICTURES or is_dicom(f)]
        if found and not allow_empty_captions:
            raise ValueError(f"{name} holds {len(found)} pictures and no table of captions: give captions=FILE.csv "
                             "(columns image, caption) or allow_empty_captions=True")  # fmt: skip
        tables = [found]
    folders = [str(f) for f in dict.fromkeys((root, base, base / "images")) if f.is_relative_to(root)]
    return _from_rows(name, tables, plan | {"folders": folders}, streaming, limit)


def _find_sample() -> Path:
    here, named = Path.cwd(), os.environ.get("MEDTUNE_SAMPLE")
    above = [here, *here.parents, *Path(__file__).resolve().parents]
    for path in [Path(named)] if named else [folder / "data/sample/sample.parquet" for folder in above]:
        if path.is_file():
            return path
    raise FileNotFoundError("the sample set is not built: run `make sample` in medtune's folder, or set MEDTUNE_SAMPLE")


# --- the hub, through the datasets library ------------------------------------------------------------------------


def _from_hub(name, config, split, streaming, limit, columns):
    import datasets

    try:
        pairs = datasets.load_dataset(name, config, split=split, streaming=streaming or limit is not None)
        names = _renamed(pairs.column_names, columns, name, need=tuple(ALIASES))
        pairs = pairs.select_columns(list(names)).rename_columns({a: b for a, b in names.items() if a != b})
        text = datasets.Value("string")
        for column, feature in {"image": datasets.Image(), "id": text, "caption": text}.items():
            if pairs.features[column] != feature:
                pairs = pairs.cast_column(column, feature)
        pairs = pairs if limit is None else pairs.take(limit)
        # undecoded; one row at least, so that a refusal shows here and not in the middle of a run
        few = pairs if limit is not None and not streaming else pairs.take(1)
        rows = list(few.cast_column("image", datasets.Image(decode=False)))
        if few is pairs:
            pairs = datasets.Dataset.from_list(rows, features=pairs.features)
    except Exception as error:  # the hub client, pyarrow and datasets raise dozens of kinds
        raise _explained(name, error) from None
    if not rows:
        raise ValueError(f"{name} holds no pairs")
    return pairs


def _renamed(available, columns: dict[str, str], where, need=()) -> dict[str, str]:
    """Map the source's names to ours; `columns` and then `ALIASES` say which is which."""
    names = {name: name for name in available if name not in columns} | {v: k for k, v in columns.items()}
    for ours, others in ALIASES.items():
        if ours not in names.values() and (alias := next((o for o in others if names.get(o) == o), None)):
            names[alias] = ours
    if missing := [n for n in columns.values() if n not in available] + [n for n in need if n not in names.values()]:
        raise ValueError(f"{where} has no column {' or '.join(missing)}, only {', '.join(available)}: "
                         "say which is which, columns={'caption': 'NAME'}")  # fmt: skip
    return names


def _explained(name: str, error: BaseException) -> Exception:
    """Put the many ways in which the hub does not give a set into one line and one of four built-in errors."""
    chain = [error]
    while len(chain) < 9 and (cause := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    kinds, text = str([type(e).__name__ for e in chain]), " ".join(map(_line, chain))
    if "DatasetNotFoundError" in kinds and "gated" not in text:
        return FileNotFoundError(f"no path {name} here and no such hub data set (a private one needs `hf auth login`)")
    if re.search(r"GatedRepoError|gated dataset|\b40[13]\b", kinds + text):
        page = f"https://huggingface.co/datasets/{name}"
        return PermissionError(f"the hub refuses {name}: request access at {page}, then run `hf auth login`")
    if re.search(r"ConnectionError|OfflineMode|ConnectError|Timeout", kinds):
        return ConnectionError(f"no path {name} here, and no hub in reach (offline?); HF_ENDPOINT can name a mirror")
    line = _line(error).split(" Example of usage")[0]
    return ValueError(line if name in line else f"cannot load {name}: {line}")


# --- shards, tables, dialogues, pictures and DICOM files -----------------------------------------------------------


def _from_rows(name, tables, plan, streaming, limit, features=None):
    """Make a Dataset of `_rows`; its features are those of the parquet files or are inferred from the rows."""
    import datasets
    import pyarrow as pa

    nothing = ValueError(f"{name} holds no pairs" + (f" of split {plan['split']}" if plan["split"] else ""))
    if features and not streaming and limit is None:
        changed = tuple(file.stat().st_mtime_ns for file in tables)  # what the datasets cache holds may be old
        arguments = {"tables": tables, "plan": plan | {"changed": changed}, "keys": tuple(features)}
        try:
            return datasets.Dataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(_line(error.__cause__ or error)) from None
        except ValueError:
            raise nothing from None
    head = 1 if features else 256  # a stream tells its columns from the first rows
    rows = list(itertools.islice(_rows(tables, plan), min(head, limit or head) if streaming else limit))
    if not rows:
        raise nothing
    table = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    if features is None:
        for key, values in table.items():
            try:
                pa.array(values)
            except (ValueError, TypeError, OverflowError):  # values of several kinds: keep them as JSON text
                table[key] = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
        text = datasets.Value("string")
        features = datasets.Dataset.from_dict({k: v for k, v in table.items() if k != "image"}).features
        features = {k: text if f == datasets.Value("null") else f for k, f in features.items()}
        features = {"image": datasets.Image(), **features} | ({} if plan["strict"] else {"problem": text})
    if not streaming:
        table = {key: table.get(key, [None] * len(rows)) for key in features}
        return datasets.Dataset.from_dict(table, features=datasets.Features(features))
    arguments = {"tables": tables, "plan": plan, "keys": tuple(features)}
    pairs = datasets.IterableDataset.from_generator(_rows, features=datasets.Features(features), gen_kwargs=arguments)
    return pairs if limit is None else pairs.take(limit)


def _parquet_features(shards: list[Path], plan: dict) -> datasets.Features:
    """Read the footers, the part that a shard from a broken download lacks."""
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    features, rows = {}, 0
    for shard in shards:
        try:
            footer = pq.read_metadata(shard)
        except (OSError, ValueError) as error:
            raise ValueError(f"{shard} is cut off or no parquet file, fetch it again ({_line(error)})") from None
        schema = footer.schema.to_arrow_schema()
        names = _renamed(schema.names, plan["columns"], shard, need=tuple(ALIASES))
        if plan["split"] and "split" not in names.values():
            raise ValueError(f"{shard} has no column split: leave split out, or make one with medtune.audit")
        features = {names[k]: f for k, f in Features.from_arrow_schema(schema).items() if k in names} | features
        rows += footer.num_rows
    if not rows:
        raise ValueError(f"{shards[0]} holds no pairs")
    return Features(features | {"image": Image(), "id": Value("string"), "caption": Value("string")})


def _parquet_rows(shard: Path, columns: dict[str, str]) -> Iterator[dict]:
    import pyarrow.parquet as pq

    try:  # without pre_buffer a row group of any size is read page by page
        with pq.ParquetFile(shard, pre_buffer=False, buffer_size=1 << 20) as file:
            names = _renamed(file.schema_arrow.names, columns, shard)
            for batch in file.iter_batches(32, columns=list(names), use_threads=False):
                for row in batch.rename_columns(names).to_pylist():
                    image = row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"]
                    row["image"] = {"bytes": image, "path": None} if isinstance(image, bytes) else None
                    yield row | {"id": None if row["id"] is None else str(row["id"])}
    except (OSError, ValueError) as error:
        raise ValueError(f"{shard} cannot be read to its end, fetch it again ({_line(error)})") from None


def _rows(tables: list, plan: dict, keys: tuple = ()) -> Iterator[dict]:
    """Yield the pairs of all tables in order; `tables` is a list so that `datasets` can spread it over workers."""
    known: dict[str, Any] = {"salt": plan["salt"] or secrets.token_hex(16), "ids": Counter(), "groups": {}}
    for table in tables:
        parquet = isinstance(table, Path) and table.suffix == ".parquet"
        split = _split_of(table) if isinstance(table, Path) else None
        for row in _parquet_rows(table, plan["columns"]) if parquet else _table_rows(table, plan, **known):
            if len(tables) > 1:
                row.setdefault("split", split)
            if plan["split"] in (None, row.get("split", split)) or row.get("problem"):
                yield {key: row.get(key) for key in keys or row}


def _table_rows(table: Path | list[str], plan: dict, salt: str, ids: Counter, groups: dict[str, str]) -> Iterator[dict]:
    for where, record in _records(table):
        try:
            made = list(_pairs(record, plan, salt))
        except (ValueError, OSError, TypeError, AttributeError) as error:
            reason = f"{where}: {_line(error)}"
            if plan["strict"]:
                raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(reason) from None
            made = [{"id": where, "image": None, "caption": None, "problem": reason, "named": True}]
        for row in made:
            if (hashed := row.pop("dicom_group", None)) and not row.get("group"):
                number = groups.setdefault(hashed, f"dicom-{len(groups) + 1:04d}")
                row["group"] = hashed if plan["salt"] else number  # hashes of a salt that nobody knows say nothing
            if not row.pop("named") or len(made) > 1:  # ids that we make up or repeat get a number
                ids[row["id"]] += 1
                row["id"] += f"-{ids[row['id']]}" if ids[row["id"]] > 1 else ""
            yield row


def _records(table: Path | list[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, record or JSON line) of a table; bytes that are no UTF-8 come out as lone surrogates."""
    if isinstance(table, list):
        yield from ((Path(file).name, {"image": file, "caption": ""}) for file in table)
        return
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        if table.suffix in (".csv", ".tsv"):
            csv.field_size_limit(1 << 30)  # a caption of 50,000 words is for reject_reason to judge
            head = text.readline()
            text.seek(0)
            reader = csv.DictReader(text, delimiter=max(",\t;", key=head.count))
            yield from ((f"{table.name}:{reader.line_num}", record) for record in reader)
        elif table.suffix == ".jsonl":
            yield from ((f"{table.name}:{number}", line) for number, line in enumerate(text, 1) if line.strip())
        else:
            try:
                records = json.load(text)
            except ValueError as error:
                raise ValueError(f"{table} is not JSON ({error}): cut off, or JSON Lines named .json?") from None
            yield from ((f"{table.name}:{number}", record) for number, record in enumerate(records, 1))


def _pairs(record: Any, plan: dict, salt: str) -> Iterator[dict]:
    """Turn one record, plain or a dialogue, into a pair a picture and answer; one without a picture into none."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    turns = record.get("messages") or record.get("conversations")
    if "completion" in record:  # lists of messages, or plain text
        said = {"user": record.get("prompt"), "assistant": record["completion"]}
        turns = [t for k, v in said.items() for t in (v if isinstance(v, list) else [{"role": k, "content": v}])]
    columns = {ours: theirs for ours, theirs in plan["columns"].items() if theirs in record}
    names = _renamed(record, columns, "the record", need=() if turns else ("image", "caption"))
    extra = {names[k]: _clean(v) for k, v in record.items() if k in names and k not in TURNS}
    images, caption, name, _ = (extra.pop(key, None) for key in ("image", "caption", "id", "images"))
    if turns and not images:
        return
    for image in images if isinstance(images, list) else [images]:
        for cell, own, more in _pictures(_located(image, *map(Path, plan["folders"])), plan["window"], salt):
            for text, question in _answers(turns) if turns else [(caption, {})]:
                row = {"image": cell, "id": own if name is None else str(name), "caption": text}
                yield row | more | extra | question | {"named": name is not None}


def _answers(turns: list[dict]) -> Iterator[tuple[str, dict]]:
    question = []
    for turn in turns:
        role, said = ROLES.get(turn.get("role") or turn.get("from")), turn.get("content") or turn.get("value") or ""
        if not isinstance(said, str):
            said = " ".join(part.get("text") or "" for part in said)
        said = _clean(said.replace("<image>", "").strip())
        if role == "assistant":
            yield said, {"question": "\n".join(question)}
        question = [] if role == "assistant" else question + [said] * (role == "user")


def _pictures(file: Path, window, salt: str) -> Iterator[tuple[dict, str, dict]]:
    """Yield (cell, made-up id, what else is known) of a picture, or of each frame of a DICOM file or folder of them."""
    if file.is_file() and not is_dicom(file):
        yield {"bytes": None, "path": str(file)}, file.stem, {}
        return
    from . import dicom

    for part in [file] if file.is_file() else sorted(f for f in file.iterdir() if is_dicom(f)):
        known = dicom.describe(part, salt=salt)
        own = "dicom-" + hashlib.sha256(part.read_bytes()).hexdigest()[:16]  # a file name may name the patient
        for frame in dicom.read_frames(part, window=window):
            frame.save(buffer := io.BytesIO(), "PNG")
            cell = {"bytes": buffer.getvalue(), "path": None}
            yield cell, own, {"dicom_group": known.get("group"), "modality": known.get("modality")}


def _located(name: Any, root: Path, *folders: Path) -> Path:
    """Find a picture that a table names, inside the root folder and nowhere else."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is no picture name")
    paths = [(folder / name).resolve() for folder in (root, *folders)]
    if not all(path.is_relative_to(root) for path in paths):
        raise ValueError(f"picture {name} lies outside the folder (a link or '..'): give image_root=FOLDER")
    if found := [path for path in paths if path.exists()]:
        return found[0]
    raise FileNotFoundError(f"picture {name} is missing")


def _find_tables(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder] * (folder.suffix in TABLES)
    files = [f for f in sorted(folder.iterdir()) if f.suffix in TABLES and f.name not in NO_TABLES and f.name[0] != "."]
    files = [f for f in files if f.stem in SPLITS] or [f for f in files if f.stem in ("captions", "metadata")] or files
    if len(files) > 1 and files[0].stem not in SPLITS:
        raise ValueError(f"{folder} holds several tables ({', '.join(f.name for f in files)}): give captions=FILE")
    return files


def is_dicom(file: Path) -> bool:
    """Say whether a file is DICOM: by its suffix or, if it has none, by the mark that the standard puts at byte 128."""
    if file.suffix:
        return file.suffix.lower() in DICOM
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _split_of(file: Path) -> str | None:
    return SPLITS.get(re.split(r"[-_.]", file.name)[0])


def _clean(value: Any) -> Any:
    """Replace lone surrogates, which Arrow cannot hold, by the sign that `reject_reason` looks for."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", value) if isinstance(value, str) else value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- one pair -----------------------------------------------------------------------------------------------------


def picture_bytes(cell: Any) -> bytes:
    """Give the bytes of a picture as the source holds them; `cell` is `{"bytes", "path"}`, bytes or a path."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if cell is None:
        raise ValueError("there is no picture")
    return cell if isinstance(cell, bytes) else Path(cell).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any picture an upright RGB one.

    The first frame of an animation; EXIF rotation applied; 16-bit and float values stretched from the picture's darkest
    to its brightest to 0..255 (absolute values are lost: window DICOM files instead); transparency over black, the
    background of a radiograph; palette, grey, CMYK and the rest converted.

    Examples
    --------
    >>> from PIL import Image
    >>> to_rgb(Image.new("RGBA", (2, 2), (255, 255, 255, 0))).getpixel((0, 0))
    (0, 0, 0)
    """
    import numpy as np
    from PIL import Image, ImageOps

    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12)) + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def reject_reason(row: dict, *, max_pixels: int = 50_000_000, max_words: int = 2_000) -> str | None:
    """Say why a pair must not be trained on, in one line that starts with the column, or None when it is fine.

    `row["image"]` is a cell as `datasets.Image(decode=False)` gives it, bytes, a path, or a PIL image. The picture is
    decoded to the end, a JPEG at 1/8 of its size, which finds a cut one at a fraction of the cost.

    Examples
    --------
    >>> reject_reason({"id": "a", "caption": " ", "image": b""})
    'caption: is empty'
    >>> reject_reason({"id": "../a", "caption": "A liver.", "image": b""})
    "id: '../a' would leave a folder; use letters, digits, '.', '_' and '-'"
    """
    from PIL import Image

    if row.get("problem"):
        return row["problem"]
    name, caption = row.get("id"), row.get("caption")
    if not isinstance(name, str) or not name.strip():
        return "id: is empty"
    if len(name.encode("utf-8", "replace")) > 200:
        return f"id: has {len(name)} characters, more than 200 bytes"
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff\ufffd]", name):
        return f"id: {name!r} holds a control character or one that is not valid Unicode"
    if re.search(r"[/\\]|^\.", name):
        return f"id: {name!r} would leave a folder; use letters, digits, '.', '_' and '-'"
    if not isinstance(caption, str) or not caption.strip():
        return "caption: is empty"
    if re.search("[\x00\ud800-\udfff\ufffd]", caption):
        return "caption: holds characters that are not valid Unicode (surrogates, U+FFFD or NUL)"
    words = len(re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", caption))
    if words > max_words:
        return f"caption: has {words} words, more than {max_words}"
    try:
        image = row.get("image")
        if not hasattr(image, "mode"):
            if not (data := picture_bytes(image)):
                return "image: has zero bytes"
            with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
                image = Image.open(io.BytesIO(data))  # our own limit comes next
        if image.width * image.height > max_pixels:
            return f"image: {image.width} x {image.height} pixels, more than {max_pixels} (a decompression bomb?)"
        image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except Exception as error:  # decoders raise many kinds
        return f"image: cannot be decoded ({_line(error)})"
    return None
