from pathlib import Path

import pytest
from small_states import save, trained_state

from msf_faiss.train.state import TrainState


@pytest.fixture(scope="session")
def state() -> TrainState:
    return trained_state()


@pytest.fixture
def saved(tmp_path: Path, state: TrainState) -> Path:
    """A checkpoint in a run directory."""
    return save(tmp_path / "run", state)
