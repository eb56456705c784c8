"""A frozen vision tower sees each picture once; from then on its features come from the disk."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file

from medtune.models import part_of

from .speed import without_adapter


def cache_features(trainer: Any, folder: str | Path) -> None:
    """Show each picture to the frozen vision tower once; batches then hold features, not pixels.

    Parameters
    ----------
    trainer : a `trl.SFTTrainer` of a Qwen-VL model whose `images` are files, as
        `medtune.records.read_records` gives them.
    folder : for one file a picture: for each of its tokens the numbers of the merger and of
        DeepStack, in the dtype computed. What is there already, of the same weights, preparation
        and picture, is reused.

    Raises
    ------
    ValueError : vision tower or merger are trained, the model is no Qwen-VL, the trainer is none of
        TRL's, or it uses DeepSpeed.
    OSError : the disk has too little space.
    """
    core = without_adapter(trainer.model).model
    collate = trainer.data_collator
    prepare = trainer.processing_class.image_processor
    if (
        _vision_is_trained(trainer.model)
        or trainer.is_deepspeed_enabled
        or not hasattr(core, "visual")
        or not hasattr(collate, "processor")
    ):
        raise ValueError(
            "cache_features needs a Qwen-VL model, vision tower and merger frozen, and no DeepSpeed"
        )
    folder = Path(folder) / _name_of_preparation(trainer, core)
    folder.mkdir(parents=True, exist_ok=True)
    places = _places_of_pictures(trainer, folder)
    _compute_missing(trainer, core, places, folder)

    # a copy, because the trainer saves its own processor with the model
    collate.processor = copy.copy(collate.processor)
    collate.processor.image_processor = _FeaturesOnDisk(places, prepare.merge_size)
    trainer.data_collator = partial(_collate_by_name, collate)
    core.get_image_features = partial(_split_features, core)


def _vision_is_trained(model: torch.nn.Module) -> bool:
    """Say whether vision tower or merger learn, so that their features change."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and part_of(name) in ("vision", "merger"):
            return True
    return False


def _name_of_preparation(trainer: Any, core: Any) -> str:
    """Name what features depend on besides the picture: preparation, precision and weights."""
    prepare = trainer.processing_class.image_processor
    how = repr((prepare.to_dict(), trainer.args.bf16, trainer.args.fp16)).encode()
    weights = save(core.visual.state_dict())
    return hashlib.sha256(how + weights).hexdigest()[:16]


def _places_of_pictures(trainer: Any, folder: Path) -> dict[str, Path]:
    """Say for the file of each picture of the trainer's data in which file its features are.

    The data sets of the trainer then give the pictures' files, and decode them no longer.
    """
    places = {}
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        if not data:
            continue
        undecoded = datasets.List(datasets.Image(decode=False))
        data = data.cast_column("images", undecoded)
        setattr(trainer, name, data)
        for pictures in data["images"]:
            for picture in pictures:
                path = picture["path"]
                if path not in places:
                    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                    places[path] = folder / f"{digest}.safetensors"
    return places


def _compute_missing(trainer: Any, core: Any, places: dict[str, Path], folder: Path) -> None:
    """Compute the features of all pictures that have no file yet, as long as the disk has space."""
    # equal pictures have one place
    missing = {place: path for path, place in places.items() if not place.exists()}
    for number, (place, path) in enumerate(missing.items()):
        tensors = _compute_features(trainer, core, path)
        # what bears the final name is complete
        partial_file = place.with_suffix(".partial")
        save_file(tensors, partial_file)
        partial_file.rename(place)
        still_to_come = place.stat().st_size * (len(missing) - number)
        if number == 0:
            print(
                f"medtune train: features of {len(missing)} pictures, "
                f"about {still_to_come / 1e6:.1f} MB, go to {folder}"
            )
        if shutil.disk_usage(folder).free < still_to_come:
            raise OSError(
                f"{folder} has too little space: "
                f"{still_to_come / 1e9:.2f} GB of features are still to come"
            )


def _compute_features(trainer: Any, core: Any, path: str) -> dict[str, torch.Tensor]:
    """Show one picture to the vision tower.

    Returns
    -------
    dict : "pixel_values" (tokens, numbers), which holds features under the name that the model's
        input has, and "image_grid_thw" (1, 3).
    """
    prepare = trainer.processing_class.image_processor
    # decoded in the way in which the data set would do it
    picture = datasets.Image().decode_example({"path": path, "bytes": None})
    batch = prepare([picture], return_tensors="pt")
    with torch.no_grad(), trainer.accelerator.autocast():
        seen = core.get_image_features(**batch.to(core.device), return_dict=True)
    layers = [seen.pooler_output[0]]
    # only Qwen3-VL hands layers from inside the tower to the language model, too
    for deep in getattr(seen, "deepstack_features", None) or ():
        layers.append(deep[0])
    return {
        "pixel_values": torch.cat(layers, -1).cpu(),
        "image_grid_thw": batch["image_grid_thw"].cpu(),
    }


class _FeaturesOnDisk:
    """Takes the place of an image processor: gives features of pictures instead of pixels.

    Attributes
    ----------
    places : file of the features, by the picture's own file.
    merge_size : as the image processor has it; the processor counts image tokens by it.
    """

    def __init__(self, places: dict[str, Path], merge_size: int):
        self.places = places
        self.merge_size = merge_size

    def __call__(self, images: list[list[Image.Image]], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Read the features of the pictures of several samples, one picture after the other."""
        found = []
        for pictures in images:
            for picture in pictures:
                found.append(load_file(self.places[picture.filename]))
        return {key: torch.cat([one[key] for one in found]) for key in found[0]}

    def fetch_images(self, images: list) -> list:
        """Return pictures as they are; an image processor would load them from their addresses."""
        return images


def _collate_by_name(collate: Callable[[list[dict]], dict], rows: list[dict]) -> dict:
    """Collate rows whose pictures are opened but not decoded: they stand for the names of files."""
    opened = []
    for row in rows:
        images = [Image.open(picture["path"]) for picture in row["images"]]
        opened.append(row | {"images": images})
    return collate(opened)


def _split_features(
    core: Any, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs: Any
) -> SimpleNamespace:
    """Do what `get_image_features` of the model does, with features that come from the disk.

    Parameters
    ----------
    core : the Qwen-VL model.
    pixel_values : (tokens of all pictures, numbers of all layers).
    image_grid_thw : (pictures, 3), frames, rows and columns of patches.

    Returns
    -------
    SimpleNamespace : `pooler_output`, one tensor a picture, and `deepstack_features`, such a tuple
        for each layer.
    """
    merged = core.visual.spatial_merge_size**2
    tokens = (image_grid_thw.prod(-1) // merged).tolist()
    width = core.config.text_config.hidden_size
    first, *deep = [layer.split(tokens) for layer in pixel_values.split(width, -1)]
    return SimpleNamespace(pooler_output=first, deepstack_features=deep)
