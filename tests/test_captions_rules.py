"""Captions by rules: captions written by hand, Chinese twins, real case notes, and any string."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtune import captions
from medtune.captions import PLACES, TERMS, Caption, detect_language, entities, parse_caption

ROOT = Path(__file__).parents[1]
ENGLISH = (
    "The image is a computed tomography (CT) scan of the upper abdomen in axial view, shown with "
    "a soft tissue window. The region of interest, located in the upper left of the image, covers "
    "about 4% of its area and shows the spleen. It has soft tissue density and is bordered by the "
    "stomach and the left kidney. "
)
CHINESE = (
    "图像为上腹部的轴位计算机断层扫描（CT），采用软组织窗显示。感兴趣区域位于图像的左上部，"
    "约占图像面积的4%，显示脾脏。其密度为软组织密度，与胃和左肾相邻。"
)
FINDING = "Within it lies a round hypodense lesion of about 14 mm, in its upper part."

# (caption, {field: value}); lists are compared without their order
WRITTEN = [
    (
        "The image is a non-contrast computed tomography (CT) scan of the brain, showing the "
        "cerebral hemispheres and the ventricles without any medical devices. The region of "
        "interest, located centrally and in the middle of the image, occupies approximately 3.2% "
        "of the image area and has a higher density than the surrounding brain tissue, which is "
        "indicative of an intracranial hemorrhage. The hemorrhage may exert a mass effect on the "
        "adjacent structures.",
        dict(
            modality="CT",
            structure="brain",
            place="center",
            area_share=0.032,
            density="high density",
            negated=[],
            findings=["intracranial hemorrhage", "hemorrhage", "mass effect"],
        ),
    ),
    (
        "The image is a CT scan of the brain in axial view. The region of interest, located in "
        "the left-center and upper-middle of the image, covers 1.5% of the area and shows a "
        "crescent-shaped hyperdense area along the left frontal lobe, suggestive of a subdural "
        "haematoma. There is no midline shift and no evidence of skull fracture.",
        dict(
            modality="CT",
            view="axial",
            structure="left frontal lobe",
            side="left",
            place="upper left",
            area_share=0.015,
            findings=["hyperdense lesion", "subdural hemorrhage"],
            negated=["midline shift", "fracture"],
        ),
    ),
    (
        "The image is a chest X-ray showing the thoracic cavity with the lungs, the heart and the "
        "ribs. The region of interest, located at the right-center and lower-middle of the image, "
        "occupies about 6% of the area and shows increased opacity in the left lower lobe, "
        "consistent with pneumonia. No pleural effusion or pneumothorax is seen.",
        dict(
            modality="X-ray",
            level="chest",
            structure="left lower lobe of the lung",
            place="lower right",
            area_share=0.06,
            findings=["opacity", "pneumonia"],
            negated=["pleural effusion", "pneumothorax"],
        ),
    ),
    (
        "The image is a chest radiograph in posteroanterior view. The heart is enlarged and there "
        "are small bilateral pleural effusions, suggesting heart failure. The lungs are otherwise "
        "clear without focal consolidation.",
        dict(
            modality="X-ray",
            view="PA",
            side="bilateral",
            findings=["cardiomegaly", "pleural effusion"],
            negated=["consolidation"],
        ),
    ),
    (
        "The image is a contrast-enhanced CT scan of the abdomen. The region of interest, located "
        "in the upper-left of the image, covers 2.4% of the area and shows a hypodense lesion of "
        "32 x 28 mm in the right lobe of the liver, which may be a metastasis. The spleen and "
        "pancreas appear normal. Further evaluation with MRI is recommended to exclude "
        "hepatocellular carcinoma.",
        dict(
            modality="CT",
            level="abdomen",
            structure="liver",
            side="right",
            place="upper left",
            area_share=0.024,
            size_mm=32,
            findings=["hypodense lesion", "metastasis"],
            negated=[],
            advice="Further evaluation with MRI is recommended to exclude hepatocellular "
            "carcinoma.",
        ),
    ),
    (
        "The image is an axial CT scan of the kidneys. The region of interest in the lower right "
        "of the image shows a solid mass in the left kidney, probably a renal cell carcinoma, "
        "displacing the adjacent bowel. No hydronephrosis.",
        dict(
            modality="CT",
            view="axial",
            structure="left kidney",
            side="left",
            place="lower right",
            findings=["mass", "cancer", "displacement"],
        ),
    ),
    (
        "This is a T2-weighted magnetic resonance imaging (MRI) scan of the brain in the axial "
        "plane. The region of interest, located in the upper-middle and right-center, occupies "
        "5.1% of the image and shows a hyperintense lesion with surrounding oedema, which "
        "suggests a glioma.",
        dict(
            modality="MRI",
            structure="brain",
            place="upper right",
            area_share=0.051,
            density="high signal",
            findings=["edema", "glioma"],
        ),
    ),
    (
        "The MRI shows a sagittal view of the lumbar spine. There is a disc herniation at L4/L5 "
        "with narrowing of the spinal canal and compression of the nerve root, but no fracture of "
        "the vertebral bodies.",
        dict(
            modality="MRI",
            view="sagittal",
            structure="vertebra",
            negated=["fracture"],
            findings=["disc herniation", "stenosis", "compression"],
        ),
    ),
    (
        "The image is an ultrasound of the breast. The region of interest, located in the center "
        "of the image, shows an irregular hypoechoic mass with indistinct margins in the right "
        "breast, suspicious for malignancy. There are no enlarged axillary lymph nodes.",
        dict(
            modality="ultrasound",
            structure="right breast",
            place="center",
            density="hypoechoic",
            findings=["mass", "cancer"],
        ),
    ),
    (
        "This ultrasound image of the gallbladder shows two echogenic foci with acoustic "
        "shadowing, consistent with gallstones. The gallbladder wall is not thickened and there "
        "is no pericholecystic fluid collection.",
        dict(
            modality="ultrasound",
            structure="gallbladder",
            findings=["stone"],
            negated=["thickening", "effusion"],
        ),
    ),
    (
        "The image is a histopathology slide of colon tissue stained with hematoxylin and eosin "
        "(H&E). The region of interest shows irregular glands with nuclear atypia and necrosis, "
        "indicative of adenocarcinoma, with inflammatory cell infiltration in the surrounding "
        "stroma.",
        dict(
            modality="histopathology",
            structure="colon",
            findings=["dysplasia", "necrosis", "cancer", "inflammation", "infiltrate"],
        ),
    ),
    (
        "The image is an X-ray of the left forearm. The region of interest, located at the bottom "
        "center of the image, shows a transverse fracture of the distal left radius with dorsal "
        "displacement. The ulna is intact.",
        dict(
            modality="X-ray",
            structure="left radius",
            side="left",
            place="lower middle",
            findings=["fracture", "displacement"],
        ),
    ),
    (
        "The image is a mammogram showing the left breast. A spiculated mass of about 1.8 cm with "
        "microcalcifications is seen in the upper outer quadrant, suggestive of breast cancer.",
        dict(
            modality="mammography",
            structure="left breast",
            size_mm=18,
            findings=["mass", "calcification", "cancer"],
        ),
    ),
    (
        "The image is a CT scan of the chest with a lung window. There are ground-glass opacities "
        "in the peripheral zones of both lungs and a cavity in the right upper lobe. Findings are "
        "consistent with tuberculosis; no pneumothorax.",
        dict(
            modality="CT",
            level="chest",
            window="lung",
            negated=["pneumothorax"],
            findings=["ground-glass opacity", "cavity", "tuberculosis"],
        ),
    ),
    (
        "The CT scan shows a nodule in the left upper lobe of the lung, measuring 8 mm. It is "
        "well-defined and without calcification or spiculation. The mediastinal lymph nodes are "
        "not enlarged.",
        dict(
            modality="CT",
            structure="left upper lobe of the lung",
            side="left",
            size_mm=8,
            findings=["nodule"],
            negated=["calcification", "enlargement"],
        ),
    ),
    (
        "The image is an endoscopic view of the colon. The region of interest, located in the "
        "lower-left of the image, occupies 12% of the image area and shows a polyp with no signs "
        "of bleeding or ulceration.",
        dict(
            modality="endoscopy",
            structure="colon",
            place="lower left",
            area_share=0.12,
            findings=["polyp"],
            negated=["hemorrhage", "ulcer"],
        ),
    ),
    (
        "The image is a fundus photograph of the right eye. Microaneurysms, hard exudates and "
        "retinal haemorrhages are seen around the macula, which is consistent with diabetic "
        "retinopathy.",
        dict(
            modality="fundus photography",
            findings=["aneurysm", "exudate", "hemorrhage", "diabetic retinopathy"],
        ),
    ),
    (
        "The image is a dermoscopic picture of the skin. The region of interest in the middle of "
        "the image shows an asymmetric pigmented lesion with irregular borders, which raises "
        "suspicion of melanoma.",
        dict(modality="dermoscopy", structure="skin", place="center", findings=["melanoma"]),
    ),
    (
        "The image is a CT scan of the pelvis in coronal view. The urinary bladder is distended, "
        "the prostate is enlarged, and there is free fluid in the pelvis. No lymphadenopathy.",
        dict(
            modality="CT",
            level="pelvis",
            view="coronal",
            findings=["enlargement", "effusion"],
            negated=["lymphadenopathy"],
        ),
    ),
    (
        "The image is a CT angiogram of the abdomen showing an aneurysm of the abdominal aorta "
        "with mural thrombus. The aneurysm measures 5.6 cm. There is no sign of rupture or "
        "dissection.",
        dict(
            modality="CT",
            structure="aorta",
            size_mm=56,
            findings=["aneurysm", "thrombosis"],
            negated=["dissection"],
        ),
    ),
    (
        "The image shows an axial CT slice at the level of the pancreas. The pancreas is swollen "
        "with peripancreatic fluid, compatible with acute inflammation, and the portal vein is "
        "patent. Hemorrhage cannot be excluded.",
        dict(
            modality="CT", structure="pancreas", findings=["inflammation", "hemorrhage"], negated=[]
        ),
    ),
    (
        "The image is a PET scan. The scan is unremarkable: no abnormal uptake, no mass, no "
        "metastasis.",
        dict(modality="PET", finding=None, findings=[], negated=["mass", "metastasis"]),
    ),
    (
        "There is a green frame at the upper left. Inside it is the spleen.",
        dict(structure="spleen", place="upper left", side=None, findings=[]),
    ),
    (
        "图像为头颅CT平扫轴位图像。感兴趣区域位于图像的左中部，约占图像面积的3.5%，"
        "密度高于周围脑组织，提示左侧额叶脑出血，伴周围水肿及占位效应。中线无移位，未见骨折。",
        dict(
            modality="CT",
            place="middle left",
            area_share=0.035,
            structure="left frontal lobe",
            language="zh",
            findings=["intracranial hemorrhage", "edema", "mass effect"],
            negated=["displacement", "fracture"],
        ),
    ),
    (
        "胸部X线后前位片：右肺下叶见斑片状模糊影，考虑肺炎。双侧肋膈角锐利，未见胸腔积液及气胸。"
        "心影不大。建议抗炎治疗后复查，排除肿瘤。",
        dict(
            modality="X-ray",
            view="PA",
            structure="right lower lobe of the lung",
            side="right",
            findings=["opacity", "pneumonia"],
            negated=["pleural effusion", "pneumothorax"],
            advice="建议抗炎治疗后复查，排除肿瘤。",
        ),
    ),
    (
        "腹部增强CT示肝右叶见一大小约3.2cm×2.8cm的低密度影，边界不清，考虑转移瘤可能。"
        "脾脏、胰腺未见异常。腹腔无积液。",
        dict(
            modality="CT",
            level="abdomen",
            structure="liver",
            size_mm=32,
            findings=["hypodense lesion", "metastasis"],
            negated=["effusion"],
        ),
    ),
    (
        "超声显示左肾囊肿，呈无回声，大小约20毫米，边界清晰，无钙化。",
        dict(
            modality="ultrasound",
            structure="left kidney",
            size_mm=20,
            density="anechoic",
            findings=["cyst"],
            negated=["calcification"],
        ),
    ),
    (
        "磁共振T2加权像显示双侧基底节区多发高信号，提示缺血性改变，不能排除梗死。脑室无扩张。",
        dict(
            modality="MRI",
            structure="basal ganglia",
            side="bilateral",
            density="high signal",
            findings=["infarct"],
            negated=["dilation"],
        ),
    ),
]


@pytest.mark.parametrize(("caption", "fields"), WRITTEN, ids=range(len(WRITTEN)))
def test_written_captions(caption, fields):
    got = dataclasses.asdict(parse_caption(caption))
    for name, expected in fields.items():
        if isinstance(expected, list):
            assert sorted(got[name]) == sorted(expected), name
        else:
            assert got[name] == expected, name


def test_sample_caption_gives_all_fields():
    c = parse_caption(ENGLISH + FINDING)
    assert (c.modality, c.level, c.view, c.window) == (
        "CT",
        "upper abdomen",
        "axial",
        "soft tissue",
    )
    assert (c.structure, c.side, c.place, c.area_share) == ("spleen", None, "upper left", 0.04)
    assert (c.density, c.neighbours) == ("soft tissue density", ["stomach", "left kidney"])
    assert (c.finding, c.size_mm, c.finding_place, c.negated) == (
        "hypodense lesion",
        14,
        "upper middle",
        [],
    )
    assert (c.target_diag, c.language, c.advice) == (FINDING, "en", None)
    assert (
        c.relation
        == "It has soft tissue density and is bordered by the stomach and the left kidney."
    )
    assert parse_caption(ENGLISH + "No focal lesion is seen within it.").negated == ["lesion"]


def test_chinese_twin_gives_the_same_entities():
    with_finding = "其内可见一个约14毫米的圆形低密度病灶，位于其上部。"
    assert entities(CHINESE + with_finding) == entities(ENGLISH + FINDING)
    assert entities(CHINESE + "其内未见局灶性病变。") == entities(
        ENGLISH + "No focal lesion is seen within it."
    )
    assert parse_caption(CHINESE + with_finding).target_diag == with_finding


def load_builder():
    """Import the script that builds the sample set."""
    path = ROOT / "data" / "build_sample.py"
    if not path.exists():
        pytest.skip("data/build_sample.py is not here")
    spec = importlib.util.spec_from_file_location("build_sample", path)
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    return builder


# The names of the segmentation that come with a side.
PAIRED = (
    "kidney",
    "adrenal_gland",
    "lung_upper_lobe",
    "lung_lower_lobe",
    "subclavian_artery",
    "humerus",
    "scapula",
    "brachiocephalic_vein",
    "clavicula",
    "autochthon",
    "iliopsoas",
    "rib",
)


def structures_of(builder):
    """List (name, Chinese name, kind) of every structure that the sample set describes."""
    endings = {"lung_middle_lobe": ["_right"], "atrial_appendage": ["_left"]}
    endings |= dict.fromkeys(PAIRED, ["_left", "_right"])
    structures = []
    for name in builder.STRUCTURES:
        for ending in endings.get(name, [""]):
            structures.append(builder.describe_structure(name + ending))
    return structures


def in_millimetres(facts, diameter):
    """Say a finding and its size as other people's captions do, in English and in Chinese."""
    return (
        f"Within it lies a {facts['finding']} of about {diameter} mm, "
        f"in its {facts['finding_place']} part.",
        f"其内可见一个约{diameter}毫米的{facts['finding_zh']}，位于其{facts['finding_place_zh']}。",
    )


