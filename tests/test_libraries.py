"""The libraries still take the arguments that the course gives them."""

import inspect

import peft
import pytest
import transformers
import trl

USED = {
    transformers.BitsAndBytesConfig: """
        load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype
        bnb_4bit_quant_storage""",
    peft.LoraConfig: """
        r lora_alpha lora_dropout bias target_modules target_parameters modules_to_save
        use_rslora use_dora task_type""",
    trl.SFTConfig: """
        output_dir learning_rate lr_scheduler_type warmup_steps max_steps num_train_epochs
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        activation_checkpointing activation_checkpointing_kwargs max_grad_norm max_length
        completion_only_loss bf16 tf32 optim seed data_seed logging_steps eval_strategy
        eval_steps eval_on_start save_strategy save_steps save_total_limit report_to
        dataloader_num_workers dataloader_pin_memory remove_unused_columns disable_tqdm
        deepspeed use_cpu""",
    trl.SFTTrainer: """
        model args train_dataset eval_dataset processing_class peft_config callbacks
        data_collator""",
    transformers.Trainer.train: "resume_from_checkpoint",
    transformers.Trainer.get_batch_samples: "epoch_iterator num_batches device",
    transformers.Trainer.training_step: "model inputs num_items_in_batch",
    transformers.GenerationMixin.generate: "generation_config",
    transformers.ProcessorMixin.apply_chat_template: "conversation processor_kwargs",
    peft.PeftModel.load_adapter: "model_id adapter_name",
    peft.tuners.lora.LoraModel.merge_and_unload: "safe_merge",
}


@pytest.mark.parametrize("function", USED, ids=lambda function: function.__qualname__)
def test_libraries_still_take_the_arguments_we_use(function):
    """A renamed argument shows here, by name, before it shows somewhere in a notebook."""
    missing = set(USED[function].split()) - inspect.signature(function).parameters.keys()
    assert not missing, f"{function.__qualname__} no longer takes {sorted(missing)}"


def test_generation_still_has_the_settings_we_use():
    for field in ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams"):
        assert hasattr(transformers.GenerationConfig(), field), field


def test_qwen3_vl_still_does_not_count_tokens():
    counts = transformers.Qwen3VLForConditionalGeneration.accepts_loss_kwargs
    assert counts is False, "the trap is gone: say so in 03"
