"""Fast settings: each computes the same as the slow one, losses and gradients, and says so where it cannot help."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medtune import convert, generate, models, sizing, speed, train
from medtune.data import load_pairs

TINY = Path(__file__).parents[1] / "data" / "tiny-vlm"
QWEN3, EXPERTS = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct"
QWEN2, QWEN25, GEMMA = "Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "google/gemma-3-4b-pt"


def twin(name: str, target: str, folder: Path, *, r: int = 8):
    """A tiny twin with an adapter that does something, and its processor."""
    from peft import LoraConfig, get_peft_model

    processor = sizing.save_processor(name, folder, scale="tiny")
    model = sizing.build_twin(name, processor, scale="tiny", dtype="float32")
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=8, **models.adapter_targets(model, target)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train(), processor


def batch_of(processor, sizes: list[tuple[int, int]]) -> dict:
    """Questions of unequal length about pictures of these heights and widths."""
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    texts = []
    for number in range(len(sizes)):
        content = [{"type": "image"}, {"type": "text", "text": "What is it? " * (number + 1)}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    batch = dict(processor(text=texts, images=[[p] for p in pictures], return_tensors="pt", padding=True))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def loss_and_gradients(model, batch) -> tuple[float, dict]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(before, after) -> bool:
    """Within 1e-4, the loss and each gradient."""
    assert before[1].keys() == after[1].keys() and before[1]
    assert all(gradient.abs().max() > 0 for gradient in before[1].values())
    near = [(before[1][n] - after[1][n]).norm() <= 1e-4 * before[1][n].norm() for n in before[1]]
    return all(near) and after[0] == pytest.approx(before[0], rel=1e-4)


@pytest.mark.parametrize(
    "name, sizes, calls",
    [
        (QWEN3, [(64, 64)] * 3, 2),  # one for each of two layers
        (QWEN3, [(64, 64), (64, 256)], 4),  # one a picture and layer: sizes differ
        (QWEN2, [(56, 84)] * 3, 2),
        (QWEN25, [(56, 56)] * 2, 3),  # its first layer has windows, which are left alone
        (QWEN25, [(56, 56), (56, 140)], None),
    ],
)
def test_pictures_in_one_attention_call(tmp_path, monkeypatch, name, sizes, calls):
    model, processor = twin(name, "all-linear", tmp_path)
    batch = batch_of(processor, sizes)
    assert (len(batch["image_grid_thw"].unique(dim=0)) == 1) == (len(set(sizes)) == 1)
    before = loss_and_gradients(model, batch)
    seen, own = [], torch.nn.functional.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        seen.append(query.shape)
        return own(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    changed = speed.speed_up(model, experts=False)
    assert changed == {"attention": 1 if name == QWEN25 else 2, "experts": 0, "compiled": 0}
    with torch.no_grad():
        model.get_base_model().model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    assert calls is None or len(seen) == calls, seen
    assert same(before, loss_and_gradients(model, batch))


@pytest.mark.parametrize("name", [QWEN3, QWEN2, QWEN25])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_counted_at_once(tmp_path, monkeypatch, name, side):
    """One or two pictures a sample, padding on either side; other batches go the model's own way."""
    model, processor = twin(name, "language", tmp_path)
    core, noise, texts, pictures = model.get_base_model().model, np.random.default_rng(0), [], []
    processor.tokenizer.padding_side, own = side, core.get_rope_index
    for number in range(4):
        some = [{"type": "image"}, {"type": "text", "text": "What is it? " * (number + 1)}] * (1 + number % 2)
        content = [{"type": "text", "text": "So " * number}, *some]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        arrays = [noise.integers(0, 255, (56, 112, 3), dtype=np.uint8) for _ in range(len(some) // 2)]
        pictures.append([Image.fromarray(array) for array in arrays])
    batch = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
    given = {key: batch[key] for key in ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")}
    calls = []
    monkeypatch.setattr(core, "get_rope_index", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    speed.speed_up(model)
    expected, found = own(**given), core.get_rope_index(**given)
    assert not calls and torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])
    given["image_grid_thw"] = given["image_grid_thw"].clone()
    given["image_grid_thw"][0] = given["image_grid_thw"][0][[0, 2, 1]]  # now they differ
    assert torch.equal(own(**given)[0], core.get_rope_index(**given)[0]) and calls


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_positions_without_a_label_are_not_scored(tmp_path, share):
    """As TRL's head does on a GPU; with no label at all, too."""
    from trl.trainer.utils import add_fused_lm_head

    processor = sizing.save_processor(QWEN3, tmp_path, scale="tiny")
    model = sizing.build_twin(QWEN3, processor, scale="tiny", dtype="float32").train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    batch = batch_of(processor, [(64, 64)] * 3) | {"fused_lm_head": True}
    batch["labels"][:, : int(share * batch["labels"].shape[1])] = -100
    scored, before = (batch["labels"][:, 1:] != -100).sum().item(), model(**batch)
    gradients = loss_and_gradients(model, batch)
    speed.speed_up(model)
    after = model(**batch)
    assert before.label_mask.sum() == scored < before.log_probs.numel()
    assert after.label_mask.sum() == scored == after.log_probs.numel()
    assert after.is_top1.sum() == before.is_top1.sum()
    assert after.entropy.sum().item() == pytest.approx(before.entropy.sum().item(), rel=1e-5)
    if scored:
        assert same(gradients, loss_and_gradients(model, batch))
    assert model.eval()(**batch).log_probs.shape == before.log_probs.shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_the_right_needs_no_mask(tmp_path, monkeypatch, side):
    model, processor = twin(QWEN3, "language", tmp_path)
    processor.tokenizer.padding_side, masks = side, []
    batch, attend = batch_of(processor, [(64, 64)] * 3), torch.nn.functional.scaled_dot_product_attention
    assert (batch["attention_mask"] == 0).any()
    before = loss_and_gradients(model, batch)

    def watch(*args, attn_mask=None, is_causal=False, **kwargs):
        masks.append((attn_mask is not None, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    speed.speed_up(model)
    assert same(before, loss_and_gradients(model, batch))
    assert masks[-2:] == ([(False, True)] if side == "right" else [(True, False)]) * 2, masks


def test_modes_and_counts_are_as_before(tmp_path):
    """The walks over all modules that are spared leave the same state."""
    model, _ = twin(QWEN3, "language", tmp_path)
    count = model.get_base_model().num_parameters(exclude_embeddings=True)
    model.get_base_model().eval()  # so a base comes from `from_pretrained`, under a wrapper that says it is training
    model.training = True
    speed.speed_up(model)
    for mode in (True, False, True, True, False):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    assert model.get_base_model().num_parameters(exclude_embeddings=True) == count > 0


@pytest.mark.parametrize("target", ["experts", "attention+experts"])
def test_adapters_of_experts_as_thin_products(tmp_path, target):
    model, processor = twin(EXPERTS, target, tmp_path)
    batch = batch_of(processor, [(64, 64)] * 3)
    before = loss_and_gradients(model, batch)
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch).loss.item()
    assert speed.speed_up(model, attention=False) == {"attention": 0, "experts": 2, "compiled": 0}
    assert same(before, loss_and_gradients(model, batch))
    assert before[0] != pytest.approx(base, rel=1e-4), "or the test says nothing"
    with torch.no_grad(), model.disable_adapter():
        assert model(**batch).loss.item() == pytest.approx(base, rel=1e-6)
    model.merge_adapter()
    assert model(**batch).loss.item() == pytest.approx(before[0], rel=1e-4)


def test_ranks_that_the_kernels_cannot_take_are_left_to_peft(tmp_path):
    model, processor = twin(EXPERTS, "experts", tmp_path, r=4)
    assert speed.speed_up(model)["experts"] == 0
    model(**batch_of(processor, [(64, 64)])).loss.backward()


def test_no_full_size_change_of_experts_is_made(tmp_path, monkeypatch):
    from peft.tuners.lora.layer import ParamWrapper

    model, processor = twin(EXPERTS, "experts", tmp_path)
    speed.speed_up(model)
    monkeypatch.delattr(ParamWrapper, "_activate_lora")
    model(**batch_of(processor, [(64, 64)])).loss.backward()


def test_models_without_such_layers_stay_as_they_are(tmp_path):
    model, processor = twin(GEMMA, "language", tmp_path)
    batch = batch_of(processor, [(64, 64)] * 2)
    before = loss_and_gradients(model, batch)
    assert speed.speed_up(model) == {"attention": 0, "experts": 0, "compiled": 0}
    assert same(before, loss_and_gradients(model, batch))


def test_a_block_with_pictures_in_one_call_is_one_graph(tmp_path):
    """Else compiling it would be of little use; the backend "eager" traces and leaves out the minutes of compiling."""
    model, processor = twin(QWEN3, "all-linear", tmp_path)
    batch = batch_of(processor, [(64, 64)] * 2)
    before = loss_and_gradients(model, batch)
    assert speed.speed_up(model, compiled=True)["compiled"] == 4, "two blocks and two decoder layers"
    core = model.get_base_model().model
    for layer in [*core.visual.blocks, *core.language_model.layers]:
        layer.compile(backend="eager", fullgraph=True)
    assert same(before, loss_and_gradients(model, batch))


def test_layers_of_a_class_are_compiled_once_not_each():
    """Else the limit of recompilations is reached, and what comes later stays uncompiled."""
    from torch._dynamo.utils import counters

    processor, base = models.load_processor(TINY), models.load_base(TINY).train()
    speed.speed_up(base)
    for layer in [*base.model.visual.blocks, *base.model.language_model.layers]:
        layer.compile(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    base(**batch_of(processor, [(64, 64)] * 2), use_cache=False).loss.backward()
    layers = len(base.model.visual.blocks) + len(base.model.language_model.layers)
    assert layers == 13 and counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize(
    "target, checkpointing", [("attention+experts", False), ("attention+experts", True), ("attention", True)]
)
def test_layers_with_experts_are_compiled_in_parts(tmp_path, monkeypatch, target, checkpointing):
    """Their products are not traced, and checkpointing traces a layer whole or leaves all of it uncompiled."""
    from torch._dynamo.utils import counters

    own, compiled = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compiled.append(module) or own(module, backend="eager")
    )
    model, processor = twin(EXPERTS, target, tmp_path)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(processor, [(64, 64)] * 2)
    before = loss_and_gradients(model, batch | {"use_cache": False})
    torch._dynamo.reset()
    counters.clear()
    assert speed.speed_up(model, compiled=True)["compiled"] == 4
    assert same(before, loss_and_gradients(model, batch | {"use_cache": False}))
    kinds = {type(module).__name__ for module in compiled}
    assert {"Qwen3VLMoeTextAttention", "Qwen3VLMoeTextRMSNorm"} < kinds
    assert ("Qwen3VLMoeTextSparseMoeBlock" in kinds) == ("experts" in target), "without thin products it is left alone"
    assert counters["stats"]["unique_graphs"] >= 3 and counters["stats"]["calls_captured"] > 60, counters["stats"]


# ---- through medtune.train


def run(tmp_path, sample_path, name: str, **changes) -> tuple[list[float], Path]:
    """Six steps of training on answers of unequal length; the losses and the folder."""
    data, out = tmp_path / "data", tmp_path / name
    if not data.exists():
        splits = ["train"] * 20 + ["validation"] * 4
        convert.convert_pairs(load_pairs(str(sample_path), limit=24), data, splits=splits)
    settings = {"data": data, "model_name_or_path": TINY, "output_dir": out, "max_steps": 6, "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "save_strategy": "no", "disable_tqdm": True}
    train.main([part for key, value in (settings | changes).items() for part in (f"--{key}", str(value))])
    return [entry["loss"] for entry in json.loads((out / "log.json").read_text()) if "loss" in entry], out


def trainer_of(name, folder: Path, sample_path):
    """A trainer that has six pairs to train on."""
    if name == QWEN2:
        name = sizing.make_twin(QWEN2, folder / "twin", scale="tiny", dtype="float32")
    convert.convert_pairs(load_pairs(str(sample_path), limit=6), folder / "data", splits=["train"] * 6)
    settings = {"data": folder / "data", "model_name_or_path": name, "output_dir": folder / "out"}
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return train.build_trainer(*train.parse_arguments(words))


@pytest.mark.parametrize("name", [TINY, QWEN2])
def test_pixels_as_bytes(tmp_path, sample_path, name):
    """They arrive as the processor would have scaled them; other pixels pass as they are."""
    trainer = trainer_of(name, tmp_path, sample_path)
    rows = [trainer.train_dataset[i] for i in range(4)]
    core, seen = trainer.model.get_base_model().model, []
    scaled = trainer.data_collator([dict(row) for row in rows])
    core.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    assert speed.send_bytes(trainer)
    batch = trainer.data_collator([dict(row) for row in rows])
    assert batch["pixel_values"].dtype == torch.uint8 and scaled["pixel_values"].dtype == torch.float32
    assert all(torch.equal(batch[key], scaled[key]) for key in scaled if key != "pixel_values")
    with torch.no_grad():
        for one in (scaled, batch):
            trainer.model(**one)
    assert torch.allclose(*seen, atol=1e-6) and seen[0].std() > 0.1
    held_out = generate.generate_answers(trainer.model, trainer.processing_class, rows[:2], max_new_tokens=3)
    assert len(held_out) == 2, "a model that was trained on bytes answers"
    before = scaled["pixel_values"]
    assert torch.equal(
        before,
        trainer.processing_class.image_processor([row["images"][0] for row in rows], return_tensors="pt")[
            "pixel_values"
        ],
    )


@pytest.mark.parametrize("name", [TINY, QWEN2])
def test_padding_to_steps_of_length_changes_no_loss(tmp_path, sample_path, name):
    trainer = trainer_of(name, tmp_path, sample_path)
    rows = [dict(trainer.train_dataset[i]) for i in range(3)]
    plain = trainer.data_collator([dict(row) for row in rows])
    width = plain["input_ids"].shape[1]
    padded = speed.pad_lengths(trainer.data_collator, [dict(row) for row in rows], step=width + 5)  # no multiple of it
    assert padded["input_ids"].shape == padded["labels"].shape == (3, width + 5)
    assert all(torch.equal(padded[key][:, :width], plain[key]) for key in plain if plain[key].shape == (3, width))
    assert torch.equal(padded["pixel_values"], plain["pixel_values"])
    assert (padded["labels"][:, width:] == -100).all() and not padded["attention_mask"][:, width:].any()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    for change in (False, True):
        if change:
            speed.speed_up(trainer.model)
        losses = [loss_and_gradients(trainer.model, batch) for batch in (plain, padded)]
        assert same(*losses)


@pytest.mark.slow
def test_fast_training_has_the_same_losses_and_leaves_the_same_adapter(tmp_path, sample_path, capsys):
    from safetensors.torch import load_file

    watch = {"eval_strategy": "steps", "eval_steps": 3, "eval_samples": 4}
    plain, out = run(tmp_path, sample_path, "plain", **watch)
    adapter = load_file(out / "model" / "adapter_model.safetensors")
    for name in ("fast", "cached", "cached again"):
        keys = {"fast": True} | watch | ({"cache_features": True} if "cached" in name else {})
        losses, out = run(tmp_path, sample_path, name, **keys)
        said = capsys.readouterr().out
        assert ("medtune.train: features of" in said) == (name == "cached"), "what is there is reused"
        assert losses == pytest.approx(plain, rel=1e-4)
        other = load_file(out / "model" / "adapter_model.safetensors")
        assert adapter.keys() == other.keys()
        # by norm, as in notebook 04: Adam makes whole steps of gradients that are next to nothing but rounding
        assert all((adapter[key] - other[key]).norm() <= 1e-3 * adapter[key].norm() for key in adapter)
        models.load_tuned(models.load_base(TINY), out / "model")
        models.load_processor(out / "model")


@pytest.mark.slow
def test_features_of_a_model_without_deepstack(tmp_path, sample_path):
    other = sizing.make_twin(QWEN25, tmp_path / "twin", scale="tiny", dtype="float32")
    plain, _ = run(tmp_path, sample_path, "plain", model_name_or_path=other)
    cached, _ = run(tmp_path, sample_path, "cached", model_name_or_path=other, cache_features=True)
    assert cached == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_features_are_for_a_frozen_tower_of_qwen(tmp_path, sample_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, sample_path, "out", cache_features=True, target="language+vision")
    gemma = sizing.make_twin(GEMMA, tmp_path / "gemma", scale="tiny", dtype="float32")
    with pytest.raises(SystemExit):
        run(tmp_path, sample_path, "gemma-out", cache_features=True, model_name_or_path=gemma)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("medtune.train:")]
    assert len(said) == 2 and all("vision tower and merger frozen" in line for line in said)


@pytest.mark.slow
def test_other_weights_or_sizes_have_features_of_their_own(tmp_path, sample_path):
    run(tmp_path, sample_path, "one", cache_features=True, max_steps=1)
    run(tmp_path, sample_path, "two", cache_features=True, max_steps=1, max_pixels=128 * 128)
    folders = sorted((tmp_path / "data" / "features").iterdir())
    assert len(folders) == 2 and len({len(list(folder.iterdir())) for folder in folders}) == 1
    small, large = sorted(sum(f.stat().st_size for f in folder.iterdir()) for folder in folders)
    assert small < 0.5 * large


def test_adapters_in_float32_are_multiplied_in_bfloat16_under_autocast():
    """So with `bf16` the adapters' precision decides what the optimizer sees, not how fast the products are."""
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name():
                seen.update(a.dtype for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    base = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    with Watch():
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        assert seen == {torch.bfloat16}
        model(x).sum().backward()
        assert seen == {torch.bfloat16, torch.float32}, "without autocast they are multiplied in float32"


@pytest.mark.slow
def test_the_benchmark_rehearses_its_rungs(tmp_path):
    """One of each kind, with tiny twins; a second start does nothing again."""
    import subprocess
    import sys

    script = Path(__file__).parents[1] / "benchmarks" / "train.py"
    rungs = ["naive", "fast96_features", "moe_fast8", "gemma_tied", "generate64_static"]
    command = [sys.executable, script, tmp_path, "--small", "--steps", "4", "--rungs", ",".join(rungs)]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["rung"] for row in rows] == rungs and not any("error" in row for row in rows), rows
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=0.1)
    assert all(row["samples_per_second"] > 0 for row in rows) and rows[0]["mfu_percent"] >= 0
    subprocess.run(command, check=True, capture_output=True)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rungs)
    assert (tmp_path / "table.md").read_text().count("\n") == len(rungs) + 2


def test_the_decision_on_adapters_rests_on_its_runs():
    """float32 stays the default as long as bfloat16 ends clearly higher at some learning rate."""
    folder = Path(__file__).parents[1] / "papermill_runs" / "reference" / "adapter-precision"
    summary = json.loads((folder / "result.json").read_text())["summary"]
    worst = max(min(row["relative_difference"]) for row in summary.values())
    assert all(len(row["seeds"]) == 3 for row in summary.values()) and worst > 0.02
    assert train.ScriptArguments(data="x").autocast_adapter_dtype
