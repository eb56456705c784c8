"""Regions of interest: boxes that are drawn as green outlines in a picture.

`draw.py` draws a box, erases one, compares boxes and names their place; `find.py` finds those that
are drawn in a picture, and `rate.py` says how well a finder does. `views.py` cuts out a box and
looks at it closely; `trace.py` measures what an outline leaves in the pixels, even if erased.
"""

from .draw import area_share, draw_box, erase_box, iou, place_of
from .find import Outline, find_box, find_boxes, find_outlines
from .rate import rate_boxes
from .trace import edge_differences
from .views import box_in_view, crop_box, magnify_box, view_around

__all__ = [
    "Outline",
    "area_share",
    "box_in_view",
    "crop_box",
    "draw_box",
    "edge_differences",
    "erase_box",
    "find_box",
    "find_boxes",
    "find_outlines",
    "iou",
    "magnify_box",
    "place_of",
    "rate_boxes",
    "view_around",
]
