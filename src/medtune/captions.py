"""Fields, entities, negation and language of medical captions, English and Chinese; a local LLM only when asked.

Rules come first: `TERMS` lists the words that are known. `extract_with_llm` and `translate` ask an OpenAI-compatible
endpoint such as Ollama's, and only one that the caller names.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# kind -> "name: other words for it; ...". The name is a word too, * stands for any ending; the longest word wins.
# Case, plural s, hyphens and British spelling do not matter. What is "paired" may have a side: "left kidney", 左肾.
TERMS = {
    "modality": """CT: computed tomography, cat scan, 计算机断层, 电脑断层; MRI: mr, magnetic resonance, 磁共振; PET:
    positron emission tomography; X-ray: xray, radiograph*, cxr, plain film, x光, x线, 平片, 胸片; ultrasound: ultraso*,
    sonogra*, doppler, 超声; OCT: optical coherence tomography; histopathology: histolog*, histopatholog*, h&e,
    hematoxylin, microscop*, 病理, 组织学; mammography: mammogra*, 钼靶; dermoscopy: dermoscop*, 皮肤镜; angiography:
    angiogra*, 血管造影; endoscopy: endoscop*, colonoscop*, 内镜, 胃镜, 肠镜; fundus photography: fundus photo*, fundus
    image, 眼底""",
    "view": """axial: transverse, 轴位, 横断面; coronal: 冠状; sagittal: 矢状; PA: posteroanterior, postero anterior,
    后前位; AP: anteroposterior, antero posterior, 前后位; lateral view: lateral projection, lateral film, 侧位""",
    "window": """soft tissue window: 软组织窗; lung window: 肺窗; bone window: 骨窗; brain window: 脑窗; mediastinal
    window: 纵隔窗""",
    "level": """upper abdomen: 上腹; middle abdomen: 中腹; lower abdomen: 下腹; abdomen: abdominal, abdominal cavity,
    腹部, 腹腔; pelvis: pelvic, 盆腔, 骨盆; upper chest: 上胸部; middle chest: 中胸部; lower chest: 下胸部; chest:
    thorax, thoracic, thoracic cavity, 胸部, 胸腔; lower neck: 颈下部; neck: 颈部; head: 头部, 头颅""",
    "density": """air density: gas density, 气体密度; fat density: 脂肪密度; fluid density: water density, 液体密度,
    水样密度; bone density: 骨密度; soft tissue density: 软组织密度; very high density: 极高密度; high density:
    increased density, higher density, hyperdens*, hyperattenuat*, 高密度, 密度增高; low density: decreased density,
    lower density, hypodens*, hypoattenuat*, 低密度, 密度减低; high signal: hyperintens*, increased signal, 高信号; low
    signal: hypointens*, decreased signal, 低信号; hypoechoic: 低回声; hyperechoic: echogenic, 高回声, 强回声; anechoic:
    无回声""",
    "paired": """kidney: renal, 肾; adrenal gland: adrenal, 肾上腺; lung: pulmonary, lung field, 肺野, 肺; hilum: hilar,
    hila, 肺门; rib: 肋骨; upper lobe of the lung: upper lobe, upper lung lobe, 肺上叶, 上叶; lower lobe of the lung:
    lower lobe, lower lung lobe, 肺下叶, 下叶; diaphragm: hemidiaphragm, 膈; pleura: pleural, 胸膜; heart border:
    cardiac border, 心缘; costophrenic angle: costophrenic*, 肋膈角; subclavian artery: 锁骨下动脉; common carotid
    artery: carotid, carotid artery, 颈总动脉, 颈动脉; brachiocephalic vein: innominate vein, 头臂静脉; iliac artery:
    common iliac artery, 髂动脉; iliac vein: common iliac vein, iliac vena, 髂静脉; humerus: 肱骨; scapula: 肩胛骨;
    clavicle: clavicula, 锁骨; hip bone: hip, 髋骨; deep back muscles: deep back muscle, autochthon*, 背部深层肌,
    竖脊肌; iliopsoas muscle: iliopsoas, psoas, psoas muscle, 髂腰肌, 腰大肌; gluteus: gluteal, 臀肌; femur: femoral,
    femoral head, femoral neck, 股骨; tibia: 胫骨; radius: 桡骨; knee: 膝; ovary: ovar*, 卵巢; eye: orbit*, 眼球;
    cerebral hemisphere: 大脑半球; frontal lobe: frontal region, 额叶; temporal lobe: temporal region, 颞叶; parietal
    lobe: parietal region, 顶叶; breast: mammary, 乳腺; occipital lobe: occipital region, 枕叶; basal ganglia: 基底节;
    thalamus: 丘脑; lateral ventricle: 侧脑室""",
    "structure": """spleen: splenic, 脾; gallbladder: gall bladder, 胆囊; liver: hepatic, 肝; stomach: gastric, 胃;
    duodenum: duoden*, 十二指肠; pancreas: pancrea*, head of the pancreas, 胰; esophagus: esophag*, 食管; trachea:
    tracheal, 气管; thyroid gland: thyroid, 甲状腺; bronchus: bronch*, 支气管; right middle lobe of the lung: middle
    lobe of the lung, middle lobe, 右肺中叶, 肺中叶, 中叶; small bowel: small intestin*, bowel, 小肠; colon: colonic,
    large bowel, 结肠; rectum: rectal, 直肠; urinary bladder: bladder, 膀胱; prostate: prostat*, 前列腺; uterus:
    uterine, 子宫; vertebra: vertebra*, spine, spinal, lumbar spine, thoracic spine, cervical spine, 椎骨, 椎体, 脊柱,
    胸椎, 腰椎, 颈椎; spinal cord: 脊髓; sternum: 胸骨; costal cartilage: 肋软骨; sacrum: 骶骨; heart: cardiac, cardiac
    silhouette, 心脏, 心影; left atrial appendage: atrial appendage, 左心耳, 心耳; aorta: aortic, abdominal aorta,
    thoracic aorta, 主动脉; pulmonary vein: 肺静脉; pulmonary artery: pulmonary arter*, 肺动脉; brachiocephalic trunk:
    头臂干; superior vena cava: svc, 上腔静脉; inferior vena cava: ivc, 下腔静脉; skin: 皮肤; brain: cerebral, cerebrum,
    intracranial, 颅内, 颅脑, 脑; portal and splenic vein: portal vein and splenic vein, portal vein, 门静脉和脾静脉,
    门静脉; skull: cranial, 颅骨; cerebellum: cerebell*, 小脑; brainstem: brain stem, 脑干; brain ventricle: ventricle,
    ventricular, 脑室; mediastinum: mediastinal, 纵隔; lymph node: 淋巴结; bone: bony, 骨骼; retina: retinal, 视网膜;
    macula: macular, 黄斑; chest wall: 胸壁; pituitary gland: pituitary, 垂体""",
    "zone": """upper zone: 上肺野, 上野; mid zone: middle zone, 中肺野, 中野; lower zone: lower field, 下肺野, 下野;
    apical: apex, apices, 肺尖; basal: basilar, bibasilar, base, 肺底; perihilar: 肺门周围; peripheral: peripheral*,
    periphery, 外周, 外带; subpleural: 胸膜下; lingula: lingula*, 舌段""",
    "finding": """hemorrhage: hemorrhag*, bleed*, hematoma, 出血, 血肿; subarachnoid hemorrhage: 蛛网膜下腔出血;
    intraventricular hemorrhage: 脑室出血; intracranial hemorrhage: brain hemorrhage, cerebral hemorrhage, intracerebral
    hemorrhage, 颅内出血, 脑出血; intraparenchymal hemorrhage: 脑实质出血; subdural hemorrhage: subdural hematoma,
    硬膜下血肿, 硬膜下出血; epidural hemorrhage: epidural hematoma, extradural hematoma, 硬膜外血肿; hypodense lesion:
    hypodense area, hypoattenuating lesion, low density lesion, 低密度灶; hyperdense lesion: hyperdense area, high
    density lesion, 高密度灶; sclerotic lesion: 成骨性病灶; lytic lesion: osteolytic lesion, 溶骨性病灶; solid nodule:
    实性结节; nodule: nodular, 结节; cyst: cystic, 囊肿, 囊性; mass effect: 占位效应; mass: space occupying lesion,
    肿块, 肿物, 占位; tumor: neoplas*, 肿瘤; cancer: malignan*, malignant tumor, carcinoma, adenocarcinoma, breast
    cancer, lung cancer, 恶性, 恶性肿瘤, 癌, 肺癌, 肝癌, 乳腺癌; metastasis: metasta*, 转移; glioma: glioblastoma,
    胶质瘤; meningioma: 脑膜瘤; lymphoma: 淋巴瘤; adenoma: 腺瘤; hemangioma: 血管瘤; polyp: 息肉; melanoma: 黑色素瘤;
    dysplasia: dysplastic, atypia, 异型; opacity: opaci*, air space opaci*, airspace opaci*, air space, shadowing,
    斑片影, 模糊影, 阴影; ground-glass opacity: ground glass, ground glass opaci*, 磨玻璃影, 磨玻璃; consolidation:
    consolidat*, 实变; infiltrate: infiltrat*, 浸润; pneumonia: pneumonic, 肺炎; aspiration pneumonia: aspiration,
    吸入性肺炎; tuberculosis: 结核; infection: infectious, 感染; abscess: 脓肿; COVID-19: covid, covid 19 pneumonia,
    covid 19 infection, 新冠, 新冠肺炎; inflammation: inflammatory, 炎症, 炎性; ascites: 腹水, 腹腔积液; pleural
    effusion: 胸腔积液; pericardial effusion: 心包积液; effusion: fluid collection, free fluid, 积液; pneumothorax:
    气胸; pneumoperitoneum: free air, 气腹; pneumomediastinum: 纵隔气肿; atelectasis: atelecta*, collapse*, 肺不张;
    emphysema: 肺气肿; bronchiectasis: 支气管扩张; air bronchogram: 支气管充气征; fibrosis: fibrotic, 纤维化;
    pneumatocele: 肺气囊; lucency: hyperlucent, 透亮; pectus excavatum: 漏斗胸; interstitial changes: interstitial,
    间质性; cavity: cavitation, cavitary, 空洞; pulmonary edema: 肺水肿; edema: swelling, 水肿, 肿胀; cardiomegaly:
    enlarged heart, heart is enlarged, enlarged cardiac silhouette, 心影增大, 心脏增大; calcification: calcif*,
    microcalcif*, 钙化; lymphadenopathy: adenopath*, enlarged lymph node, 淋巴结肿大; tracheal deviation: 气管移位;
    midline shift: 中线移位; hydrocephalus: 脑积水; hydronephrosis: 肾积水; glaucoma: 青光眼; arthritis: osteoarthritis,
    关节炎; displacement: displac*, shift, 移位; compression: compress*, 受压, 压迫; raised intracranial pressure:
    increased intracranial pressure, 颅内压增高; infarct: infarct*, ischemi*, stroke, 梗死, 缺血; atrophy: 萎缩;
    aneurysm: microaneurysm, 动脉瘤; dissection: 夹层; thrombosis: thromb*, 血栓; pulmonary embolism: 肺栓塞; stenosis:
    narrowing, 狭窄, 变窄; dilation: dilat*, 扩张; enlargement: enlarg*, prominence, 增大, 肿大; thickening: thicken*,
    增厚; hernia: herniat*, 疝; stone: calcul*, gallstone, 结石; fracture: fractur*, compression fracture, 骨折;
    dislocation: dislocat*, 脱位; degeneration: degenerati*, 退行性; ulcer: ulcerat*, 溃疡; osteophyte: 骨赘, 骨质增生;
    disc herniation: herniated disc, 椎间盘突出; fatty liver: steatosis, 脂肪肝; cirrhosis: cirrhotic, 肝硬化; necrosis:
    necrotic, 坏死; exudate: exudat*, 渗出; diabetic retinopathy: 糖尿病视网膜病变; lesion: 病灶, 病变; abnormality:
    abnormal*, patholog*, 异常""",
    "change": """improved: improve*, regress*, 好转, 吸收; worse: worsen*, progress*, deteriorat*, 进展, 加重;
    unchanged: stable, unaltered, no change, no significant change, persist*, 无明显变化, 未见明显变化""",
    "device": """endotracheal tube: ett, endotracheal, 气管插管; nasogastric tube: ng tube, nasogastric, 胃管; chest
    drain: chest tube, intercostal drain, 引流管; central venous catheter: central line, 中心静脉导管; pacemaker:
    起搏器; stent: 支架; surgical clip: 手术夹; medical device: device, 医疗器械, 医疗设备""",
    "ignore": """mass like; high resolution; soft tissue: 软组织; region of interest; acoustic shadowing""",
}
PLACES = ("upper left", "upper middle", "upper right", "middle left", "center", "middle right",
          "lower left", "lower middle", "lower right")  # fmt: skip
GENERIC = ("lesion", "abnormality")  # left out where a finding of the same polarity has a name of its own
_SIDES = {"left": "left", "right": "right", "左": "left", "右": "right"}  # every other word for a side: bilateral

# One spelling and one order of words, applied in turn to a sentence in lower case, so that the terms stay short.
_V, _S = "(upper|middle|mid|lower)", "(left|right|bilateral|both)"
_REWRITES = [(re.compile(old), new) for old, new in (
    (r"(?<=[a-z0-9])[-‐-―](?=[a-z0-9])", " "), ("haem", "hem"), ("oe(?=dem|soph)", "e"), ("centre", "center"),
    ("(?:(?<=tum)|(?<=neighb))our", "or"), (r"\s+", " "), ("(?<=密度)(?:病灶|病变|影)", "灶"),
    (r"\b(?:left (?:and|or) right|right (?:and|or) left)\b", "bilateral"),
    (rf"\b{_V} {_S} (?=lobe|zone|lung)", r"\2 \1 "),
    (rf"\b((?:{_S} )?){_V} (?:and|to|or) {_V} (lobe|zone|lung)s?", r"\1\3 \5 and \1\4 \5"),
    (rf"\b{_V} (lobe|zone|field)s? of (?:the )?{_S} lungs?", r"\3 \1 \2"),
    (rf"\b{_S} {_V} (?:(?:lung|pulmonary) )?(?:zone|field|lung)s?\b(?! lobe)", r"\1 lung \2 zone"),
    ("([左右双两]侧?)([上中下])肺(?![叶炎癌])", r"\1肺\2野"),
)]  # fmt: skip
_W = r"(?:upper|lower|top|bottom|left|right|middle|mid|center|central|centrally)"
_LINK = r"(?:[ ,]+(?:and|to|in|at|on|the|horizontally|vertically|slightly|side|area|part|portion|region))*[ ,]+"
_PART = r" (?:part|portion|side|corner|area|region|section|third|half|aspect|edge)\b"
_OF = r" of (?:the|this) (?:\w+ ){0,2}?(?:image|picture|frame|scan|slice|view|photo\w*|radiograph|x ray|brain)\b"
_END = r"(?= ?[.,;:)]| (?:and )?(?:is|which|that|it|occup|cover|show|exhibit|appear|contain)|\s*$)"
_ZH1, _ZH = "[左右上下中]", "左上|右上|左下|右下|左中|右中|上中|中上|下中|中下|中央|中心|中间|正中"
_PLACE_RULES = [(kind, re.compile(rule)) for kind, rule in (
    ("finding place", rf"\bin its ({_W}(?:{_LINK}{_W}){{0,3}})(?:{_PART}|(?<=center)\b)"),
    ("finding place", f"其({_ZH}|{_ZH1}(?=[部侧方]))"),
    ("place", rf"\b({_W}(?:{_LINK}{_W}){{0,5}})(?:{_PART})?{_OF}"),
    ("place", rf"\b({_W}(?:{_LINK}{_W}){{1,5}}|(?<=the )center|centrally)(?:{_PART})?{_END}"),
    ("place", f"(?:图像?|图片|画面|影像|视野)的?({_ZH}|{_ZH1}(?=[部侧方角边]))"), ("place", f"[位处]于({_ZH})"),
)]  # fmt: skip
_AREA = re.compile(r"(less than |under |below |不足|不到|小于|< ?)?(\d+(?:\.\d+)?) ?(?:%|percent|per cent)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?: ?[x×*] ?(\d+(?:\.\d+)?))? ?(mm|millimet|毫米|cm|centimet|厘米)")
_BESIDE = re.compile(
    r"\b(?:bordered by|borders|adjacent to|next to|neighboring|abut(?:s|ting)|beside|surrounded by)\b[^.;]{0,200}?"
    r"(?=[.;]| and (?:is|has|it|shows)\b|, (?:which|and it)\b|$)|\bsurrounding .{1,14}|周围[^型].{0,3}"
    r"|与[^,。;]{1,60}?(?:相邻|毗邻|邻接)|(?:毗邻|紧邻|邻近)[^,。;]+")
_ADVICE = re.compile(
    r"\brecommend|\badvis(?:ed|able)\b|\bshould be\b|clinical correlation|(?:further|additional) \w+ (?:is|are|may be) "
    r"(?:need|requir|necess|suggest|indicat|warrant)|\bwarrants?\b|建议|推荐|请结合|必要时|需进一步|应进一步")
_RELATION = re.compile(
    "related|relation|border|adjacent|next to|neighbo|abut|compress|displac|mass effect|pressure|invad|surround|extend"
    "|affect|due to|associat|secondary|caus|effac|obscur|关系|相邻|毗邻|邻近|压迫|推移|受压|侵犯|周围|累及|占位效应")
_NO = re.compile(
    r"\b(?:no(?! doubt\b| longer\b)|not(?! only\b| necessarily\b| (?:be )?(?:exclud|rul))|without|absence of|absent|nor"
    r"|negative for|free of|clear of|lack(?:s|ing)?|neither|never|fail(?:s|ed)? to|rule[sd] out|rather than"
    r"|(?<!partial )resolution of)\b|未[见发显探检提]|没有|不伴|无(?![法关创])|(?<![能法以待需未])排除")
_NOT_SEEN = re.compile(
    r"\b(?:is|are|was|were|been) (?:not|no longer) (?:\w+ ){0,2}?(?:seen|visible|visuali[sz]ed|identified|detected"
    r"|noted|present|evident|demonstrated|observed|found)\b|\b(?:is|are|was|were) (?:absent|ruled out|excluded|gone)\b"
    r"|\b(?:has|have) (?:\w+ )?(?:resolved|disappeared)\b|(?:缺如|未显示|未见(?:显示)?|已?消失)(?=[,。;]|$)")
_EDGE = re.compile(  # where a negation ends: a list goes on after a comma, a new statement does not
    r"[.;:()!?。]|,(?= ?[\u4e00-\u9fff]|(?: and| but)? (?:the|there|it|its|this|these|that|with|which|where|an? [a-z ]"
    r"{1,40} (?:is|are|was|were))\b)|\b(?:but|however|although|though|except|while|whereas|yet|despite|due to|because"
    r"|and the(?:re)?|which)\b|但|然而|伴有|仅见|可见")
_WITHIN = re.compile(r"\b(?:in|of|within|at|on|to|from|over|near|around) (?:the |both )?$")
_ROI = re.compile(r"region of interest|\broi\b|\bframe|\bbox\b|inside it|感兴趣区|方框|绿框|框内", re.I)
_TIPS = re.compile(r"(?:tips?|诊断提示)[*\s]*[:：](.+?)(?=\n\W*\w[^\n:：]{1,40}[:：]|\n\s*\n|\Z)", re.I | re.S)
_LANGUAGES = {"en": "English", "zh": "Chinese (简体中文)"}
_EXTRACT = (
    "Read the medical caption and answer with one JSON object of the schema. Use only what it says, else null. place is"
    f" one of {', '.join(PLACES)}; area_share is 0..1; negated lists the findings said to be absent; target_diag is the"
    " words that carry the diagnosis.")
_Entity = tuple[str, str, bool]


def detect_language(text: str) -> str:
    """Return "zh" when Chinese characters outnumber Latin words, else (empty text too) "en".

    Examples
    --------
    >>> detect_language("轴位CT图像"), detect_language("The spleen (脾脏)."), detect_language("")
    ('zh', 'en', 'en')
    """
    return "zh" if len(re.findall("[\u3400-\u9fff\uf900-\ufaff]", text)) > len(re.findall("[A-Za-z]+", text)) else "en"


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    for old, new in _REWRITES:
        text = old.sub(new, text)
    return text.strip()


@functools.cache
def _matcher() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    entries = [(kind, entry.partition(":")) for kind, block in TERMS.items() for entry in block.split(";")]
    words = {_normalise(w): (k, " ".join(n.split())) for k, (n, _, others) in entries for w in (n, *others.split(","))}
    words = {w: words[w] for w in sorted(words, key=lambda w: (w[:1], -len(w))) if w}  # the longest first

    def any_of(latin: bool) -> str:  # grouped by first letter, because `re` tries alternatives in turn
        groups = itertools.groupby((w for w in words if w.isascii() == latin), key=lambda w: w[0])
        return "|".join(f"{c}(?:{'|'.join(re.escape(w[1:]) for w in g)})" for c, g in groups).replace(r"\*", "[a-z]*")

    return re.compile(
        rf"(?<![a-z0-9])(?:(left|right|bilateral|both)(?: sided)? (?:the )?)?({any_of(True)})(?:e?s)?(?![a-z0-9])"
        rf"|(?:([左右双两])侧?的?)?({any_of(False)})"
    ), words


def _place(words: str) -> str | None:
    up, down, left, right = (bool(re.search(w, words)) for w in ("up|top|上", "low|bottom|下", "left|左", "right|右"))
    return None if up and down or left and right else PLACES[3 * (1 - up + down) + 1 - left + right]


def _find(sentence: str) -> list[_Entity]:
    text = _normalise(sentence)
    hits: list[tuple[int, str, str, str | None]] = []  # start, kind, value, side
    for kind, rule in _PLACE_RULES:
        for m in list(rule.finditer(text)):
            if place := _place(m[1]):
                hits.append((m.start(), kind, place, None))
                text = text[: m.start()] + " " * len(m[0]) + text[m.end() :]  # its left is not the patient's
    for m in _AREA.finditer(text):
        near = text[max(0, m.start() - 60) : m.end() + 40]
        if float(m[2]) <= 100 and re.search("area|occup|account|cover|image|占|面积", near):
            hits.append((m.start(), "area", f"{'<' if m[1] else ''}{float(m[2]):g}%", None))
    for m in _SIZE.finditer(text):
        mm = max(float(m[1]), float(m[2] or 0)) * (10 if m[3] in ("cm", "centimet", "厘米") else 1)
        hits.append((m.start(), "size", f"{mm:g} mm", None))
    pattern, words = _matcher()
    beside, rest = [m.span() for m in _BESIDE.finditer(text)], text
    for m in pattern.finditer(text):
        rest = rest[: m.start()] + " " * len(m[0]) + rest[m.end() :]
        side, word = m[1] or m[3], m[2] or m[4]
        kind, value = words.get(word) or next(v for w, v in words.items() if w[-1] == "*" and word.startswith(w[:-1]))
        if kind == "paired":
            kind, value = "structure", f"{_SIDES[side]} {value}" if side in _SIDES else value
        elif value.startswith(("left ", "right ")):
            side = value.split()[0]
        if kind == "structure" and any(a <= m.start() < b for a, b in beside):
            kind, side = "neighbour", None
        if kind != "ignore":
            hits.append((m.start(), kind, value.removesuffix(" window"), side))
    for m in re.finditer(r"\b(?:left|right|bilateral(?:ly)?|both)\b|[左右]|[双两]侧", rest):
        hits.append((m.start(), "side", "", m[0]))
    hits.sort(key=lambda h: h[0])
    denied: set[int] = set()
    for start, end in itertools.pairwise([0, *(m.start() for m in _EDGE.finditer(rest)), len(rest) + 1]):
        gone, no = _NOT_SEEN.search(rest, start, end), _NO.search(rest, start, end)
        start, end = (start, gone.start()) if gone else (no.end(), end) if no else (0, 0)
        part = [h for h in hits if start <= h[0] < end]
        if part and part[0][1] == "change":  # "no regression of the mass": the mass stays
            part = part[:1]
        named = {h[0] for h in part if h[1] in ("finding", "device", "density", "change", "side")}
        denied |= named or {h[0] for h in part if h[1] == "structure" and not _WITHIN.search(text[: h[0]][-14:])}
    if advice := _ADVICE.search(text):  # what should be looked for has not been found
        hits = [h for h in hits if h[0] <= text.rfind(",", 0, advice.start())]
    found = [(kind, value, start in denied) for start, kind, value, _ in hits if kind != "side"]
    return found + [("side", _SIDES.get(side, "bilateral"), start in denied) for start, _, _, side in hits if side]


@functools.lru_cache(maxsize=8192)
def _analyse(text: str) -> tuple[tuple[str, list[_Entity]], ...]:
    sentences = re.split(r"(?<=[。！；;\n])|(?<=[.!?？])(?=\s)", text)
    pieces = [s[i : i + 2000] for s in sentences for i in range(0, len(s), 2000)]  # long ones would take too long
    return tuple((piece.strip(), _find(piece)) for piece in pieces)


def entities(text: str) -> set[tuple[str, str, bool]]:
    """Return what a caption names as (kind, value, negated), in the same English words for both languages.

    Kinds: modality, view, window, level, structure, neighbour, side (the patient's), zone (of the lung), place and
    finding place (of the 3x3 grid), area ("4%", "<1%"), size ("14 mm"), density, finding, change, device. `negated` is
    True for what is said to be absent. "May be a mass" counts as a mass; what advice names does not count. Takes any
    string; ValueError for anything else.

    Examples
    --------
    >>> found = entities("No pleural effusion. A 2 cm cyst in the left kidney.")
    >>> sorted(found)[:2], found == entities("左肾可见一个2厘米的囊肿。无胸腔积液。")
    ([('finding', 'cyst', False), ('finding', 'pleural effusion', True)], True)
    """
    if not isinstance(text, str):
        raise ValueError(f"a caption must be text, not {type(text).__name__}")
    found = {entity for _, named in _analyse(text) for entity in named}
    specific = {negated for kind, value, negated in found if kind == "finding" and value not in GENERIC}
    return {e for e in found if not (e[0] == "finding" and e[1] in GENERIC and e[2] in specific)}


@dataclass
class Caption:
    """The fields of one caption; None or an empty list where it does not say.

    `area_share` is 0..1 of the picture; `place` and `finding_place` are in `PLACES`; `side` is the patient's;
    `findings` are asserted, `finding` is the first, `negated` are said to be absent. The last three are sentences.
    """

    __pydantic_config__ = {"hide_input_in_errors": True}
    modality: str | None
    structure: str | None
    finding: str | None
    findings: list[str] = field(default_factory=list)
    negated: list[str] = field(default_factory=list)
    neighbours: list[str] = field(default_factory=list)
    level: str | None = None
    view: str | None = None
    window: str | None = None
    side: str | None = None
    place: str | None = None
    area_share: float | None = None
    density: str | None = None
    size_mm: float | None = None
    finding_place: str | None = None
    language: str | None = None
    relation: str | None = None
    advice: str | None = None
    target_diag: str | None = None


def parse_caption(text: str) -> Caption:
    """Read the fields of a caption by rules; takes any string, ValueError for anything else.

    `target_diag` is the text under "Clinical Diagnosis Tips" (临床诊断提示), else the sentences that assert a finding,
    else those that deny one.

    Examples
    --------
    >>> c = parse_caption("The region of interest, located in the upper left of the image, covers about 4% of its area "
    ...                   "and shows the left kidney. No focal lesion is seen within it.")
    >>> c.structure, c.place, c.area_share, c.finding, c.negated, c.target_diag
    ('left kidney', 'upper left', 0.04, None, ['lesion'], 'No focal lesion is seen within it.')
    """
    kept, sentences, language = entities(text), _analyse(text), detect_language(text)

    def values(kind: str, no: bool = False) -> list[str]:
        return list(dict.fromkeys(e[1] for _, named in sentences for e in named if e in kept and e[::2] == (kind, no)))

    def quote(sentences: Iterable[str]) -> str | None:
        return ("" if language == "zh" else " ").join(sentences) or None

    # The sentence about the region names the structure; else one with a finding; else the first that names any.
    order = sorted(sentences, key=lambda s: (not _ROI.search(s[0]), ("finding", False) not in [e[::2] for e in s[1]]))
    structure, near = next(((v, s) for _, s in order for k, v, n in s if k == "structure" and not n), (None, ()))
    sides = {v for k, v, n in near if k == "side" and not n} if structure else set(values("side"))
    sides = {s for s in _SIDES if structure and structure.startswith(s + " ")} or sides
    findings, negated, size, area = values("finding"), values("finding", True), values("size"), values("area")
    told, tips = {("finding", v, not findings) for v in findings or negated}, _TIPS.search(text)
    one = ("modality", "finding", "level", "view", "window", "place", "density", "finding_place")
    return Caption(
        **{k: next(iter(values(k.replace("_", " "))), None) for k in one}, structure=structure,
        findings=findings, negated=negated, neighbours=values("neighbour"), language=language,
        side=sides.pop() if len(sides) == 1 else "bilateral" if sides else None,
        area_share=float(area[0].strip("<%")) / 100 if area else None, size_mm=float(size[0][:-3]) if size else None,
        relation=quote(s for s, _ in sentences if _RELATION.search(s.lower())),
        advice=quote(s for s, _ in sentences if _ADVICE.search(s.lower())),
        target_diag=tips[1].strip() if tips else quote(s for s, found in sentences if told & set(found)),
    )  # fmt: skip


def _ask(
    texts: Sequence[str], task: str, check: Callable[[str, Any], object], form: type = str, *,
    base_url: str | None = None, model: str | None = None, api_key: str = "none", cache_dir: str | Path | None = None,
    timeout: float = 60.0, retries: int = 2, workers: int = 4, strict: bool = True,
) -> list:  # fmt: skip
    if not (model and base_url and base_url.startswith(("http://", "https://"))):
        raise ValueError("no LLM endpoint is configured: pass base_url, say 'http://localhost:11434/v1', and model")
    try:
        import openai
        from pydantic import TypeAdapter
    except ImportError as error:
        raise ImportError("asking an LLM needs two packages: pip install openai pydantic") from error
    from tqdm import tqdm

    client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries)
    adapter: Any = TypeAdapter(form)
    options: dict[str, Any] = {"model": model, "temperature": 0}
    if form is not str:
        schema = {"name": form.__name__, "schema": adapter.json_schema()}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    texts = [t.encode("utf-8", "replace").decode() for t in texts]

    def read(text: str, answer: str) -> object:
        json_part = answer[answer.find("{") : answer.rfind("}") + 1]
        return check(text, answer if form is str else adapter.validate_json(json_part))

    def ask(text: str) -> object:
        messages: Any = [{"role": "system", "content": task}, {"role": "user", "content": text}]
        path = Path(cache_dir or "", hashlib.sha256(json.dumps([messages, options]).encode()).hexdigest() + ".json")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: ask
            if cache_dir:
                return read(text, json.loads(path.read_text("utf-8"))["answer"])
        for _ in range(retries + 1):
            try:
                reply = client.chat.completions.create(messages=messages, **options)
                value = read(text, answer := str(reply.choices[0].message.content))
            except openai.APITimeoutError as error:
                raise TimeoutError(f"{base_url} did not answer within {timeout:g} s, {retries + 1} times") from error
            except openai.OpenAIError as error:
                raise OSError(f"{base_url}: {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")) from error
            except (ValueError, AttributeError, TypeError, IndexError) as error:  # nonsense: say why, ask again
                reason = " ".join(str(error).split())[:300]
                messages[2:] = [{"role": "user", "content": f"Your answer was refused: {reason}. Try again."}]
                continue
            if cache_dir:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as f:
                    json.dump({"model": model, "answer": answer}, f, ensure_ascii=False)
                os.replace(f.name, path)
            return value
        if strict:
            raise ValueError(f"text {texts.index(text)}: {model} was refused {retries + 1} times, at last for {reason}")
        return None

    todo = list(dict.fromkeys(texts))
    with ThreadPoolExecutor(workers) as pool:  # an error cancels what has not begun; what is answered is in the cache
        answers = dict(zip(todo, tqdm(pool.map(ask, todo), total=len(todo), disable=len(todo) < 2), strict=True))
    return [answers[t] for t in texts]


def extract_with_llm(texts: Sequence[str], **endpoint: Any) -> list[Caption | None]:
    """Let an LLM behind an OpenAI-compatible endpoint read the fields of captions; its answers are validated.

    Parameters
    ----------
    texts : sequence of str
        Captions; equal ones are asked once.
    base_url, model, api_key : str
        For Ollama "http://localhost:11434/v1" and, say, "qwen3:4b". Captions leave this machine if the URL does.
    cache_dir : path, optional
        One small JSON file per text: a second call asks only for what is missing. It holds answers: keep it safe.
    timeout, retries, workers, strict : float seconds, int, int, bool; default 60, 2, 4, True
        Retries when the endpoint fails or an answer is refused. Not strict: None where an answer stays wrong.

    Raises
    ------
    ValueError, OSError, ImportError
        No endpoint is configured or an answer stays wrong; the endpoint fails or is too slow; a package is missing.
    """

    def check(text: str, caption: Caption) -> Caption:
        if not 0 <= (caption.area_share or 0) <= 1 or caption.place not in (None, *PLACES):
            raise ValueError(f"area_share must be 0..1 and place null or one of {', '.join(PLACES)}")
        known: dict[str, Any] = {"language": detect_language(text)}
        for name in ("modality", "structure", "finding", "level", "view", "density"):  # in the words of the rules
            same = [v for k, v, _ in entities(getattr(caption, name) or "") if k == name]
            known |= {name: same[0]} if len(same) == 1 else {}
        return replace(caption, **known)

    return _ask(texts, _EXTRACT, check, Caption, **endpoint)


def translate(texts: Sequence[str], to: str = "zh", **endpoint: Any) -> list[str | None]:
    """Translate captions to "en" or "zh"; `endpoint` and errors as for `extract_with_llm`.

    An answer in the wrong language, without a number of the text, or with left and right swapped is refused.
    """
    if to not in _LANGUAGES:
        raise ValueError(f"cannot translate to {to!r}: choose en or zh")

    def check(text: str, answer: str) -> str:
        lost = set(re.findall(r"\d+(?:\.\d+)?", text)) - set(re.findall(r"\d+(?:\.\d+)?", answer))
        sides = [{v for k, v, _ in entities(t) if k == "side"} for t in (text, answer)]
        if detect_language(answer) != to or lost or sides in ([{"left"}, {"right"}], [{"right"}, {"left"}]):
            raise ValueError(f"answer in {_LANGUAGES[to]}, keep every number and every side")
        return answer.strip()

    return _ask(texts, f"Translate the caption into {_LANGUAGES[to]}. Answer with nothing else.", check, **endpoint)
