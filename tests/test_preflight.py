"""Each check passes on a sound setup and fails on the fault it is there for."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from test_models import models, tiny_folder, tuned

from medtune import preflight

ANSWERS = ["The spleen.", "The image is a computed tomography scan of the upper abdomen.", "A CT.", "No image at all."]


def rows():
    """Prompt, completion and a picture, as notebook 02 writes them."""
    from PIL import Image

    image = Image.effect_mandelbrot((256, 256), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}
    return [
        {
            "prompt": [question],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
            "images": [image.resize((256, 256 - 64 * number))],
        }
        for number, answer in enumerate(ANSWERS)
    ]


def collate(processor, **options):
    """A batch from TRL's own collator."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    options = {"completion_only_loss": True} | options
    return DataCollatorForVisionLanguageModeling(processor, **options)(copy.deepcopy(rows()))


@pytest.fixture(scope="module")
def processor():
    return models.load_processor(tiny_folder())


@pytest.fixture
def batch(processor):
    return collate(processor)


def trainer(tmp_path, processor, model, **options):
    """TRL's trainer on the four rows."""
    import datasets
    import trl

    settings = {"per_device_train_batch_size": 4, "max_length": None, "bf16": False, "report_to": "none"}
    settings |= {"activation_checkpointing": False, "disable_tqdm": True, "use_cpu": True}
    config = trl.SFTConfig(output_dir=str(tmp_path), **settings | options)
    data = datasets.Dataset.from_list(rows())
    return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=processor)


# --- labels --------------------------------------------------------------------------------------------------------


def test_labels_cover_the_answers(batch, processor):
    result = preflight.check_labels(batch, processor, ANSWERS)
    assert result["first"] == "The spleen.<|im_end|>\n"
    assert result["rows"] == 4
    assert result["answer_tokens"] == (batch["labels"] != -100).sum(1).tolist()


def test_labels_on_the_prompt_are_found(processor):
    whole = collate(processor, completion_only_loss=False)
    with pytest.raises(ValueError, match="Image tokens are among the labels"):
        preflight.check_labels(whole, processor, ANSWERS)
    whole["labels"][whole["labels"] == processor.image_token_id] = -100
    with pytest.raises(ValueError, match="Row 0: the labels are not the answer") as error:
        preflight.check_labels(whole, processor, ANSWERS)
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
        preflight.check_labels(batch, processor, ANSWERS)


def test_answers_of_other_rows_are_found(batch, processor):
    with pytest.raises(ValueError, match="Row 0"):
        preflight.check_labels(batch, processor, ANSWERS[::-1])
    with pytest.raises(ValueError, match="4 rows in the batch, but 1 answers"):
        preflight.check_labels(batch, processor, ANSWERS[:1])


# --- image tokens --------------------------------------------------------------------------------------------------


