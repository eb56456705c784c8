"""What the multi-task model can do, and what it takes: figures of notebook 07 beyond its one run.

    python benchmarks/multitask.py profile --out papermill_runs/reference/multitask-2b-h200
    python benchmarks/multitask.py ablation --out results --workers 8
    python benchmarks/multitask.py collect --results results \
        --out papermill_runs/reference/multitask-ablation

`profile` runs the published recipe (Qwen3-VL-2B, batch 2, accumulation 4, activation checkpointing,
LoRA r 8 alpha 32) on a twin of the model's shape with random weights, and reports the peak of GPU
memory. `ablation` trains the tiny base model in several ways with several seeds, one process each,
and keeps boxes, match scores and answers. `collect` scores them, and writes the tables that the
notebook shows.
"""

from pathlib import Path

from _harness import SAMPLE, make_parser
from _multitask_arms import ARMS, run_ablation, train_one
from _multitask_profile import profile
from _multitask_scores import collect


def main() -> None:
    parser = make_parser(__doc__)
    # `one` is what `ablation` starts
    parser.add_argument("what", choices=["profile", "ablation", "one", "collect"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parquet", type=Path, default=SAMPLE)
    parser.add_argument("--data", type=Path, help="of 'one': where 'ablation' put the records")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument(
        "--results", nargs="+", type=Path, help="of 'collect': folders that 'ablation' wrote"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="stop what is unfinished then")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "profile":
        profile(args.out)
    elif args.what == "ablation":
        jobs = [(arm, seed) for seed in args.seeds for arm in args.arms]
        run_ablation(args.out, args.parquet, jobs, args.workers, args.seconds)
    elif args.what == "one":
        train_one(args.arms[0], args.seeds[0], args.data, args.out)
    else:
        if not args.results:
            parser.error("collect needs --results")
        collect(args.results, args.out, args.parquet)


if __name__ == "__main__":
    main()
