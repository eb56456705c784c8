"""Training in several ranks: real launches of `medtune.train` with two processes on the CPU, over gloo and DeepSpeed.

The model is a twin of the tiny base model, much smaller and with random weights: what is compared are numbers, nothing
has to be learned. Each launch has a time limit, and nothing of it may stay behind.
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

from medtune import models, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANKS = Path(__file__).with_name("ranks.py")
STEPS, LONG, BATCH = 4, 24, 4
STAGES = ["zero1", "zero2", "zero3"]
OFFLOADED = [f"{stage}_offload" for stage in STAGES]


# ---- what is trained


def make_model(folder: Path, tiny_vlm: Path, *, experts: bool) -> Path:
    """A twin of the tiny base model with 0.3 million random weights, dense or with experts that are not square."""
    from transformers import (
        AutoConfig,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    base = AutoConfig.from_pretrained(tiny_vlm).to_dict()
    text, vision = base["text_config"], base["vision_config"]
    text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 32}
    text["rope_parameters"]["mrope_section"] = [6, 5, 5]
    vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [1]}
    if experts:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
    kinds = {"model_type": None}
    marks = {key: base[key] for key in base if key.endswith("token_id")} | {"tie_word_embeddings": True}
    text, vision = ({k: v for k, v in part.items() if k not in kinds} for part in (text, vision))
    config = (Qwen3VLMoeConfig if experts else Qwen3VLConfig)(text_config=text, vision_config=vision, **marks)
    torch.manual_seed(0)
    model = (Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration)(config)
    model.save_pretrained(folder)
    models.load_processor(tiny_vlm).save_pretrained(folder)
    return folder


def make_data(folder: Path, *, text_only: tuple = ()) -> Path:
    """Records with small random pictures and answers of very unequal length; some without a picture."""
    from PIL import Image

    draw = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for split, number in (("train", 32), ("validation", 4)):
        lines = []
        for i in range(number if not text_only else 8):
            name, words = (
                f"images/{split}{i}.png",
                draw.choices(["dark", "bright", "liver", "left", "upper"], k=1 + i % 9),
            )
            Image.frombytes("RGB", (32, 32), draw.randbytes(3072)).save(folder / name)
            pictures = [] if split == "train" and i in text_only else [name]
            question = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": "What is it?"}]
            answer = [{"type": "text", "text": " ".join(words) + "."}]
            turns = {"prompt": [{"role": "user", "content": question}]}
            turns |= {"completion": [{"role": "assistant", "content": answer}]}
            lines.append(json.dumps({"id": f"{split}{i}", "images": pictures} | turns) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_vlm) -> Path:
    """A folder with the two models, two data sets, a parameter file, and a ZeRO-3 that shards small tensors."""
    place = tmp_path_factory.mktemp("launch")
    make_model(place / "dense", tiny_vlm, experts=False)
    make_model(place / "experts", tiny_vlm, experts=True)
    make_data(place / "data")
    make_data(place / "mixed", text_only=(3,))
    zero3 = json.loads(Path(train.ZERO["zero3"]).read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (place / "sharded.json").write_text(json.dumps(zero3))
    settings = [f"data: {place}/data", f"model_name_or_path: {place}/dense", f"max_steps: {STEPS}", "seed: 0"]
    settings += ["learning_rate: 2e-3", "logging_steps: 1", "save_strategy: 'no'", "disable_tqdm: true"]
    (place / "train.yaml").write_text("\n".join(settings) + "\n")
    return place


def arguments(place: Path, name: str, batch: int, **changes) -> list[str]:
    """Of one run, whose results go to the folder `name`."""
    settings = {"config": place / "train.yaml", "output_dir": place / name, "per_device_train_batch_size": batch}
    return [part for key, value in (settings | changes).items() for part in (f"--{key}", str(value))]


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
    """A launched command, its output in a file; leaving the block ends all of it, whatever happened."""

    def __init__(self, command: list[str], log: Path, seconds: float = 400):
        self.log, self.seconds, self.seen = log, seconds, {}
        with open(log, "w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def __enter__(self):
        return self

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, once they run."""
        children, found = descendants(self.process), []
        self.seen |= {child.pid: child for child in children}
        for child in children:
            with contextlib.suppress(psutil.Error):
                found += [child] * (
                    "medtune.train" in child.cmdline() and "torch.distributed.run" not in child.cmdline()
                )
        return found

    def wait_for(self, happened) -> None:
        """Until something happened; fails when the launch ends before."""
        end = time.monotonic() + self.seconds
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            self.ranks()
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for the end and return the exit code; nothing may be left of it."""
        end = time.monotonic() + self.seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it hangs: {self.log.read_text()[-3000:]}"
            self.ranks()
            time.sleep(0.1)
        gone, alive = psutil.wait_procs(list(self.seen.values()), timeout=10)
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
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def adapter(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "adapter_model.safetensors")


def agree(one: Path, other: Path) -> bool:
    """The same loss at every step within 1e-4, and the same learned matrices within 1e-3, both relative."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    learned = [key for key in first if "lora_B" in key]  # these begin at zero
    apart, length = (
        torch.cat([t.flatten() for t in tensors]).norm()
        for tensors in ([first[key] - second[key] for key in learned], [first[key] for key in learned])
    )
    assert 0 <= apart <= 1e-3 * length
    return True


