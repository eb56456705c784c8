"""Training in several ranks: real launches with two processes on the CPU, over gloo and DeepSpeed.

The model is a twin of the tiny base model, much smaller and with random weights: what is compared
are numbers, nothing has to be learned. Each launch has a time limit, and nothing of it may stay
behind.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import make_data, make_model, words_of

from medtune import models, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANKS = Path(__file__).with_name("training_ranks.py")
# optimizer steps of a run that is compared, and of one that is interrupted; samples of a step
STEPS = 4
LONG = 24
BATCH = 4
STAGES = ["zero1", "zero2", "zero3"]
OFFLOADED = [f"{stage}_offload" for stage in STAGES]


# ---- what is trained


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A folder with what all runs need.

    Two models, two data sets, a parameter file, and a ZeRO-3 that shards small tensors, too.
    """
    place = tmp_path_factory.mktemp("launch")
    make_model(place / "dense", tiny_vlm, experts=False)
    make_model(place / "experts", tiny_vlm, experts=True)
    make_data(place / "data", {"train": 32, "validation": 4})
    make_data(place / "mixed", {"train": 8, "validation": 8}, text_only=(3,))
    zero3 = json.loads(Path(training.ZERO["zero3"]).read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "sharded.json").write_text(json.dumps(zero3))
    settings = [
        f"data: {place}/data",
        f"model_name_or_path: {place}/dense",
        f"max_steps: {STEPS}",
        "seed: 0",
        "learning_rate: 2e-3",
        "logging_steps: 1",
        "save_strategy: 'no'",
        "disable_tqdm: true",
    ]
    (place / "train.yaml").write_text("\n".join(settings) + "\n")
    return place


def arguments(place: Path, name: str, batch: int, **changes) -> list[str]:
    """The words for one run, whose results go to the folder `name`."""
    settings = {
        "config": place / "train.yaml",
        "output_dir": place / name,
        "per_device_train_batch_size": batch,
    }
    return words_of(settings | changes)


# ---- how it is launched


def torchrun(*command, ranks: int = 2, options: tuple = ()) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    options = options or ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    return [*launcher, *options, *map(str, command)]


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Launch:
    """A launched command, its output in a file; leaving the block ends all of it."""

    def __init__(self, command: list[str], log: Path, seconds: float = 400):
        self.log = log
        self.seconds = seconds
        # every process that was ever seen below the command, by its number
        self.seen: dict[int, psutil.Process] = {}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def __enter__(self):
        return self

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, once they run."""
        found = []
        for child in descendants(self.process):
            self.seen[child.pid] = child
            # it may have ended meanwhile
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "medtune.training" in words and "torch.distributed.run" not in words:
                    found.append(child)
        return found

    def wait_for(self, happened) -> None:
        """Wait until something happened; fail when the launch ends before."""
        end = time.monotonic() + self.seconds
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            self.ranks()
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for the end and return the exit code; nothing may be left of it."""
        end = time.monotonic() + self.seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it hangs: {self.log.read_text()[-3000:]}"
            self.ranks()
            time.sleep(0.1)
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=10)
        assert not alive, f"left behind: {alive}"
        return self.process.returncode

    def __exit__(self, *error):
        for process in [*descendants(self.process), *self.seen.values(), self.process]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def launch(command: list[str], log: Path) -> str:
    """Launch, wait, and return the output of what must succeed."""
    with Launch(command, log) as launched:
        assert launched.end() == 0, log.read_text()[-4000:]
    return log.read_text()


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "adapter_model.safetensors")


def agree(one: Path, other: Path) -> bool:
    """The same loss at every step within 1e-4, and the same learned matrices within 1e-3.

    Both are relative.
    """
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    first = adapter(one)
    second = adapter(other)
    assert first.keys() == second.keys()
    # these begin at zero
    learned = [key for key in first if "lora_B" in key]
    apart = torch.cat([(first[key] - second[key]).flatten() for key in learned]).norm()
    length = torch.cat([first[key].flatten() for key in learned]).norm()
    assert apart <= 1e-3 * length
    return True


# ---- parity


