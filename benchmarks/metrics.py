"""Time `llamafactory_scores` against the library calls it equals, in the same process.

    python benchmarks/metrics.py --pairs 3232

The captions are drawn from clauses of the sample set's manner. --fresh makes every word of every
caption new, so that nothing can be remembered from one caption to the next: the worst case.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from medtune.scores import llamafactory_scores

ENGLISH = (
    "The image is a computed tomography (CT) scan of the {level} abdomen in axial view, shown with "
    "a soft tissue window. The region of interest, located in the {place} of the image, covers "
    "about {share}% of its area and shows the {a}. It has {kind} density and is bordered by the "
    "{b} and the {c}. Within it lies a {shape} {tone} lesion of about {mm} mm, in its {part} part, "
    "which differs from the surrounding tissue and may displace the {d}. The {e} appears normal in "
    "size and outline, and no free fluid is seen next to the {f}; correlation with earlier scans "
    "is advised."
)
CHINESE = (
    "图像为{level}腹部的轴位计算机断层扫描（CT），采用软组织窗显示。感兴趣区域位于图像的{place}，"
    "约占图像面积的{share}%，显示{a}。其密度为{kind}密度，与{b}和{c}相邻。"
    "其内可见一个约{mm}毫米的{shape}{tone}病灶，位于其{part}部，与周围组织密度不同，可能推移{d}。"
    "{e}大小及轮廓正常，{f}旁未见游离液体；建议与既往检查对照。"
)
TEMPLATES = {"en": ENGLISH, "zh": CHINESE}
ORGANS = {
    "en": [
        "spleen",
        "liver",
        "left kidney",
        "right kidney",
        "stomach",
        "pancreas",
        "aorta",
        "small bowel",
        "vertebra",
    ],
    "zh": ["脾脏", "肝脏", "左肾", "右肾", "胃", "胰腺", "主动脉", "小肠", "椎骨"],
}
PLACES = {
    "en": [
        "upper left",
        "upper middle",
        "upper right",
        "middle left",
        "center",
        "lower left",
        "lower right",
    ],
    "zh": ["左上部", "上中部", "右上部", "左中部", "中央", "左下部", "右下部"],
}
# the other blanks of the templates, and what may stand in them
CHOICES = {
    "en": {
        "level": ["upper", "lower"],
        "kind": ["soft tissue", "fluid"],
        "shape": ["round", "irregular"],
        "tone": ["hypodense", "hyperdense"],
        "part": ["upper", "lower", "central"],
    },
    "zh": {
        "level": ["上", "下"],
        "kind": ["软组织", "液体"],
        "shape": ["圆形", "不规则"],
        "tone": ["低密度", "高密度"],
        "part": ["上", "下", "中"],
    },
}


# ---- captions


def usual_caption(rng: random.Random, language: str) -> str:
    """Fill the blanks of a caption of about 100 words."""
    organs = rng.choices(ORGANS[language], k=6)
    blanks: dict[str, Any] = dict(zip("abcdef", organs, strict=True))
    blanks["place"] = rng.choice(PLACES[language])
    blanks["share"] = rng.randrange(1, 40)
    for name, choices in CHOICES[language].items():
        blanks[name] = rng.choice(choices)
    blanks["mm"] = rng.randrange(4, 60)
    return TEMPLATES[language].format(**blanks)


def fresh_caption(rng: random.Random, language: str) -> str:
    """Make up 100 words, or 160 Chinese signs with stops between them."""
    if language == "zh":
        signs = []
        for _ in range(160):
            signs.append(chr(rng.randrange(0x4E00, 0x6000)))
            signs.append(rng.choice(["", "", "，", "。"]))
        return "".join(signs)
    words = []
    for _ in range(100):
        length = rng.randrange(3, 9)
        words.append("".join(rng.choices("abcdefghijklmnopqrst", k=length)))
    return " ".join(words)


def make_pairs(number: int, language: str, fresh: bool) -> tuple[list[str], list[str]]:
    """Draw answers and references."""
    rng = random.Random(0)
    caption: Callable[[random.Random, str], str] = fresh_caption if fresh else usual_caption
    answers = [caption(rng, language) for _ in range(number)]
    references = [caption(rng, language) for _ in range(number)]
    return answers, references


# ---- the library


def library_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Score by the calls of LLaMA-Factory 0.9.5's ComputeSimilarity."""
    columns: dict[str, list[float]] = {"bleu-4": [], "rouge-1": [], "rouge-2": [], "rouge-l": []}
    for answer, reference in zip(answers, references, strict=True):
        words = " ".join(jieba.cut(answer))
        reference_words = " ".join(jieba.cut(reference))
        if words.split() and reference_words.split():
            rouge = Rouge().get_scores(words, reference_words)[0]
        else:
            rouge = {name: {"f": 0.0} for name in ("rouge-1", "rouge-2", "rouge-l")}
        for name, score in rouge.items():
            columns[name].append(round(score["f"] * 100, 4))
        smoothing = SmoothingFunction().method3
        bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
        columns["bleu-4"].append(round(bleu * 100, 4))
    return columns


def largest_difference(ours: dict[str, Any], theirs: dict[str, list[float]]) -> float:
    """Give the largest difference of any score of any pair."""
    largest = 0.0
    for name, values in theirs.items():
        gaps = [abs(one - other) for one, other in zip(ours[name], values, strict=True)]
        largest = max(largest, *gaps)
    return largest


# ---- the measurement


def measure(pairs: int, language: str, fresh: bool) -> dict[str, Any]:
    """Score the same pairs in both ways."""
    from _harness import Stopwatch

    answers, references = make_pairs(pairs, language, fresh)
    watch = Stopwatch()
    ours = llamafactory_scores(answers, references, per_sample=True)
    fast = watch.read()
    watch = Stopwatch()
    theirs = library_scores(answers, references)
    slow = watch.read()
    return {
        "language": language,
        "pairs": pairs,
        "fresh": fresh,
        "library_seconds": round(slow.wall, 2),
        "medtune_seconds": round(fast.wall, 2),
        "times_as_fast": round(slow.wall / fast.wall, 1),
        "times_as_fast_by_cpu_time": round(slow.cpu / fast.cpu, 1),
        "largest_difference": largest_difference(ours, theirs),
        "bleu-4": round(statistics.fmean(ours["bleu-4"]), 4),
    }


def main() -> None:
    # not at the top of the file: a test loads it from elsewhere, for `library_scores`
    from _harness import make_parser, write_result

    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3232)
    parser.add_argument("--languages", nargs="+", default=["en", "zh"], choices=["en", "zh"])
    parser.add_argument("--fresh", action="store_true", help="no two captions share a word")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    jieba.setLogLevel("WARNING")
    # both sides need the dictionary: loading it is nobody's time
    jieba.initialize()
    results = []
    for language in args.languages:
        result = measure(args.pairs, language, args.fresh)
        results.append(result)
        print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if args.json:
        write_result(args.json, results)


if __name__ == "__main__":
    main()
