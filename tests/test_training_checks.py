"""Each check passes on a sound setup and fails on the fault it is there for."""

import copy
import shutil
from pathlib import Path

import datasets
import peft
import pytest
import torch
import trl
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import QWEN3
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from medtune import models, plan, training
from medtune.training import checks

ANSWERS = [
    "The spleen.",
    "The image is a computed tomography scan of the upper abdomen.",
    "A CT.",
    "No image at all.",
]


def rows() -> list[dict]:
    """Prompt, completion and a picture, as notebook 02 writes them."""
    image = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    question = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    found = []
    for number, answer in enumerate(ANSWERS):
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        found.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [turn],
                "images": [image.resize((256, 256 - 64 * number))],
            }
        )
    return found


def collate(processor, **options):
    """A batch from TRL's own collator."""
    options = {"completion_only_loss": True} | options
    return DataCollatorForVisionLanguageModeling(processor, **options)(copy.deepcopy(rows()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with random weights, as a folder."""
    place = tmp_path_factory.mktemp("model") / "twin"
    return Path(plan.make_twin(QWEN3, place, scale="tiny", dtype="float32"))


@pytest.fixture(scope="module")
def processor(folder):
    return models.load_processor(folder)


@pytest.fixture
def batch(processor):
    return collate(processor)


def fresh(folder: Path, which: str = "language+merger", **options):
    """A model with an adapter as training starts: B is zero."""
    base = models.load_base(folder)
    config = peft.LoraConfig(r=2, **models.adapter_targets(base, which), **options)
    return peft.get_peft_model(base, config)


def tuned(base):
    """A base model with an adapter that does something."""
    config = peft.LoraConfig(r=4, lora_alpha=8, **models.adapter_targets(base, "language+merger"))
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model


def trainer(tmp_path, processor, model, **options):
    """TRL's trainer on the four rows."""
    settings = {
        "per_device_train_batch_size": 4,
        "max_length": None,
        "bf16": False,
        "report_to": "none",
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path), **settings | options),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=processor,
    )


# ---- labels


def test_labels_cover_the_answers(batch, processor):
    result = training.check_labels(batch, processor, ANSWERS)
    assert training.answer_end(processor) == "<|im_end|>\n"
    assert result["first"] == "The spleen.<|im_end|>\n"
    assert result["rows"] == 4
    assert result["answer_tokens"] == (batch["labels"] != -100).sum(1).tolist()


def test_labels_on_the_prompt_are_found(processor):
    whole = collate(processor, completion_only_loss=False)
    with pytest.raises(ValueError, match="Image tokens are among the labels"):
        training.check_labels(whole, processor, ANSWERS)
    whole["labels"][whole["labels"] == models.image_token_id(processor)] = -100
    with pytest.raises(ValueError, match="Row 0: the labels are not the answer") as error:
        training.check_labels(whole, processor, ANSWERS)
    assert "from character 0 on they read '<|im_start|>user" in str(error.value)
    assert "\n" not in str(error.value)


def drop_end(batch, processor):
    batch["labels"][batch["labels"] == processor.tokenizer.eos_token_id] = -100


def cut_answer(batch, processor):
    end = int((batch["labels"][1] != -100).nonzero()[-1])
    batch["labels"][1, end - 4 :] = -100


def shift(batch, processor):
    batch["labels"] = torch.roll(batch["labels"], 1, dims=1)


def mask_all(batch, processor):
    batch["labels"][:] = -100


def teach_one_prompt_token(batch, processor):
    start = int((batch["labels"][2] != -100).nonzero()[0]) - 1
    batch["labels"][2, start] = batch["input_ids"][2, start]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (drop_end, "Row 0: the labels are not the answer"),
        (cut_answer, "Row 1: the labels are not the answer"),
        (shift, "not the tokens of the input"),
        (mask_all, "Row 0: .* they read '' instead of 'The spleen"),
        (teach_one_prompt_token, "Row 2: the labels are not the answer"),
    ],
)
def test_faulty_labels_are_found(batch, processor, fault, message):
    fault(batch, processor)
    with pytest.raises(ValueError, match=message):
        training.check_labels(batch, processor, ANSWERS)


def test_answers_of_other_rows_are_found(batch, processor):
    with pytest.raises(ValueError, match="Row 0"):
        training.check_labels(batch, processor, ANSWERS[::-1])
    with pytest.raises(ValueError, match="4 rows in the batch, but 1 answers"):
        training.check_labels(batch, processor, ANSWERS[:1])


def test_what_the_labels_have_too_much_is_shown(processor):
    """An answer that is only the beginning of what the labels teach."""
    whole = collate(processor)
    shorter = [ANSWERS[0], ANSWERS[1].removesuffix(" abdomen."), *ANSWERS[2:]]
    with pytest.raises(ValueError, match="Row 1: .* they read ' abdomen"):
        training.check_labels(whole, processor, shorter)
    assert checks._first_difference("liver and spleen", "liver") == 5


# ---- image tokens


