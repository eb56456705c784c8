"""Prepare a picture as the processor of a model does, without that processor.

llama.cpp has a preparation of its own: other limits of size, another interpolation, and a picture
that is not square is padded where Transformers stretches it. So a picture goes to it in the size
that it will keep.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

# A picture of 200 times its width is refused, as by Transformers.
LONGEST_RATIO = 200


@dataclass(frozen=True)
class Preparation:
    """How the processor of a model resizes pictures.

    Parameters
    ----------
    factor : sides are multiples of so many pixels; one image token stands for a square of them. 0
        for a model with one fixed size.
    min_pixels, max_pixels : bounds of the number of pixels after resizing.
    width, height : the fixed size; 0 for a model without one.
    resample : number of PIL's filter.

    Examples
    --------
    >>> preparation = Preparation(factor=32, min_pixels=36864, max_pixels=38000, resample=3)
    >>> preparation.size_of(512, 512), preparation.size_of(300, 200)
    ((192, 192), (224, 128))
    """

    factor: int = 0
    min_pixels: int = 0
    max_pixels: int = 0
    width: int = 0
    height: int = 0
    resample: int = 3

    @classmethod
    def of(cls, image_processor: Any) -> "Preparation":
        """Read the preparation of a processor's pictures.

        Parameters
        ----------
        image_processor : the `image_processor` of a processor of Transformers.

        Returns
        -------
        Preparation : what it does.

        Raises
        ------
        ValueError : it does something else, such as cutting a picture into several.
        """
        size = image_processor.size
        resample = int(image_processor.resample)
        if getattr(image_processor, "do_pan_and_scan", None):
            raise ValueError("the processor cuts pictures into several: switch pan and scan off")
        merge = getattr(image_processor, "merge_size", None)
        if merge and size.get("shortest_edge") and size.get("longest_edge"):
            # Qwen-VL calls these numbers of pixels by the names of edges
            return cls(
                factor=image_processor.patch_size * merge,
                min_pixels=size["shortest_edge"],
                max_pixels=size["longest_edge"],
                resample=resample,
            )
        if size.get("height") and size.get("width"):
            return cls(width=size["width"], height=size["height"], resample=resample)
        raise ValueError(
            f"{type(image_processor).__name__} prepares pictures in a way that is not known here"
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preparation":
        """Read what `to_dict` wrote; values that are not known are left out."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known)

    def to_dict(self) -> dict[str, int]:
        """Give the values by name."""
        return asdict(self)

    @property
    def max_tokens(self) -> int | None:
        """Most image tokens of a picture; None where its size is fixed."""
        return self.max_pixels // self.factor**2 if self.factor else None

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Compute width and height after resizing.

        Parameters
        ----------
        width, height : of the picture, in pixels.

        Raises
        ------
        ValueError : one side is more than 200 times the other.
        """
        if not self.factor:
            return self.width, self.height
        if max(width, height) > LONGEST_RATIO * min(width, height):
            raise ValueError(f"a picture of {width} x {height} pixels is too narrow")
        new_width = round(width / self.factor) * self.factor
        new_height = round(height / self.factor) * self.factor
        if new_width * new_height > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            new_width = max(1, math.floor(width / shrink / self.factor)) * self.factor
            new_height = max(1, math.floor(height / shrink / self.factor)) * self.factor
        elif new_width * new_height < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            new_width = math.ceil(width * grow / self.factor) * self.factor
            new_height = math.ceil(height * grow / self.factor) * self.factor
        return new_width, new_height

    def apply(self, picture: Image.Image) -> Image.Image:
        """Give a picture in RGB and in the size that the model sees.

        Parameters
        ----------
        picture : in 8 bits a channel; window or stretch others first.
        """
        rgb = picture.convert("RGB")
        size = self.size_of(*rgb.size)
        return rgb if rgb.size == size else rgb.resize(size, Image.Resampling(self.resample))