def test_every_caption_the_sample_can_hold():
    builder = load_builder()
    structures = structures_of(builder)
    findings = [None, *itertools.chain.from_iterable(builder.FINDINGS.values())]
    # every structure once, and the other facts in turn beside it
    facts_in_turn = zip(
        structures,
        itertools.cycle(builder.PLACES),
        itertools.cycle(builder.LEVELS),
        itertools.cycle(builder.DENSITIES),
        itertools.cycle(findings),
        itertools.cycle(builder.WINDOWS),
        itertools.cycle(builder.SIZES),
        strict=False,
    )
    for i, (own, place, level, density, finding, window, size) in enumerate(facts_in_turn):
        neighbours = [structures[i - 1], structures[i - 2]]
        inside = builder.PLACES[(5 * i) % 9]
        share, share_zh = builder.share_words(i % 50 / 100)
        facts = {
            "level": level[1],
            "level_zh": level[2],
            "window": window,
            "window_zh": builder.WINDOWS[window][1],
            "structure": own[0],
            "structure_zh": own[1],
            "place": place[0],
            "place_zh": place[1],
            "share": share,
            "share_zh": share_zh,
            "density": density[1],
            "density_zh": density[2],
            "neighbours": [neighbour[0] for neighbour in neighbours],
            "neighbours_zh": [neighbour[1] for neighbour in neighbours],
            "finding_judged": True,
            "finding_size": size[1],
            "finding_size_zh": size[2],
            "finding": finding and finding[0],
            "finding_zh": finding and finding[1],
            "finding_place": inside[0],
            "finding_place_zh": inside[1],
        }
        english, chinese = builder.write_captions(facts)
        assert entities(english) == entities(chinese), (english, chinese)
        got = dataclasses.asdict(parse_caption(english))
        same = ["level", "window", "structure", "place", "density", "neighbours", "finding"]
        for name in same:
            assert got[name] == facts[name], (name, english)
        assert got["negated"] == ([] if finding else ["lesion"])
        unjudged, unjudged_zh = builder.write_captions(facts | {"finding_judged": False})
        assert entities(unjudged) == entities(unjudged_zh)
        got = parse_caption(unjudged)
        assert (got.finding, got.findings, got.negated, got.size_mm) == (None, [], [], None)
        if not finding:
            continue
        # the share of the region's width is no size in millimetres, nor one of the picture's area
        got = parse_caption(english)
        assert (got.size_mm, got.finding_place) == (None, inside[0])
        assert got.area_share == parse_caption(unjudged).area_share

        measured, measured_zh = in_millimetres(facts, 7 + i)
        assert entities(f"{unjudged} {measured}") == entities(unjudged_zh + measured_zh)
        got = parse_caption(f"{unjudged} {measured}")
        assert (got.finding, got.size_mm, got.finding_place) == (finding[0], 7 + i, inside[0])