def test_image_tokens_agree_with_the_grid(batch, processor):
    result = preflight.check_image_tokens(batch, processor)
    grid = batch["image_grid_thw"]
    assert result == {"pictures": 4, "image_tokens": (grid[:, 1] * grid[:, 2] // 4).tolist()}
    assert len(set(result["image_tokens"])) > 1, "pictures of different shape"


def test_cut_pictures_are_found(processor):
    with pytest.raises(ValueError, match="set max_length=None"):
        preflight.check_image_tokens(collate(processor, max_length=30), processor)


@pytest.mark.parametrize("fault", ["lost token", "lost picture", "other grid"])
def test_image_tokens_that_do_not_fit_are_found(batch, processor, fault):
    is_image = batch["input_ids"] == processor.image_token_id
    if fault == "lost token":
        batch["input_ids"][0, int(is_image[0].nonzero()[0])] = 0
    elif fault == "lost picture":
        batch["input_ids"][0, is_image[0]] = 0
    else:
        batch["image_grid_thw"][1, 1] += 2
    with pytest.raises(ValueError, match="the pictures need"):
        preflight.check_image_tokens(batch, processor)


# --- gradients -----------------------------------------------------------------------------------------------------


def fresh(which="language+merger", **options):
    """An adapter as training starts: B is zero."""
    import peft

    base = models.load_base(tiny_folder())
    return peft.get_peft_model(base, peft.LoraConfig(r=2, **models.adapter_targets(base, which), **options))


def test_every_group_gets_a_gradient_and_the_model_is_left_alone(batch):
    model = fresh("all-linear", lora_dropout=0.1).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    random = torch.random.get_rng_state()
    groups = preflight.check_gradients(model, batch)
    assert groups.keys() == {"language attention", "language MLP", "merger", "vision"}
    assert sum(group["tensors"] for group in groups.values()) == sum("lora_" in name for name in before)
    assert all(group["norm"] > 0 for group in groups.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert not model.training
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    assert torch.equal(random, torch.random.get_rng_state())


def test_frozen_group_is_found(batch):
    model = fresh()
    for name, parameter in model.named_parameters():
        if "mlp" in name and "language_model" in name:
            parameter.requires_grad = False
    with pytest.raises(ValueError, match="Adapter frozen in language MLP"):
        preflight.check_gradients(model, batch)
    with pytest.raises(ValueError, match="Nothing is trained"):
        preflight.check_gradients(models.load_base(tiny_folder()).requires_grad_(False), batch)


def test_adapter_that_nothing_reaches_is_found(batch):
    model = fresh()
    layer = model.get_submodule("base_model.model.model.language_model.layers.1.self_attn.v_proj")
    layer.forward = layer.base_layer.forward  # a kernel that goes past the adapter
    with pytest.raises(ValueError, match="No gradient in language attention: .*layers.1.self_attn.v_proj"):
        preflight.check_gradients(model, batch)


def test_adapter_cut_off_by_gradient_checkpointing_is_found(batch):
    """Reentrant checkpointing passes no gradient on unless the embeddings are made to ask for one."""
    model = fresh("attention")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises((ValueError, RuntimeError)):
        preflight.check_gradients(model, batch)


# --- accumulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_accumulation_agrees_once_tokens_are_counted(tmp_path, processor, dropout):
    sft = trainer(tmp_path, processor, fresh("language", lora_dropout=dropout))
    with pytest.raises(ValueError, match="model_accepts_loss_kwargs = True"):
        preflight.check_accumulation(sft, rows())
    sft.model_accepts_loss_kwargs = True
    result = preflight.check_accumulation(sft, rows())
    assert result["loss_batch"] == pytest.approx(result["loss_accumulated"], rel=1e-5)
    assert len(result["answer_tokens"]) == 4
    assert not sft._metrics["train"], "the check leaves no trace in the log"
    assert all(parameter.grad is None for parameter in sft.model.parameters())


def test_accumulation_needs_answers_of_unequal_length(tmp_path, processor):
    sft = trainer(tmp_path, processor, fresh("attention"))
    with pytest.raises(ValueError, match="cannot show it"):
        preflight.check_accumulation(sft, [rows()[0]] * 4)


# --- reload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantised", [False, True])
def test_reloaded_adapter_gives_the_same_logits(tmp_path, processor, batch, quantised):
    config = models.nf4_config() if quantised else None
    model = tuned(base=models.load_base(tiny_folder(), dtype="bfloat16", quantization_config=config))
    if quantised:  # as TRL does for QLoRA
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(torch.bfloat16) if "lora_" in name else parameter.data
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    assert preflight.check_reload(tiny_folder(), tmp_path / "adapter", model, batch)["max_abs_diff"] == 0


def test_adapter_of_an_earlier_step_is_found(tmp_path, processor, batch):
    model = tuned()
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.01
    with pytest.raises(ValueError, match="does not give back the model in memory"):
        preflight.check_reload(tiny_folder(), tmp_path / "adapter", model, batch)


def test_adapter_with_renamed_modules_is_found(tmp_path, processor, batch):
    from safetensors.torch import load_file, save_file

    model = tuned()
    models.save_model(model, processor, tmp_path / "adapter", card="c")
    file = Path(shutil.copytree(tmp_path / "adapter", tmp_path / "renamed")) / "adapter_model.safetensors"
    save_file({key.replace("language_model", "model"): value for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="28 missing keys"):
        preflight.check_reload(tiny_folder(), tmp_path / "renamed", model, batch)


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, processor):
    """Adapter, optimizer, learning rate and order of the samples come back from a checkpoint."""
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "seed": 3, "learning_rate": 1e-2}

    def train(folder, checkpoint=None):
        torch.manual_seed(0)
        sft = trainer(folder, processor, fresh("attention", lora_dropout=0.1), **options)
        sft.model_accepts_loss_kwargs = True
        sft.train(resume_from_checkpoint=checkpoint)
        return {name: value.clone() for name, value in sft.model.named_parameters() if "lora_" in name}

    whole = train(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.items():
        torch.testing.assert_close(value, resumed[name], rtol=0, atol=0)