def test_image_tokens_agree_with_the_grid(batch, processor):
    result = training.check_image_tokens(batch, processor)
    grid = batch["image_grid_thw"]
    assert result == {"pictures": 4, "image_tokens": (grid[:, 1] * grid[:, 2] // 4).tolist()}
    assert len(set(result["image_tokens"])) > 1, "pictures of different shape"


def test_cut_pictures_are_found(processor):
    with pytest.raises(ValueError, match="set max_length=None"):
        training.check_image_tokens(collate(processor, max_length=8), processor)


@pytest.mark.parametrize("fault", ["lost token", "lost picture", "other grid"])
def test_image_tokens_that_do_not_fit_are_found(batch, processor, fault):
    is_image = batch["input_ids"] == models.image_token_id(processor)
    if fault == "lost token":
        batch["input_ids"][0, int(is_image[0].nonzero()[0])] = 0
    elif fault == "lost picture":
        batch["input_ids"][0, is_image[0]] = 0
    else:
        batch["image_grid_thw"][1, 1] += 2
    with pytest.raises(ValueError, match="the pictures need"):
        training.check_image_tokens(batch, processor)


# ---- gradients


def test_every_group_gets_a_gradient_and_the_model_is_left_alone(folder, batch):
    model = fresh(folder, "all-linear", lora_dropout=0.1).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    random = torch.random.get_rng_state()
    groups = training.check_gradients(model, batch, part_of=models.part_of)
    assert groups.keys() == {"language attention", "language MLP", "merger", "vision"}
    adapters = [name for name in before if "lora_" in name]
    assert sum(group["tensors"] for group in groups.values()) == len(adapters)
    assert all(group["norm"] > 0 for group in groups.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert not model.training
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert {module.p for module in dropouts} == {0.1}
    assert torch.equal(random, torch.random.get_rng_state())


def test_parts_are_told_apart_without_a_rule_of_the_caller(folder, batch):
    model = fresh(folder, "all-linear")
    groups = training.check_gradients(model, batch)
    assert groups.keys() == {"language", "merger", "vision"}
    finer = training.check_gradients(model, batch, part_of=models.part_of)
    for part in ("merger", "vision"):
        assert groups[part] == finer[part]


def test_frozen_group_is_found(folder, batch):
    model = fresh(folder)
    for name, parameter in model.named_parameters():
        if "mlp" in name and "language_model" in name:
            parameter.requires_grad = False
    with pytest.raises(ValueError, match="Adapter frozen in language MLP"):
        training.check_gradients(model, batch, part_of=models.part_of)
    with pytest.raises(ValueError, match="Nothing is trained"):
        training.check_gradients(models.load_base(folder).requires_grad_(False), batch)


def test_adapter_that_nothing_reaches_is_found(folder, batch):
    model = fresh(folder)
    name = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    layer = model.get_submodule(name)
    # a kernel that goes past the adapter
    layer.forward = layer.base_layer.forward
    message = "No gradient in language attention: .*layers.1.self_attn.v_proj"
    with pytest.raises(ValueError, match=message):
        training.check_gradients(model, batch, part_of=models.part_of)


def test_adapter_cut_off_by_gradient_checkpointing_is_found(folder, batch):
    """Reentrant checkpointing passes no gradient on unless the embeddings ask for one."""
    model = fresh(folder, "attention")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises((ValueError, RuntimeError)),
    ):
        training.check_gradients(model, batch)


# ---- accumulation


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_accumulation_agrees_once_tokens_are_counted(tmp_path, folder, processor, dropout):
    sft = trainer(tmp_path, processor, fresh(folder, "language", lora_dropout=dropout))
    with pytest.raises(ValueError, match="model_accepts_loss_kwargs = True"):
        training.check_accumulation(sft, rows())
    sft.model_accepts_loss_kwargs = True
    result = training.check_accumulation(sft, rows())
    assert result["loss_batch"] == pytest.approx(result["loss_accumulated"], rel=1e-5)
    assert len(result["answer_tokens"]) == 4
    assert not sft._metrics["train"], "the check leaves no trace in the log"
    assert all(parameter.grad is None for parameter in sft.model.parameters())


def test_accumulation_needs_answers_of_unequal_length(tmp_path, folder, processor):
    sft = trainer(tmp_path, processor, fresh(folder, "attention"))
    with pytest.raises(ValueError, match="cannot show it"):
        training.check_accumulation(sft, [rows()[0]] * 4)


# ---- reload


@pytest.mark.parametrize("quantised", [False, True])
def test_reloaded_adapter_gives_the_same_logits(tmp_path, folder, processor, batch, quantised):
    config = models.nf4_config() if quantised else None
    model = tuned(models.load_base(folder, dtype="bfloat16", quantization_config=config))
    if quantised:
        # as TRL does for QLoRA
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    result = training.check_reload(folder, tmp_path / "adapter", model, batch)
    assert result["max_abs_diff"] == 0


def test_adapter_of_an_earlier_step_is_found(tmp_path, folder, processor, batch):
    model = tuned(models.load_base(folder))
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01
    with pytest.raises(ValueError, match="does not give back the model in memory"):
        training.check_reload(folder, tmp_path / "adapter", model, batch)


def test_adapter_with_renamed_modules_is_found(tmp_path, folder, processor, batch):
    model = tuned(models.load_base(folder))
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    shutil.copytree(tmp_path / "adapter", tmp_path / "renamed")
    file = tmp_path / "renamed" / "adapter_model.safetensors"
    renamed = {}
    for key, value in load_file(file).items():
        renamed[key.replace("language_model", "model")] = value
    save_file(renamed, file)
    # A and B of seven layers in each of two decoder layers
    with pytest.raises(ValueError, match="28 missing keys"):
        training.check_reload(folder, tmp_path / "renamed", model, batch)


# ---- resume


@pytest.mark.slow
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, folder, processor):
    """Adapter, optimizer, learning rate and order of the samples come back from a checkpoint."""
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 1,
        "seed": 3,
        "learning_rate": 1e-2,
    }

    def train(out, checkpoint=None):
        torch.manual_seed(0)
        model = fresh(folder, "attention", lora_dropout=0.1)
        sft = trainer(out, processor, model, **options)
        sft.model_accepts_loss_kwargs = True
        sft.train(resume_from_checkpoint=checkpoint)
        learned = {}
        for name, value in sft.model.named_parameters():
            if "lora_" in name:
                learned[name] = value.clone()
        return learned

    whole = train(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.items():
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=0)
