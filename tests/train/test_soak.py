"""An hour of training with saves and evaluations all the time: what the run holds must not grow."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from soak import held_by

SETTINGS = [
    *("data.images=512", "data.test_images=128", "data.size=16", "views.size=16", "model.backbone.width=8"),
    *("train.batch_size=32", "train.log_every=8", "bank.capacity=1024", "train.epochs=1000000", "train.threads=1"),
    *("optimizer.warmup_epochs=0", "checkpoint.every_epochs=2", "knn.every_epochs=4", "data.workers=1"),
]


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_memory_files_and_threads_do_not_grow(tmp_path: Path) -> None:
    seconds = 60 * float(os.environ.get("MSF_FAISS_SOAK_MINUTES", "60"))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "msf_faiss_cli", "pretrain", "demo", *settings, "--out", tmp_path / "run"]
    with (tmp_path / "told").open("w") as told, subprocess.Popen(command, stderr=told) as process:
        began, held = time.monotonic(), []
        while time.monotonic() - began < seconds:
            time.sleep(seconds / 180)
            now = held_by(process.pid, began)
            assert now is not None, (tmp_path / "told").read_text()[-2000:]
            held.append(now)
        process.terminate()
    assert process.returncode == 75
    # The first third lets allocators and pools find their size; a save or an evaluation in progress makes single
    # readings higher, so the last third's median is held to the middle one's.
    middle, last = held[len(held) // 3 : 2 * len(held) // 3], held[2 * len(held) // 3 :]
    for name, slack in (("memory", 0.02), ("files", 0.05), ("threads", 0.0), ("processes", 0.0)):
        before, after = (statistics.median(getattr(each, name) for each in part) for part in (middle, last))
        assert after <= before * (1 + slack), (name, before, after)
