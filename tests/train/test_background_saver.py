"""Background saves: training waits for a copy only, and one save runs at a time."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from msf_faiss.checkpoint.format import Tensors
from msf_faiss.errors import UserError
from msf_faiss.train.background_saver import BackgroundSaver


class Disk:
    """A `write` that waits for permission and records its arguments."""

    def __init__(self, *, open_at_once: bool = False) -> None:
        self.may_write, self.writing, self.most_writing = threading.Event(), 0, 0
        self.written: list[tuple[int, list[float]]] = []
        self.threads: list[str] = []
        if open_at_once:
            self.may_write.set()

    def __call__(self, step: int, epoch: float, tensors: Mapping[str, Tensors]) -> Path:
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        self.threads.append(threading.current_thread().name)
        assert self.may_write.wait(30)
        self.written.append((step, tensors["model"]["weight"].tolist()))
        self.writing -= 1
        return Path(f"step-{step}")


def state(value: float) -> dict[str, Tensors]:
    return {"model": {"weight": torch.tensor([value])}}


def test_a_copy_is_written_while_training_continues() -> None:
    disk = Disk()
    saver = BackgroundSaver(disk, background=True)
    saved = state(1.0)
    saver.save(5, 0.5, saved)
    saved["model"]["weight"].fill_(2.0)  # the next step, before anything is on disk
    assert saver.saved() == []
    assert disk.written == []
    disk.may_write.set()
    saver.wait()
    assert disk.written == [(5, [1.0])]
    (event,) = saver.saved()
    assert (event.step, event.epoch, event.path) == (5, 0.5, Path("step-5"))
    assert 0 <= event.stalled_seconds <= event.seconds
    assert saver.saved() == []
    assert disk.threads == ["checkpoint"]


def test_second_save_waits_for_the_first() -> None:
    disk = Disk()
    saver = BackgroundSaver(disk, background=True)
    saver.save(1, 0.1, state(1.0))
    second = threading.Thread(target=saver.save, args=(2, 0.2, state(2.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.may_write.set()
    second.join(30)
    saver.wait()
    assert disk.written == [(1, [1.0]), (2, [2.0])]
    assert disk.most_writing == 1


def test_foreground_save_writes_in_the_calling_thread() -> None:
    disk = Disk(open_at_once=True)
    saver = BackgroundSaver(disk, background=False)
    saver.save(3, 0.3, state(4.0))
    assert disk.written == [(3, [4.0])]
    assert disk.threads == ["MainThread"]
    assert [event.step for event in saver.saved()] == [3]


@pytest.mark.parametrize("background", [True, False])
def test_failed_save_raises_once(background: bool) -> None:
    def fail(step: int, epoch: float, tensors: Mapping[str, Tensors]) -> Path:
        raise UserError("the disk is full")

    saver = BackgroundSaver(fail, background=background)
    if background:
        saver.save(1, 0.1, state(1.0))
        with pytest.raises(UserError, match="the disk is full"):
            saver.wait()
    else:
        with pytest.raises(UserError, match="the disk is full"):
            saver.save(1, 0.1, state(1.0))
    assert saver.saved() == []


@pytest.mark.parametrize("ending", [None, ValueError])
def test_finishing_completes_the_save_in_progress(ending: type[Exception] | None) -> None:
    disk = Disk()
    saver = BackgroundSaver(disk, background=True)

    def train() -> None:
        with saver.finishing():
            saver.save(1, 0.1, state(1.0))
            threading.Timer(0.1, disk.may_write.set).start()
            if ending is not None:
                raise ending("something else")

    if ending is None:
        train()
    else:
        with pytest.raises(ending, match="something else"):
            train()
    assert disk.written == [(1, [1.0])]


def test_finishing_does_not_wait_after_keyboard_interrupt() -> None:
    disk = Disk()
    saver = BackgroundSaver(disk, background=True)

    def train() -> None:
        with saver.finishing():
            saver.save(1, 0.1, state(1.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert disk.written == []
    disk.may_write.set()
    saver.wait()
