"""Refused run directories and config changes."""

import shutil
from pathlib import Path

import pytest
from small_runs import CONFIG, changed, run

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.config import Config, ReferenceBankConfig
from msf_faiss.config.load import load_config
from msf_faiss.errors import UserError
from msf_faiss.run.events import Event, RunEnded, RunStarted


def test_occupied_run_directory_is_refused(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    run_dir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=r"already contains a run\. Omit --resume never to resume it"):
        run(CONFIG, run_dir)
    with pytest.raises(UserError, match=r"differs from the run's \(seed: was 1, now 2; bank.k: was 3, now 4\)"):
        run(changed(bank={"k": 4}).model_copy(update={"seed": 2}), run_dir, resume="auto")
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"contains other files \(thesis.tex\)"):
        run(CONFIG, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run(CONFIG, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resume_refuses_changed_k(tmp_path: Path) -> None:
    """k is part of the loss, not of the bank."""
    run(CONFIG, tmp_path / "run", stop_after=5)
    written = (tmp_path / "run" / "config.yaml").read_text()
    config = CONFIG.model_copy(update={"bank": ReferenceBankConfig(capacity=50, k=4)})
    with pytest.raises(
        UserError, match=r"differs from the run's \(bank.k: was 3, now 4\)\. .* --allow-config-change bank.k,"
    ):
        run(config, tmp_path / "run", resume="auto", allow=["bank.capacity", "bank.kind"])
    assert (tmp_path / "run" / "config.yaml").read_text() == written


K4 = changed(bank={"k": 4})


@pytest.mark.parametrize(
    ("config", "branches", "complaint"),
    [
        (K4, True, r"with the changed settings \(bank.k: was 3, now 4\)\. Train longer \(--set train.epochs=… --"),
        (K4, False, r"with the changed settings \(bank.k"),
        (
            CONFIG,
            True,
            r"ends at step 12 and this is step 12, so nothing would be trained in the new run\. .*step-00000008$",
        ),
        (changed(train={"epochs": 2}), False, "ends at step 8 and this is step 12, .*step-00000004$"),
        (
            changed(train={"max_steps": 9}),
            True,
            r"ends at step 9 and this is step 12, .* Train longer \(--set train.max_steps=…",
        ),
        (changed(checkpoint={"keep_last": 3}), False, r"\(checkpoint.keep_last: was 10, now 3\)"),
    ],
)
def test_no_setting_is_recorded_without_a_step(
    finished: tuple[Path, list[Event]], tmp_path: Path, config: Config, branches: bool, complaint: str
) -> None:
    source, out = finished[0], tmp_path / "branch" if branches else finished[0]
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.name != ".lock"}
    with pytest.raises(UserError, match=complaint):
        run(config, out, resume=source if branches else "auto", allow=["bank", "train", "checkpoint"])
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.name != ".lock"} == before
    assert not (tmp_path / "branch").exists()


def test_branch_that_is_stopped_before_its_first_step_saves_nothing(
    finished: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    origin = finished[0] / "checkpoints" / "step-00000008"
    arguments = {"resume": origin, "allow": ["bank"]}
    ended = run(K4, tmp_path / "branch", stop_after=0, **arguments)[-1]
    assert isinstance(ended, RunEnded)
    assert (ended.step, ended.reason, ended.checkpoint) == (8, "interrupted", origin)
    assert list((tmp_path / "branch" / "checkpoints").iterdir()) == []
    run(K4, tmp_path / "branch", **arguments)
    assert find_checkpoint(tmp_path / "branch").step == 12


def test_config_file_changes_with_the_next_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msf_faiss.train import step

    run_dir = tmp_path / "run"
    run(CONFIG, run_dir, stop_after=5)
    with monkeypatch.context() as patch:
        patch.setattr(step, "mean_shift_loss", lambda queries, means: (queries * float("nan")).sum())
        with pytest.raises(UserError, match="training has diverged"):
            run(K4, run_dir, resume="auto", allow=["bank"])
    assert load_config(run_dir / "config.yaml") == find_checkpoint(run_dir).config == CONFIG
    run(K4, run_dir, resume="auto", allow=["bank"], stop_after=1)
    assert load_config(run_dir / "config.yaml") == find_checkpoint(run_dir).config == K4


def test_branch_whose_origin_has_moved_is_still_its_branch(finished: tuple[Path, list[Event]], tmp_path: Path) -> None:
    first, other = (shutil.copytree(finished[0], tmp_path / name) for name in ("first", "other"))
    branch, origin = tmp_path / "branch", first / "checkpoints" / "step-00000008"
    run(CONFIG, branch, resume=origin, stop_after=2)
    moved = first.rename(tmp_path / "moved")
    for place in (first, origin, moved, moved / "checkpoints" / origin.name):
        started = run(CONFIG, branch, resume=place, stop_after=0)[0]
        assert isinstance(started, RunStarted)
        assert started.first_step == 10
    (other / "checkpoints" / origin.name).rename(other / "away")
    with pytest.raises(UserError, match="contains a run that resumes from step-00000010, not from"):
        run(CONFIG, branch, resume=other)