# By id, so that no real text is copied here: asserted and denied findings as a person reads them.
REAL_FINDINGS = {
    "cxr-3a770491358d": ([], ["consolidation"]),
    "cxr-02fbf36ab23f": (["air bronchogram", "aspiration pneumonia", "consolidation"], []),
    "cxr-a3990c6fec05": (["consolidation"], ["infection"]),
    "cxr-34f65816c686": (["opacity", "pleural effusion"], []),
    "cxr-fa27b61b73bd": ([], ["atelectasis", "consolidation", "pleural effusion"]),
    "cxr-b57f387fc6a7": (["air bronchogram", "opacity", "pneumomediastinum"], []),
    "cxr-5211b3148ac0": (["opacity", "pneumomediastinum", "pneumothorax"], ["pleural effusion"]),
    "cxr-55adbc28e1a5": (["opacity"], ["pleural effusion"]),
    "cxr-15b28c96cfc0": (["cardiomegaly", "consolidation"], []),
    "cxr-0a2bc25ed520": (["ground-glass opacity"], []),
    "cxr-56302431ce9e": (["consolidation"], []),
    "cxr-d920d08a4d98": (["COVID-19", "ground-glass opacity", "opacity"], []),
    "cxr-8238e0d5e11c": (["consolidation"], ["pleural effusion"]),
    "cxr-3eb2d5599fff": (["opacity", "pectus excavatum"], ["pneumonia"]),
}


