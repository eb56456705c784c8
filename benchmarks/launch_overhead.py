"""What a launch costs: `medtune train` in two CPU ranks under DeepSpeed against the same steps in this process.

    python benchmarks/launch_overhead.py DATA OUT.json [--steps 20] [--repeats 3]

DATA is a folder of `medtune convert`. The first launch finds no compiled extension, so it pays for the
compilation; the others find it. This process has its libraries loaded before its clock starts, as a notebook has.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]


def arguments(data: Path, out: Path, steps: int, batch: int, *more: str) -> list[str]:
    """Of one run: the tiny base model, LoRA, steps of 8 samples in all."""
    values = {"data": data, "model_name_or_path": REPO / "data" / "tiny-vlm", "output_dir": out, "max_steps": steps}
    values |= {"per_device_train_batch_size": batch, "learning_rate": 2e-3, "save_strategy": "no", "dtype": "float32"}
    values |= {"disable_tqdm": True}
    return [*(part for key, value in values.items() for part in (f"--{key}", str(value))), *more]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from medtune import train

    folder = Path(tempfile.mkdtemp())
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "medtune.train"]
    launched, here = [], []
    for i in range(options.repeats + 1):
        ours = arguments(options.data, folder / f"launched{i}", options.steps, 4, "--deepspeed", "zero2")
        began = time.perf_counter()
        subprocess.run([*torchrun, *ours], check=True, env=environment, stdout=subprocess.DEVNULL)
        launched.append(time.perf_counter() - began)
        print(f"launch {i}: {launched[-1]:.1f} s", flush=True)
    for i in range(options.repeats + 1):  # the first warms this process up and does not count
        began = time.perf_counter()
        train.main(arguments(options.data, folder / f"here{i}", options.steps, 8))
        here.append(time.perf_counter() - began)
        print(f"in this process {i}: {here[-1]:.1f} s", flush=True)
    again, alone = statistics.median(launched[1:]), statistics.median(here[1:])
    found = {"steps": options.steps, "launched_seconds": launched, "in_process_seconds": here, "cores": os.cpu_count()}
    found |= {"overhead_seconds": again - alone, "first_compile_seconds": launched[0] - again}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(f"overhead of a launch {again - alone:.1f} s, of the first compilation {launched[0] - again:.1f} s")


if __name__ == "__main__":
    main()
