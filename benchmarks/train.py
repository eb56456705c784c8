"""How fast `medtune.training` is, rung by rung, with its rivals beside it in the same run.

    python benchmarks/train.py OUT [--rungs naive,workers,...] [--rival llamafactory=FOLDER ...]
    python benchmarks/train.py OUT --short --moe --gemma --generate
    python benchmarks/train.py OUT --small     # all of it on a CPU with tiny twins, in minutes
    python benchmarks/train.py OUT --rungs fast96 --profile

The ladder's model has the shape of Qwen3-VL-2B and random weights: 512x512 pictures, about 402
tokens a sample, LoRA of rank 8 on the language layers. Each rung trains in a process of its own
through `medtune.training` and TRL's SFTTrainer and leaves a line in OUT/results.jsonl as it ends: a
run that was cut off, or has used up `--seconds`, goes on where it stopped when it is started again.
Speed is that of the second half of the steps. MFU is the arithmetic that the shape needs, in TFLOP
a second, by `--peak`, which is 790 for dense bfloat16 on an H200. `--rival` measures LLaMA-Factory or
ms-swift three times: its defaults, settings equal to our rung fast64, and the best that its options
give. FOLDER is one that the rival and what it asks for are installed in, since it wants other
versions than this project.

The rungs stand in `_train_rungs.py`; `_train_ladder.py` goes from one to the next, `_train_one.py`
measures one, `_train_rivals.py` measures rivals, and `_train_watch.py` says what a GPU waited
for.
"""

import argparse
import os
import sys
from pathlib import Path

from _harness import make_parser
from _train_rungs import GENERATE, LADDER, MEMORY, MOE, ONE_KEY, RUNGS, SHORT

# what `_train_rivals.py` can start
RIVALS = ("llamafactory", "swift")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--rungs", default="", help=f"of {', '.join(RUNGS)}; default: the ladder and the one key"
    )
    parser.add_argument("--short", action="store_true", help="what cards of 16 and 24 GB hold")
    parser.add_argument("--moe", action="store_true", help="the mixture of experts")
    parser.add_argument("--gemma", action="store_true", help="Gemma-3-4B by a published recipe")
    parser.add_argument("--generate", action="store_true", help="answers")
    parser.add_argument(
        "--rival",
        action="append",
        default=[],
        type=rival_in,
        metavar="NAME=FOLDER",
        help="three rows of llamafactory or swift, installed in a folder",
    )
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument(
        "--small", action="store_true", help="tiny twins, also on a CPU, all groups"
    )
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=570, help="start no rung after so many seconds"
    )
    parser.add_argument("--each", type=float, default=240, help="most seconds of one rung")
    parser.add_argument(
        "--peak", type=float, default=790.0, help="TFLOP/s of the card, dense bfloat16"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also write profile-RUNG.txt of the last two steps"
    )
    parser.add_argument(
        "--apart", action="store_true", help="a process for each rung with --small too"
    )
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(chosen_rungs(options)) - RUNGS.keys()
    if unknown:
        parser.error(f"unknown rungs: {', '.join(sorted(unknown))}")
    return options


def rival_in(text: str) -> tuple[str, Path]:
    """Read a rival and the folder that it is in."""
    name, _, folder = text.partition("=")
    if name not in RIVALS or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: write {' or '.join(RIVALS)}, =, and its folder")
    return name, Path(folder).resolve()


def chosen_rungs(options: argparse.Namespace) -> list[str]:
    """Name the rungs that the options ask for."""
    if options.rungs:
        return options.rungs.split(",")
    names = []
    if options.short or options.small:
        names += SHORT
    if options.moe or options.small:
        names += MOE
    if options.gemma or options.small:
        names += MEMORY
    if options.generate or options.small:
        names += GENERATE
    if options.small or not names:
        names = [*LADDER, *ONE_KEY, *names]
    return names


def main() -> None:
    options = parse()
    out = options.out.resolve()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HOME"] = str(out / "hub")
    # only here: the libraries read the environment when they are imported
    from _train_ladder import climb
    from _train_one import Conditions, measure_rung

    conditions = Conditions(out, options.small, options.steps, options.peak, options.profile)
    if options.child:
        measure_rung(options.child, conditions)
    else:
        climb(chosen_rungs(options), conditions, options)


if __name__ == "__main__":
    main()