def test_real_case_notes(real):
    import pyarrow.parquet as pq

    parsed = {}
    for row in pq.read_table(real / "cxr.parquet", columns=["id", "caption"]).to_pylist():
        parsed[row["id"]] = parse_caption(row["caption"])
    for name, (asserted, denied) in REAL_FINDINGS.items():
        assert sorted(parsed[name].findings) == asserted, name
        assert sorted(parsed[name].negated) == denied, name
    # no picture has a region here, so no place may be made up
    assert all(caption.place is None for caption in parsed.values())
    say_something = [c for c in parsed.values() if c.finding is not None or c.negated]
    assert len(say_something) >= 50


@pytest.mark.parametrize(
    ("text", "asserted", "denied"),
    [
        (
            "No evidence of fracture, dislocation, or effusion.",
            set(),
            {"fracture", "dislocation", "effusion"},
        ),
        ("Fracture without dislocation.", {"fracture"}, {"dislocation"}),
        ("There is no nodule, but a mass is seen.", {"mass"}, {"nodule"}),
        ("There is no effusion, the heart is enlarged.", {"cardiomegaly"}, {"effusion"}),
        ("Neither a fracture nor a mass is present.", set(), {"fracture", "mass"}),
        ("The mass is no longer seen. A fracture is ruled out.", set(), {"mass", "fracture"}),
        ("Pneumothorax is not identified, effusion is present.", {"effusion"}, {"pneumothorax"}),
        ("A mass cannot be excluded.", {"mass"}, set()),
        ("No doubt a fracture. Not only a cyst.", {"fracture", "cyst"}, set()),
        ("No significant change of the nodule.", {"nodule"}, set()),
        ("No regression of the mass.", {"mass"}, set()),
        ("A non-calcified nodule.", {"nodule", "calcification"}, set()),
        ("未见骨折及脱位，可见肿块。", {"mass"}, {"fracture", "dislocation"}),
        ("无明显积液，但见结节。", {"nodule"}, {"effusion"}),
        ("不能排除肿瘤，无法排除转移。", {"tumor", "metastasis"}, set()),
        ("骨折可排除，没有气胸。", {"fracture"}, {"pneumothorax"}),
        ("病灶无明显变化。", {"lesion"}, set()),
    ],
)
def test_negation_is_scoped_by_clause(text, asserted, denied):
    findings = {False: set(), True: set()}
    for kind, value, negated in entities(text):
        if kind == "finding":
            findings[negated].add(value)
    assert findings[False] == asserted
    assert findings[True] == denied


