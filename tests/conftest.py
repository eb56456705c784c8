"""What every test needs: no hub, no telemetry, no windows, and where things lie."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository."""
    return REPO


@pytest.fixture(scope="session")
def sample_path() -> Path:
    """The built sample set; `make sample` builds it."""
    path = REPO / "data" / "sample" / "sample.parquet"
    if not path.exists():
        pytest.fail("the sample set is not built: run 'make sample' first")
    return path


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
def chromium() -> Iterator:
    """A headless browser that asks nobody but the page; Debian's, for Playwright's own must be downloaded."""
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
