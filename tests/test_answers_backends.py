"""medtune.answers.backends: the attention is left as it was, and vLLM is asked in its own words."""

import sys
import types

import pytest
import tiny_qwen

from medtune.answers import generate_answers


@pytest.fixture(scope="module")
def processor():
    return tiny_qwen.make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return tiny_qwen.make_model(processor)


@pytest.fixture(scope="module")
def records():
    return tiny_qwen.make_records()


def test_a_static_cache_leaves_the_attention_as_it_was(model, processor, records, monkeypatch):
    """In between, heads that share keys are queries of one head; an error changes nothing."""
    text = model.config.text_config
    assert text.num_attention_heads > text.num_key_value_heads
    assert text._attn_implementation == "sdpa"
    used = []
    set_attention = type(model).set_attn_implementation

    def note(way):
        used.append(way)
        set_attention(model, way)

    monkeypatch.setattr(model, "set_attn_implementation", note)
    options = {"max_new_tokens": 2, "cache_implementation": "static"}
    generate_answers(model, processor, records, batch_size=11, **options)
    assert used == [{"text_config": "folded"}, {"text_config": "sdpa"}]
    assert text._attn_implementation == "sdpa"
    with pytest.raises(TypeError):
        generate_answers(model, processor, records, top_k="many", **options)
    assert text._attn_implementation == "sdpa"


class SamplingParams(dict):
    """Stands in for vLLM's, which needs a GPU."""

    def __init__(self, **options):
        super().__init__(options)


class LLM:
    """Stands in for vLLM's: it says the end of the prompt, in two tokens."""

    def __init__(self, path):
        self.path = path

    def generate(self, prompts, parameters, use_tqdm):
        assert parameters["max_tokens"] == 5
        assert parameters["temperature"] == 0.0
        requests = []
        for prompt in prompts:
            assert prompt["multi_modal_data"]["image"][0].size
            said = types.SimpleNamespace(text=prompt["prompt"][-30:], token_ids=[1, 2])
            requests.append(types.SimpleNamespace(outputs=[said]))
        return requests


def test_unknown_backend(processor, records):
    with pytest.raises(ValueError, match="backend='vLLM': use 'transformers', 'vllm' or 'openai'"):
        generate_answers("no/model", processor, records, backend="vLLM")


def test_vllm_is_asked_for_by_name(processor, records, monkeypatch):
    with pytest.raises(ImportError, match="pip install vllm"):
        generate_answers("no/model", processor, records, backend="vllm")
    vllm = types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    options = {"backend": "vllm", "max_new_tokens": 5}
    answers = generate_answers("no/model", processor, records, **options)
    assert len(answers) == 11
    assert answers[0]["answer"].endswith("<|im_start|>assistant")
    assert answers[0]["tokens"] == 2
