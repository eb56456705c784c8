"""What every test needs: no hub, no telemetry, no windows, and where things lie."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    # hashes of ids and patients are the same on every machine
    MEDTUNE_SALT="of the tests",
)

# Whoever sets up logging anew, as uvicorn does, makes absl close the stream that it was imported with.
# That would be pytest's own.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

REPO = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that may take longest, so that no worker waits for one at the end."""
    longest: dict[Path, float] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        seconds = limit.args[0] if limit and limit.args else 0
        longest[item.path] = max(seconds, longest.get(item.path, 0))
    items.sort(key=lambda item: -longest[item.path])


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository."""
    return REPO


def built(name: str) -> Path:
    """A data set that `make sample` builds."""
    path = REPO / "data" / name / f"{name}.parquet"
    if not path.exists():
        pytest.fail(f"{path} is not built: run 'make sample' first")
    return path


@pytest.fixture(scope="session")
def sample_path() -> Path:
    """The built sample set."""
    return built("sample")


@pytest.fixture(scope="session")
def volumes_path() -> Path:
    """The built questions about slabs."""
    return built("volumes")


@pytest.fixture(scope="session")
def tiny_vlm() -> Path:
    """The folder of the tiny base model."""
    return REPO / "data" / "tiny-vlm"


@pytest.fixture(scope="session")
def real() -> Path:
    """Real medical pictures beside the clone, which only some machines have."""
    path = REPO.parent / "shared" / "real"
    if not path.is_dir():
        pytest.skip("no real pictures beside this clone")
    return path


@pytest.fixture(scope="session")
def small_adapter(tiny_vlm, sample_path, tmp_path_factory) -> Path:
    """An adapter on the tiny base after some steps on four captions: enough to answer otherwise,
    and in whole words.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from medtune import models
    from medtune.pairs import load_pairs

    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    torch.manual_seed(0)
    processor, base = models.load_processor(tiny_vlm), models.load_base(tiny_vlm)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, **models.adapter_targets(base)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    rows = load_pairs(sample_path, split="train", limit=4)
    for step in range(60):
        row, zh = rows[step % 4], step % 2
        question = {
            "type": "text",
            "text": "请描述这张医学图像。" if zh else "Describe this medical image.",
        }
        turns = [{"role": "user", "content": [{"type": "image"}, question]}]
        turns += [
            {
                "role": "assistant",
                "content": [{"type": "text", "text": row["caption_zh" if zh else "caption"]}],
            }
        ]
        prompt = processor.apply_chat_template(
            turns[:1], tokenize=False, add_generation_prompt=True
        )
        text = processor.apply_chat_template(turns, tokenize=False)
        batch = processor(text=[text], images=[[row["image"]]], return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[
            :,
            : processor(text=[prompt], images=[[row["image"]]], return_tensors="pt")[
                "input_ids"
            ].shape[1],
        ] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models.save_model(model, processor, folder, card="for tests")
    return folder


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A headless browser that asks nobody but the page; Debian's, for Playwright's own must be
    downloaded.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no browser here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "quic", "sync")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()
