"""Fixtures that several folders of tests share."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from pool import RankPool

from msf_faiss.search.faiss_setup import set_threads

_CHROMIUM = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Tests run side by side; a thread pool for each of them on the same few cores makes all of them many times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test fetches anything
set_threads(1)


def pytest_collection_finish() -> None:
    """Keep the libraries, and the thousands of tests, out of every garbage collection: each would take a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the project's real images (see its README)."""
    folder = Path(os.environ.get("MSF_FAISS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10_train.parquet").is_file():
        pytest.skip(f"the real test images are not at {folder}; set MSF_FAISS_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window, one for all tests of a process: Playwright allows no second one beside it."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((found for name in names if (found := shutil.which(name))), None)
    if executable is None:
        if os.environ.get("MSF_FAISS_REQUIRE_BROWSER") == "1":
            pytest.fail(f"no browser: none of {', '.join(names)} is installed")
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(_CHROMIUM))
        yield started
        started.close()


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes that are the ranks of a test."""
    ranks = RankPool(tmp_path_factory.mktemp("pool"))
    yield ranks
    ranks.close()
