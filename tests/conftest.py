"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import RankPool

from msf_faiss.bank.faiss_setup import set_threads

# Tests run side by side; a thread pool for each of them on the same few cores makes all of them many times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test fetches anything
set_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the project's real images (see its README)."""
    folder = Path(os.environ.get("MSF_FAISS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10_train.parquet").is_file():
        pytest.skip(f"the real test images are not at {folder}; set MSF_FAISS_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Processes that are the ranks of a test."""
    ranks = RankPool(tmp_path_factory.mktemp("pool"))
    yield ranks
    ranks.close()
