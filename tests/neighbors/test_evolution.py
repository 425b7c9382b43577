"""The choice of checkpoints for an evolution."""

import shutil
from pathlib import Path

import pytest
from checkpoints import config_of, save, write_images

from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.errors import UserError
from msf_faiss.neighbors.evolution import earlier_checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with six checkpoints."""
    folder = tmp_path_factory.mktemp("evolution")
    (folder / "images").mkdir()
    config = config_of(write_images(folder / "images"))
    for step in range(2, 14, 2):
        save(folder / "run", config, [*range(0, 20, 2)], step=step, seed=step)
    return folder / "run"


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> list[Checkpoint]:
    """The checkpoints of a copy of the run."""
    copied = shutil.copytree(saved, tmp_path / "run")
    return [find_checkpoint(path) for path in sorted((copied / "checkpoints").iterdir())]


@pytest.mark.parametrize(
    ("count", "steps"),
    [(2, [2]), (3, [2, 6]), (4, [2, 6, 8]), (6, [2, 4, 6, 8, 10]), (50, [2, 4, 6, 8, 10])],
)
def test_first_checkpoint_and_others_at_even_distances(run: list[Checkpoint], count: int, steps: list[int]) -> None:
    assert [checkpoint.step for checkpoint in earlier_checkpoints(run[-1], count, "bank", print)] == steps


def test_later_checkpoints_are_not_used(run: list[Checkpoint]) -> None:
    assert [checkpoint.step for checkpoint in earlier_checkpoints(run[2], 6, "bank", print)] == [2, 4]


def test_damaged_checkpoints_are_skipped(run: list[Checkpoint]) -> None:
    (run[0].path / "manifest.json").write_text("{")
    model = run[1].path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    bank = run[2].path / "bank.safetensors"
    bank.write_bytes(bank.read_bytes()[:-1] + b"x")
    notes: list[str] = []
    assert [checkpoint.step for checkpoint in earlier_checkpoints(run[4], 6, "bank", notes.append)] == [8]
    assert [note.split(": ")[0].split("/")[-1] for note in notes] == [f"step-0000000{step}" for step in (2, 4, 6)]
    assert all(note.startswith("skipping ") for note in notes)
    without_bank = earlier_checkpoints(run[4], 6, "dataset", print)
    assert [checkpoint.step for checkpoint in without_bank] == [6, 8]
    with pytest.raises(
        UserError, match=r"at least two checkpoints, found only step-00000008; .* checkpoint.keep_last=20"
    ):
        earlier_checkpoints(run[3], 6, "bank", notes.append)


def test_checkpoint_outside_a_run_has_no_evolution(run: list[Checkpoint], tmp_path: Path) -> None:
    moved = run[-1].path.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="--evolution needs the checkpoints of a run; give the run directory"):
        earlier_checkpoints(find_checkpoint(moved), 6, "bank", print)
