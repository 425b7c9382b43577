"""Fixtures that several folders of tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the project's real images (see its README)."""
    folder = Path(os.environ.get("MSF_FAISS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "cifar10_train.parquet").is_file():
        pytest.skip(f"the real test images are not at {folder}; set MSF_FAISS_TEST_DATA")
    return folder
