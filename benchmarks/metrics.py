"""Time `llamafactory_scores` against the library calls it equals, on the same pairs, in the same process.

    python benchmarks/metrics.py --pairs 3232

The captions are drawn from clauses of the sample set's manner. --fresh makes every word of every caption new, so that
nothing can be remembered from one caption to the next: the worst case.
"""

import argparse
import itertools
import json
import random
import statistics
import time

from medtune.metrics import llamafactory_scores

ORGANS = ["spleen", "liver", "left kidney", "right kidney", "stomach", "pancreas", "aorta", "small bowel", "vertebra"]
ORGANS_ZH = ["脾脏", "肝脏", "左肾", "右肾", "胃", "胰腺", "主动脉", "小肠", "椎骨"]
PLACES = ["upper left", "upper middle", "upper right", "middle left", "center", "lower left", "lower right"]
PLACES_ZH = ["左上部", "上中部", "右上部", "左中部", "中央", "左下部", "右下部"]
ENGLISH = (
    "The image is a computed tomography (CT) scan of the {level} abdomen in axial view, shown with a soft tissue "
    "window. The region of interest, located in the {place} of the image, covers about {share}% of its area and shows "
    "the {a}. It has {kind} density and is bordered by the {b} and the {c}. Within it lies a {shape} {tone} lesion of "
    "about {mm} mm, in its {part} part, which differs from the surrounding tissue and may displace the {d}. The {e} "
    "appears normal in size and outline, and no free fluid is seen next to the {f}; correlation with earlier scans is "
    "advised."
)
CHINESE = (
    "图像为{level}腹部的轴位计算机断层扫描（CT），采用软组织窗显示。感兴趣区域位于图像的{place}，约占图像面积的{share}%，显示{a}。"
    "其密度为{kind}密度，与{b}和{c}相邻。其内可见一个约{mm}毫米的{shape}{tone}病灶，位于其{part}部，与周围组织密度不同，可能推移{d}。"
    "{e}大小及轮廓正常，{f}旁未见游离液体；建议与既往检查对照。"
)


def make_pairs(number, language, fresh, seed=0):
    """Draw answers and references of about 100 words."""
    rng = random.Random(seed)

    def caption():
        if fresh:  # new words, or new runs of Chinese signs, in every caption
            if language == "zh":
                signs = (chr(rng.randrange(0x4E00, 0x6000)) + rng.choice(["", "", "，", "。"]) for _ in range(160))
                return "".join(signs)
            return " ".join("".join(rng.choices("abcdefghijklmnopqrst", k=rng.randrange(3, 9))) for _ in range(100))
        organs, places = (ORGANS, PLACES) if language == "en" else (ORGANS_ZH, PLACES_ZH)
        a, b, c, d, e, f = rng.choices(organs, k=6)
        words = dict(a=a, b=b, c=c, d=d, e=e, f=f, place=rng.choice(places), share=rng.randrange(1, 40))
        english = dict(level=["upper", "lower"], kind=["soft tissue", "fluid"], shape=["round", "irregular"])
        english |= dict(tone=["hypodense", "hyperdense"], part=["upper", "lower", "central"])
        chinese = dict(level=["上", "下"], kind=["软组织", "液体"], shape=["圆形", "不规则"], tone=["低密度", "高密度"])
        chinese |= dict(part=["上", "下", "中"])
        chosen = {name: rng.choice(options) for name, options in (english if language == "en" else chinese).items()}
        return (ENGLISH if language == "en" else CHINESE).format(mm=rng.randrange(4, 60), **words, **chosen)

    return [caption() for _ in range(number)], [caption() for _ in range(number)]


def library_scores(predictions, references):
    """Score by the calls of LLaMA-Factory 0.9.5's ComputeSimilarity."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    columns = {name: [] for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")}
    for prediction, reference in zip(predictions, references, strict=True):
        a, b = " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
        rouge = {name: {"f": 0.0} for name in ("rouge-1", "rouge-2", "rouge-l")}
        if a.split() and b.split():
            rouge = Rouge().get_scores(a, b)[0]
        for name, score in rouge.items():
            columns[name].append(round(score["f"] * 100, 4))
        smoothing = SmoothingFunction().method3
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
        columns["bleu-4"].append(round(bleu * 100, 4))
    return columns


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3232)
    parser.add_argument("--languages", nargs="+", default=["en", "zh"], choices=["en", "zh"])
    parser.add_argument("--fresh", action="store_true", help="no two captions share a word")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import jieba

    jieba.setLogLevel("WARNING")
    jieba.initialize()  # both sides need the dictionary: loading it is nobody's time
    results = []
    for language in args.languages:
        predictions, references = make_pairs(args.pairs, language, args.fresh)
        clocks = [(time.perf_counter(), time.process_time())]
        ours = llamafactory_scores(predictions, references, per_sample=True)
        clocks.append((time.perf_counter(), time.process_time()))
        theirs = library_scores(predictions, references)
        clocks.append((time.perf_counter(), time.process_time()))
        (fast, fast_cpu), (slow, slow_cpu) = (
            [b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(clocks)
        )
        gap = max(abs(x - y) for name in theirs for x, y in zip(ours[name], theirs[name], strict=True))
        results.append(
            {
                "language": language,
                "pairs": args.pairs,
                "fresh": args.fresh,
                "library_seconds": round(slow, 2),
                "medtune_seconds": round(fast, 2),
                "times_as_fast": round(slow / fast, 1),
                "times_as_fast_by_cpu_time": round(slow_cpu / fast_cpu, 1),
                "largest_difference": gap,
                "bleu-4": round(statistics.fmean(ours["bleu-4"]), 4),
            }
        )
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