def test_negated_structures():
    assert ("structure", "gallbladder", True) in entities("The gallbladder is not visualized.")
    assert ("structure", "left kidney", True) in entities("No left kidney.") & entities(
        "左肾缺如。"
    )
    assert ("structure", "left kidney", False) in entities(
        "No mass in the left kidney."
    ) & entities("左肾未见肿块。")


def test_sides_and_longest_match():
    def structures(text):
        return {v for k, v, _ in entities(text) if k == "structure"}

    assert structures("the left kidney") == structures("左侧肾脏") == {"left kidney"}
    assert structures("the left adrenal gland") == structures("左肾上腺") == {"left adrenal gland"}
    left_upper_lobe = {"left upper lobe of the lung"}
    assert structures("upper lobe of the left lung") == structures("左肺上叶") == left_upper_lobe
    lobes = {"right middle lobe of the lung", "right lower lobe of the lung"}
    assert structures("right middle and lower lobes") == structures("右肺中叶及右肺下叶") == lobes
    assert structures("left lower zone") == {"left lung"}
    both_lungs = {("structure", "lung", False), ("side", "bilateral", False)}
    assert entities("both lungs") == entities("双肺") == both_lungs
    assert {v for k, v, _ in entities("right pleural effusion") if k == "side"} == {"right"}
    assert not [e for e in entities("It is in the upper left of the image.") if e[0] == "side"]
    assert not structures("A frontal chest radiograph.")
    assert parse_caption("Both kidneys are normal. A mass in the spleen.").side is None
    assert parse_caption("左下肺炎。").findings == ["pneumonia"]


