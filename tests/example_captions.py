"""Captions in the manner of the sample set, in both languages."""

LESION = "Within it lies a round hypodense lesion of about 14 mm, in its upper part."
NO_LESION = "No focal lesion is seen within it."

EN_REGION = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with a "
    "soft tissue window. The region of interest, located in the upper left of the image, covers "
    "about 4% of its area and shows the spleen. It has soft tissue density and is bordered by the "
    "stomach and the left kidney."
)
EN = f"{EN_REGION} {LESION}"
EN_DENIED = f"{EN_REGION} {NO_LESION}"

# says the same as EN
ZH = (
    "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。"
    "感兴趣区域位于图像的左上部，约占图像面积的4%，显示脾脏。"
    "其密度为软组织密度，与胃和左肾相邻。其内可见一个约14毫米的圆形低密度病灶，位于其上部。"
)
