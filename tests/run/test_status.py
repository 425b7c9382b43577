import json
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import filelock
import pytest

from msf_faiss.errors import UserError
from msf_faiss.run.status import LOCK, STATUS, Heartbeat, read_status

BEAT = Heartbeat(
    state="training",
    host=socket.gethostname(),
    pid=1,
    time=time.time(),
    started=time.time(),
    step=3,
    total_steps=10,
)


def write(run_dir: Path, beat: Heartbeat) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / STATUS).write_text(json.dumps(asdict(beat)))
    (run_dir / LOCK).touch()
    return run_dir


@pytest.mark.parametrize(
    ("said", "held", "state", "well"),
    [
        ("training", True, "training", True),
        ("training", False, "dead", False),
        ("finished", False, "finished", True),
        ("interrupted", False, "interrupted", False),
        ("failed", False, "failed", False),
        ("finished", True, "starting", True),  # it was started once more
    ],
)
def test_what_a_run_said_and_whether_it_lives(tmp_path: Path, said: str, held: bool, state: str, well: bool) -> None:
    run_dir = write(tmp_path / "run", replace(BEAT, state=said))
    lock = filelock.FileLock(run_dir / LOCK)
    if held:
        lock.acquire()
    found = read_status(run_dir)
    assert (found.state, found.alive, found.well) == (state, held, well)
    assert found.heartbeat is not None
    assert found.heartbeat.step == 3
    lock.release()


def test_checkpoint_of_a_copied_run_is_its_own(tmp_path: Path) -> None:
    saved = tmp_path / "original" / "checkpoints" / "step-00000003"
    run_dir = write(tmp_path / "copy", replace(BEAT, checkpoint=str(saved)))
    for own in (saved, run_dir / "checkpoints" / saved.name):  # the second once it has been copied too
        own.mkdir(parents=True)
        found = read_status(run_dir).heartbeat
        assert found is not None
        assert found.checkpoint == str(own)


def test_looking_leaves_the_lock_to_others(tmp_path: Path) -> None:
    run_dir = write(tmp_path / "run", BEAT)
    read_status(run_dir)
    with filelock.FileLock(run_dir / LOCK).acquire(blocking=False):
        pass


def test_a_run_that_has_said_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    assert read_status(tmp_path).state == "dead"
    with filelock.FileLock(tmp_path / LOCK):
        found = read_status(tmp_path)
    assert (found.state, found.alive, found.heartbeat, found.silent_seconds) == ("starting", True, None, None)


@pytest.mark.parametrize(("silent", "state"), [(10, "training"), (1000, "dead")])
def test_on_another_host_silence_decides(tmp_path: Path, silent: float, state: str) -> None:
    beat = replace(BEAT, host=f"not-{socket.gethostname()}", time=time.time() - silent)
    assert read_status(write(tmp_path / "run", beat)).state == state


def test_a_release_that_says_more_or_less_is_understood(tmp_path: Path) -> None:
    run_dir = write(tmp_path / "run", BEAT)
    values = {name: value for name, value in asdict(BEAT).items() if value is not None}
    (run_dir / STATUS).write_text(json.dumps({**values, "colour": "blue"}))
    assert read_status(run_dir).heartbeat == BEAT
    (run_dir / STATUS).write_text(json.dumps({**values, "time": ["now"]}))
    with pytest.raises(UserError, match=r"status.json: cannot be read"):
        read_status(run_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": "training"}', "\xff"])
def test_a_garbled_status_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"status.json: cannot be read"):
        read_status(tmp_path)


def test_where_there_is_no_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no run there"):
            read_status(place)