def test_area_and_size():
    assert parse_caption("It covers less than 1% of its area.").area_share == 0.01
    assert entities("It covers less than 1% of its area.") == {("area", "<1%", False)}
    assert entities("占图像面积不足1%。") == {("area", "<1%", False)}
    assert parse_caption("It occupies 400% of the area.").area_share is None
    assert parse_caption("Survival was 40%.").area_share is None
    assert parse_caption("a nodule of 1.4 cm").size_mm == 14
    assert parse_caption("1.4厘米的结节").size_mm == 14


def test_clinical_diagnosis_tips():
    text = (
        "Modality: CT\nOrgan: liver\n**Clinical Diagnosis Tips**: Think of a cyst.\n"
        "Advice: repeat the scan"
    )
    assert parse_caption(text).target_diag == "Think of a cyst."
    assert parse_caption("临床诊断提示：考虑肝囊肿。").target_diag == "考虑肝囊肿。"
    assert parse_caption("A CT scan of the liver.").target_diag is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("", "en"),
        ("12.5 %", "en"),
        ("spleen", "en"),
        ("脾脏", "zh"),
        ("CT显示脾脏", "zh"),
        ("脾 left kidney", "en"),
    ],
)
def test_language(text, language):
    assert detect_language(text) == language


def words_of(kind):
    """Yield (name, word) for every word of a kind, the name itself included."""
    for name, others in TERMS[kind].items():
        for word in [name, *others]:
            yield name, word


