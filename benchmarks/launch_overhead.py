"""What a launch costs: two CPU ranks under DeepSpeed against the same steps in this process.

    python benchmarks/launch_overhead.py DATA OUT.json [--steps 20] [--repeats 3]

DATA is a folder of `medtune convert`. The first launch finds no compiled extension, so it pays for
the compilation; the others find it. This process has its libraries loaded before its clock starts,
as a notebook has.
"""

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from _harness import (
    TINY_MODEL,
    Stopwatch,
    environment_of_ranks,
    make_parser,
    to_arguments,
    torchrun,
    write_result,
)

from medtune import training

RANKS = 2
# samples of a step, over all ranks
BATCH = 8


def arguments(data: Path, out: Path, steps: int, ranks: int) -> list[str]:
    """Give the words of one run: the tiny base model, LoRA, the same samples a step."""
    settings = {
        "data": data,
        "model_name_or_path": TINY_MODEL,
        "output_dir": out,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH // ranks,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "dtype": "float32",
        "disable_tqdm": True,
    }
    if ranks > 1:
        settings["deepspeed"] = "zero2"
    return to_arguments(settings)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp())
    environment = environment_of_ranks(
        TORCH_EXTENSIONS_DIR=str(folder / "compiled"),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        CUDA_VISIBLE_DEVICES="",
    )
    launched = []
    for number in range(options.repeats + 1):
        words = arguments(options.data, folder / f"launched{number}", options.steps, RANKS)
        command = [*torchrun(RANKS), "-m", "medtune.training", *words]
        watch = Stopwatch()
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        launched.append(watch.read().wall)
        print(f"launch {number}: {launched[-1]:.1f} s", flush=True)
    here = []
    for number in range(options.repeats + 1):
        words = arguments(options.data, folder / f"here{number}", options.steps, 1)
        watch = Stopwatch()
        training.main(words)
        here.append(watch.read().wall)
        print(f"in this process {number}: {here[-1]:.1f} s", flush=True)

    # the first launch compiles, and the first run here warms this process up
    launch = statistics.median(launched[1:])
    overhead = launch - statistics.median(here[1:])
    compilation = launched[0] - launch
    found = {
        "steps": options.steps,
        "launched_seconds": launched,
        "in_process_seconds": here,
        "cores": os.cpu_count(),
        "overhead_seconds": overhead,
        "first_compile_seconds": compilation,
    }
    write_result(options.out, found)
    print(f"overhead of a launch {overhead:.1f} s, of the first compilation {compilation:.1f} s")


if __name__ == "__main__":
    main()
