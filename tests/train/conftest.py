"""A finished run, which tests must not change."""

from pathlib import Path

import pytest
from small_runs import CONFIG, run

from msf_faiss.run.events import Event


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    return run_dir, run(CONFIG, run_dir)