@pytest.mark.parametrize("kind", [kind for kind in TERMS if kind != "ignore"])
def test_every_word_of_the_table_is_found_under_its_own_name(kind):
    for name, word in words_of(kind):
        found = {(k, value) for k, value, _ in entities(f"({word.replace('*', '')})")}
        found_as = "structure" if kind == "paired" else kind
        assert (found_as, name.removesuffix(" window")) in found, word


def test_every_finding_can_be_denied():
    for name, word in words_of("finding"):
        if word.isascii() and "*" not in word:
            assert ("finding", name, True) in entities(f"There is no evidence of {word}."), word
        elif not word.isascii():
            assert ("finding", name, True) in entities(f"未见{word}。"), word


ALL_WORDS = [word for kind in TERMS for _, word in words_of(kind)]
BETWEEN = [
    *"，。、；左右上下无未",
    "no",
    "not",
    "without",
    "left",
    "right",
    "is not seen",
    ",",
    ".",
    "of the image",
    "in its",
    "4%",
    "14 mm",
    "\n",
]
WORD_SALAD = st.lists(st.sampled_from(ALL_WORDS + BETWEEN)).map(" ".join)


@given(st.one_of(st.text(st.characters(codec=None)), WORD_SALAD))
def test_any_string_is_read(text):
    found = entities(text)
    caption = parse_caption(text)
    assert all(isinstance(value, str) and value for _, value, _ in found)
    assert all(isinstance(negated, bool) for _, _, negated in found)
    assert caption.place is None or caption.place in PLACES
    assert caption.area_share is None or 0 <= caption.area_share <= 1
    assert caption.language == detect_language(text)
    fields = {("finding", value, False) for value in caption.findings}
    fields |= {("finding", value, True) for value in caption.negated}
    assert fields == {entity for entity in found if entity[0] == "finding"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "word", ["no mass but ", "left ", "upper, ", "tips:\n", "与胃", "4% ", "\n", "word "]
)
def test_very_long_texts_take_linear_time(word):
    assert parse_caption(word * 20_000).language in ("en", "zh")


@pytest.mark.parametrize("wrong", [None, 3, ["a caption"], b"bytes"])
def test_not_text(wrong):
    with pytest.raises(ValueError, match="a caption must be text, not"):
        entities(wrong)
    with pytest.raises(ValueError, match="a caption must be text, not"):
        parse_caption(wrong)


def modules_after(code):
    """Run code in a fresh Python; returns which of three packages it has loaded."""
    code += "\nimport sys; print(*{'openai', 'pydantic', 'tqdm'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_nothing_heavy_is_imported():
    rules = str(Path(captions.__file__).with_name("rules.py"))
    assert modules_after(f"import runpy; runpy.run_path({rules!r})") == set()
    assert "openai" not in modules_after("import medtune.captions")


def test_what_says_nothing_has_no_fields():
    assert parse_caption("") == Caption(None, None, None, language="en")