# ---- parity


@pytest.fixture(scope="module")
def alone(place) -> Path:
    """In one process: the references."""
    more = {"target": "language+experts", "model_name_or_path": place / "experts"}
    runs = [arguments(place, "alone", BATCH), arguments(place, "experts-alone", BATCH, **more)]
    (place / "alone.json").write_text(json.dumps(runs))
    launch([sys.executable, str(RANKS), str(place / "alone.json")], place / "alone.log")
    return place


@pytest.fixture(scope="module")
def together(place) -> Path:
    """In two ranks: all that needs no start of its own."""
    half, sharded = BATCH // 2, {"deepspeed": place / "sharded.json"}
    experts = sharded | {"target": "language+experts", "model_name_or_path": place / "experts"}
    mixed = {"data": place / "mixed", "target": "language+vision"}
    untrained = arguments(place, "experts-untrained", half, learning_rate=0, **experts)
    runs = [
        arguments(place, "ddp", half),
        arguments(place, "accumulated", half // 2, gradient_accumulation_steps=2),
        arguments(place, "mixed-ddp", 1, **mixed),
        *(arguments(place, name, half, deepspeed=name) for name in ("zero1", "zero2", *OFFLOADED)),
        arguments(place, "accumulated-zero2", half // 2, gradient_accumulation_steps=2, deepspeed="zero2"),
        ["probe", str(place / "zero3"), *arguments(place, "zero3", half, **sharded)],
        arguments(place, "checkpointing", half, activation_checkpointing=True, **sharded),
        arguments(place, "experts-zero3", half, **experts),
        ["probe", str(place / "experts-untrained"), *untrained],
        arguments(place, "mixed-zero3", 1, **mixed, **sharded),
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


def test_it_trains(alone):
    assert losses(alone / "alone")[-1] < losses(alone / "alone")[0]
    assert any(tensor.abs().max() > 0 for key, tensor in adapter(alone / "alone").items() if "lora_B" in key)


def test_experts_in_two_ranks(alone, together):
    """Ranks meet different experts, and the adapters of the experts learn."""
    assert agree(alone / "experts-alone", together / "experts-zero3")
    learned = {key for key, tensor in adapter(together / "experts-zero3").items() if "lora_B" in key and tensor.any()}
    assert any("experts" in key for key in learned)


def test_experts_loaded_under_zero3_are_the_same(together):
    """Not turned round: with a learning rate of 0 the sharded model is the base model."""
    found = torch.load(together / "experts-untrained" / "probe.pt")
    base = models.load_base(together / "experts")
    with torch.no_grad():
        assert torch.allclose(base(**found["batch"]).logits, found["logits"], atol=1e-5)


def test_shards_are_put_together_and_merged(together):
    """The adapter that ZeRO-3 saved, merged, answers as the live model did."""
    found = torch.load(together / "zero3" / "probe.pt")
    tuned = models.load_tuned(models.load_base(together / "dense"), together / "zero3" / "model")
    merged = tuned.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        assert torch.allclose(merged(**found["batch"]).logits, found["logits"], atol=1e-4)
    answer = merged.generate(**found["inputs"], max_new_tokens=8, do_sample=False)
    assert answer.tolist() == found["answer"].tolist()


@pytest.mark.parametrize("name", ["mixed-ddp", "mixed-zero3"])
def test_a_sample_without_picture_on_one_rank(together, name):
    """It does not hang, which is what is tested; and every loss is a number."""
    assert len(losses(together / name)) == STEPS and all(0 < loss < 20 for loss in losses(together / name))


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port", "{port}", "-m"],
        ["deepspeed", "--num_gpus", "2", "--master_port", "{port}", "--module"],
    ],
    ids=lambda words: words[0],
)
def test_other_launchers(together, launcher):
    name, port = f"by-{launcher[0]}", str(20_000 + random.randrange(20_000))
    words = [word.replace("{port}", port) for word in launcher[1:]]
    run = arguments(together, name, BATCH // 2, deepspeed="zero2")
    launch([str(Path(sys.executable).with_name(launcher[0])), *words, "medtune.train", *run], together / f"{name}.log")
    assert agree(together / "zero2", together / name)


# ---- interruptions


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    """Two ranks under ZeRO-2, from the first step to the last."""
    run = arguments(place, "uninterrupted", BATCH // 2, deepspeed="zero2", max_steps=LONG)
    launch(torchrun("-m", "medtune.train", *run), place / "uninterrupted.log")
    return place


def start(place: Path, name: str, **changes) -> list[str]:
    """`medtune.train` in two ranks under ZeRO-2, with a checkpoint every second step."""
    settings = {"deepspeed": "zero2", "max_steps": LONG, "save_strategy": "steps", "save_steps": 2} | changes
    return ["-m", "medtune.train", *arguments(place, name, BATCH // 2, **settings)]


def newest(folder: Path) -> int:
    return next((note["step"] for _, note in train.complete_checkpoints(folder)), 0)


def test_stopped_killed_and_resumed(uninterrupted):
    """Ctrl-C of one rank and of two, kill -9 of one, an incomplete checkpoint, one rank again: the same losses."""
    out = uninterrupted / "interrupted"
    one_rank = start(uninterrupted, "interrupted", per_device_train_batch_size=BATCH)
    both = start(uninterrupted, "interrupted", resume=True)
    stopped = 0
    for number, command in ((1, one_rank), (2, both)):  # the second run starts from a checkpoint of another number
        with Launch(torchrun(*command, ranks=number), uninterrupted / f"stopped{number}.log") as launched:
            launched.wait_for(lambda before=stopped: newest(out) > before)
            os.killpg(launched.process.pid, signal.SIGINT)
            for rank in launched.ranks():  # a terminal sends it to all of them
                rank.send_signal(signal.SIGINT)
            assert launched.end() != 0
        assert stopped < newest(out) < LONG and not (out / "model").exists()
        stopped = newest(out)
    with Launch(torchrun(*both), uninterrupted / "killed.log") as launched:
        launched.wait_for(lambda: newest(out) > stopped)
        random.choice(launched.ranks()).kill()
        assert launched.end() != 0
    killed = newest(out)
    assert stopped < killed < LONG
    shutil.copytree(out / f"checkpoint-{killed}", out / f"checkpoint-{LONG - 1}", dirs_exist_ok=True)
    (out / f"checkpoint-{LONG - 1}" / "complete.json").unlink()
    said = launch(torchrun(*one_rank, "--resume", ranks=1), uninterrupted / "resumed.log")
    assert f"checkpoint-{LONG - 1} is incomplete" in said
    assert agree(uninterrupted / "uninterrupted", out)
    assert len(list(out.glob("checkpoint-*"))) <= 2, "save_total_limit"


def test_the_failure_of_one_rank_ends_all(place):
    runs = [["fail", "1", *arguments(place, "failed", 2)]]
    (place / "failed.json").write_text(json.dumps(runs))
    with Launch(torchrun(RANKS, place / "failed.json"), place / "failed.log") as launched:
        assert launched.end() != 0
    assert "medtune.train: rank 1: the disk of this rank is broken" in (place / "failed.log").read_text()


# ---- two machines


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def two_machines():
    """Two network namespaces with an address each and a cable (veth) between them, as two machines have."""
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not installed")
    names = [f"medtune{os.getpid()}{side}" for side in "ab"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_machine(machines: list[str], number: int, *command: str) -> list[str]:
    """One rank on one of the machines; they meet at the address of the first."""
    meet = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "test"]
    meet += ["--local-addr", f"10.77.0.{number + 1}", "--rdzv-conf", f"is_host={1 - number}"]
    inside = ["ip", "netns", "exec", machines[number], "env", "GLOO_SOCKET_IFNAME=cable"]
    return [*inside, *torchrun(*command, ranks=1, options=tuple(meet))]


def test_two_machines_and_a_cut_cable(uninterrupted, two_machines):
    """The losses of one machine; after the cable is cut both ends stop with an error, and resume once it is mended."""
    out, timeout = uninterrupted / "machines", 20
    settings = {"deepspeed": "", "ddp_timeout": timeout, "max_steps": LONG, "save_strategy": "steps", "save_steps": 2}
    command = ["-m", "medtune.train", *arguments(uninterrupted, "machines", BATCH // 2)]
    for key, value in settings.items():
        command += [f"--{key}", str(value)] if value != "" else []
    logs = [uninterrupted / f"machine{number}.log" for number in (0, 1)]
    both = [on_machine(two_machines, number, *command) for number in (0, 1)]
    with Launch(both[0], logs[0]) as first, Launch(both[1], logs[1]) as second:
        first.wait_for(lambda: newest(out) >= 2)
        ip("-n", two_machines[0], "link", "set", "cable", "down")
        began = time.monotonic()
        while (
            first.ranks() or second.ranks()
        ):  # the launcher of the second still looks for the first: it is ended below
            assert time.monotonic() - began < timeout + 60, "the timeout, and what ending a process takes"
            time.sleep(0.2)
    for number, log in enumerate(logs):
        said = [line for line in log.read_text().splitlines() if line.startswith(f"medtune.train: rank {number}: ")]
        assert "Timed out" in said[-1] or "Connection" in said[-1], said
    ip("-n", two_machines[0], "link", "set", "cable", "up")
    both = [on_machine(two_machines, number, *command, "--resume") for number in (0, 1)]
    with Launch(both[0], logs[0]) as first, Launch(both[1], logs[1]) as second:
        assert first.end() == 0 and second.end() == 0, logs[0].read_text()[-3000:]
    assert agree(uninterrupted / "uninterrupted", out)
