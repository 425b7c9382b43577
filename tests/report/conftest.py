"""Fixtures for tests of reports."""

from pathlib import Path

import pytest
from runs_on_disk import MakeRun, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return lambda name="run", *arguments, **options: write_run(tmp_path / name, *arguments, **options)
