"""Refused run directories and config changes."""

from pathlib import Path

import pytest
from small_runs import CONFIG, changed, run

from msf_faiss.config import ReferenceBankConfig
from msf_faiss.errors import UserError
from msf_faiss.run.events import Event


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