@pytest.fixture(scope="module")
def alone(place) -> Path:
    """In one process: the references."""
    experts = {"target": "language+experts", "model_name_or_path": place / "experts"}
    runs = [
        arguments(place, "alone", BATCH),
        arguments(place, "experts-alone", BATCH, **experts),
        arguments(place, "names-alone", BATCH, name_weight=3),
    ]
    (place / "alone.json").write_text(json.dumps(runs))
    launch([sys.executable, str(RANKS), str(place / "alone.json")], place / "alone.log")
    return place


@pytest.fixture(scope="module")
def together(place) -> Path:
    """In two ranks: all that needs no start of its own."""
    half = BATCH // 2
    sharded = {"deepspeed": place / "sharded.json"}
    experts = sharded | {"target": "language+experts", "model_name_or_path": place / "experts"}
    mixed = {"data": place / "mixed", "target": "language+vision"}
    accumulated = {"gradient_accumulation_steps": 2}
    untrained = arguments(place, "experts-untrained", half, learning_rate=0, **experts)
    runs = [
        arguments(place, "ddp", half),
        arguments(place, "accumulated", half // 2, **accumulated),
        arguments(place, "mixed-ddp", 1, **mixed),
        *(arguments(place, name, half, deepspeed=name) for name in ("zero1", "zero2", *OFFLOADED)),
        arguments(place, "accumulated-zero2", half // 2, deepspeed="zero2", **accumulated),
        ["probe", str(place / "zero3"), *arguments(place, "zero3", half, **sharded)],
        arguments(place, "checkpointing", half, activation_checkpointing=True, **sharded),
        arguments(place, "experts-zero3", half, **experts),
        ["probe", str(place / "experts-untrained"), *untrained],
        arguments(place, "mixed-zero3", 1, **mixed, **sharded),
        arguments(place, "names-ddp", half // 2, name_weight=3, **accumulated),
        arguments(place, "names-zero3", half, name_weight=3, **sharded),
    ]
    (place / "together.json").write_text(json.dumps(runs))
    launch(torchrun(RANKS, place / "together.json"), place / "together.log")
    return place


@pytest.mark.parametrize("name", ["ddp", *STAGES, *OFFLOADED, "checkpointing"])
def test_the_same_training_in_two_ranks(alone, together, name):
    assert agree(alone / "alone", together / name)


@pytest.mark.parametrize("name", ["accumulated", "accumulated-zero2"])
def test_accumulated_gradients_are_a_larger_batch(alone, together, name):
    assert agree(alone / "alone", together / name)


@pytest.mark.parametrize("name", ["names-ddp", "names-zero3"])
def test_words_weigh_alike_however_a_step_is_cut(alone, together, name):
    """Some of the answers name the liver. The first of these runs accumulates, too."""
    assert agree(alone / "names-alone", together / name)
    assert losses(alone / "names-alone") != pytest.approx(losses(alone / "alone"), rel=1e-3)


def learned_matrices(folder: Path) -> list[str]:
    """The names of the matrices that are no longer zero, as they began."""
    return [key for key, value in adapter(folder).items() if "lora_B" in key and value.any()]


def test_it_trains(alone):
    found = losses(alone / "alone")
    assert found[-1] < found[0]
    assert learned_matrices(alone / "alone")


def test_experts_in_two_ranks(alone, together):
    """Ranks meet different experts, and the adapters of the experts learn."""
    assert agree(alone / "experts-alone", together / "experts-zero3")
    assert any("experts" in key for key in learned_matrices(together / "experts-zero3"))


def test_experts_loaded_under_zero3_are_the_same(together):
    """Not turned round: with a learning rate of 0 the sharded model is the base model."""
    found = torch.load(together / "experts-untrained" / "probe.pt")
    base = models.load_base(together / "experts")
    with torch.no_grad():
        assert torch.allclose(base(**found["batch"]).logits, found["logits"], atol=1e-5)


def test_shards_are_put_together_and_merged(together):
    """The adapter that ZeRO-3 saved, merged, answers as the live model did."""
    found = torch.load(together / "zero3" / "probe.pt")
    base = models.load_base(together / "dense")
    merged = models.load_tuned(base, together / "zero3" / "model").merge_and_unload(safe_merge=True)
    with torch.no_grad():
        assert torch.allclose(merged(**found["batch"]).logits, found["logits"], atol=1e-4)
    answer = merged.generate(**found["inputs"], max_new_tokens=8, do_sample=False)
    assert answer.tolist() == found["answer"].tolist()


@pytest.mark.parametrize("name", ["mixed-ddp", "mixed-zero3"])
def test_a_sample_without_picture_on_one_rank(together, name):
    """It does not hang, which is what is tested; and every loss is a number."""
    found = losses(together / name)
    assert len(found) == STEPS
    assert all(0 < loss < 20 for loss in found)


ACCELERATE = ["accelerate", "launch", "--use_deepspeed", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "{port}", "-m"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2", "--master_port", "{port}", "--module"]


@pytest.mark.parametrize("launcher", [ACCELERATE, DEEPSPEED], ids=lambda words: words[0])
def test_other_launchers(together, launcher):
    name = f"by-{launcher[0]}"
    port = str(20_000 + random.randrange(20_000))
    program = str(Path(sys.executable).with_name(launcher[0]))
    words = [word.replace("{port}", port) for word in launcher[1:]]
    run = arguments(together, name, BATCH // 2, deepspeed="zero2")
    launch([program, *words, "medtune.training", *run], together / f"{name}.log")
    assert agree(together / "zero2", together / name)


# ---- interruptions


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    """Two ranks under ZeRO-2, from the first step to the last."""
    run = arguments(place, "uninterrupted", BATCH // 2, deepspeed="zero2", max_steps=LONG)
    launch(torchrun("-m", "medtune.training", *run), place / "uninterrupted.log")
    return place


def start(place: Path, name: str, batch: int = BATCH // 2, **changes) -> list[str]:
    """A training under ZeRO-2, with a checkpoint every second step."""
    settings = {
        "deepspeed": "zero2",
        "max_steps": LONG,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    return ["-m", "medtune.training", *arguments(place, name, batch, **settings | changes)]


def newest(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    found = training.complete_checkpoints(folder)
    return found[0][1]["step"] if found else 0


def stop_by_ctrl_c(command: list[str], log: Path, out: Path) -> None:
    """Start a run, let it write a checkpoint, and send it what a terminal sends."""
    before = newest(out)
    with Launch(command, log) as launched:
        launched.wait_for(lambda: newest(out) > before)
        os.killpg(launched.process.pid, signal.SIGINT)
        # a terminal sends it to all of them
        for rank in launched.ranks():
            rank.send_signal(signal.SIGINT)
        assert launched.end() != 0
    assert before < newest(out) < LONG
    assert not (out / "model").exists()


def kill_one_rank(command: list[str], log: Path, out: Path) -> None:
    """Start a run, let it write a checkpoint, and kill one of its ranks."""
    before = newest(out)
    with Launch(command, log) as launched:
        launched.wait_for(lambda: newest(out) > before)
        random.choice(launched.ranks()).kill()
        assert launched.end() != 0
    assert before < newest(out) < LONG


def test_stopped_killed_and_resumed(uninterrupted):
    """Whatever happens to a run, in the end it has the losses of one that nobody disturbed.

    Ctrl-C of one rank and of two, kill -9 of one, an incomplete checkpoint, one rank again.
    """
    out = uninterrupted / "interrupted"
    one_rank = start(uninterrupted, "interrupted", BATCH)
    both = start(uninterrupted, "interrupted", resume=True)
    stop_by_ctrl_c(torchrun(*one_rank, ranks=1), uninterrupted / "stopped1.log", out)
    # this one starts from a checkpoint of another number of ranks
    stop_by_ctrl_c(torchrun(*both, ranks=2), uninterrupted / "stopped2.log", out)
    kill_one_rank(torchrun(*both), uninterrupted / "killed.log", out)
    incomplete = out / f"checkpoint-{LONG - 1}"
    shutil.copytree(out / f"checkpoint-{newest(out)}", incomplete, dirs_exist_ok=True)
    (incomplete / "complete.json").unlink()
    said = launch(torchrun(*one_rank, "--resume", ranks=1), uninterrupted / "resumed.log")
    assert f"{incomplete.name} is incomplete" in said
    assert agree(uninterrupted / "uninterrupted", out)
    assert len(list(out.glob("checkpoint-*"))) <= 2, "save_total_limit"
    # the last checkpoint has all that was trained
    kept = load_file(out / f"checkpoint-{LONG}" / "adapter_model.safetensors")
    assert kept.keys() == adapter(out).keys()
    assert all(torch.equal(kept[name], value) for name, value in adapter(out).items())


def test_the_failure_of_one_rank_ends_all(place):
    runs = [["fail", "1", *arguments(place, "failed", 2)]]
    (place / "failed.json").write_text(json.dumps(runs))
    with Launch(torchrun(RANKS, place / "failed.json"), place / "failed.log") as launched:
        assert launched.end() != 0
    said = (place / "failed.log").read_text()
    assert "medtune train: rank 1: the disk of this rank is broken" in said


# ---- two machines


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_machines():
    """Two network namespaces with an address each and a cable (veth) between them."""
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    names = [f"medtune{os.getpid()}{side}" for side in "ab"]
    first, second = names
    try:
        ip("netns", "add", first)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    try:
        ip("netns", "add", second)
        cable = ["link", "add", "cable", "netns", first, "type", "veth"]
        ip(*cable, "peer", "name", "cable", "netns", second)
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_machine(machines: list[str], number: int, command: list[str]) -> list[str]:
    """One rank on one of the machines; they meet at the address of the first."""
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    meet += ["--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-conf", f"is_host={1 - number}"]
    meet += ["--local-addr", f"10.77.0.{number + 1}"]
    inside = ["ip", "netns", "exec", machines[number], "env", "GLOO_SOCKET_IFNAME=cable"]
    return [*inside, *torchrun(*command, ranks=1, options=tuple(meet))]


def wait_until_both_stop(first: Launch, second: Launch, seconds: float) -> None:
    """Wait for the ranks; the launcher of the second machine goes on looking for the first."""
    began = time.monotonic()
    while first.ranks() or second.ranks():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)


def test_two_machines_and_a_cut_cable(uninterrupted, two_machines):
    """The losses of one machine; a cut cable stops both, and they go on once it is mended."""
    out = uninterrupted / "machines"
    timeout = 20
    command = ["-m", "medtune.training"]
    command += arguments(
        uninterrupted,
        "machines",
        BATCH // 2,
        ddp_timeout=timeout,
        max_steps=LONG,
        save_strategy="steps",
        save_steps=2,
    )
    logs = [uninterrupted / f"machine{number}.log" for number in (0, 1)]
    one, other = [on_machine(two_machines, number, command) for number in (0, 1)]
    with Launch(one, logs[0]) as first, Launch(other, logs[1]) as second:
        first.wait_for(lambda: newest(out) >= 2)
        ip("-n", two_machines[0], "link", "set", "cable", "down")
        # the timeout, and what ending a process takes
        wait_until_both_stop(first, second, timeout + 60)
    for number, log in enumerate(logs):
        lines = log.read_text().splitlines()
        said = [line for line in lines if line.startswith(f"medtune train: rank {number}: ")]
        assert "lost the connection to the other ranks, --resume goes on" in said[-1], said
    ip("-n", two_machines[0], "link", "set", "cable", "up")
    again = [*command, "--resume"]
    one, other = [on_machine(two_machines, number, again) for number in (0, 1)]
    with Launch(one, logs[0]) as first, Launch(other, logs[1]) as second:
        assert first.end() == 0, logs[0].read_text()[-3000:]
        assert second.end() == 0, logs[0].read_text()[-3000:]
    assert agree(uninterrupted / "uninterrupted", out)


# ---- how a rank leaves

LEAVING = """
import atexit, os, sys
from torch import distributed
from medtune import training

class Left:
    def __del__(self, abort=os.abort):
        abort()

# as a thread of gloo does that still holds a tensor when the interpreter ends
left = Left()
atexit.register(print, "the logs are closed")
if "alone" not in sys.argv:
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
print("trained")
training.leave_ranks()
print("still here")
"""


def test_a_rank_that_has_finished_cannot_abort_while_the_interpreter_ends(tmp_path):
    command = [sys.executable, "-c", LEAVING, tmp_path / "meet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["trained", "the logs are closed"]

    # alone, a process goes on, and this one aborts
    done = subprocess.run([*command, "alone"], capture_output=True, text=True)
    assert "still here" in done.stdout and done.returncode == -signal.SIGABRT
