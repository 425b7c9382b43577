"""An hour of training with continual saves and evaluations: resource usage must not grow."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from soak import measure_usage

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
    with (tmp_path / "errors").open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        began, usage = time.monotonic(), []
        while time.monotonic() - began < seconds:
            time.sleep(seconds / 180)
            now = measure_usage(process.pid, began)
            assert now is not None, (tmp_path / "errors").read_text()[-2000:]
            usage.append(now)
        process.terminate()
    assert process.returncode == 75
    # Allocators and pools reach their size in the first third. Saves and evaluations cause peaks, so the medians of the
    # middle and the last third are compared.
    middle, last = usage[len(usage) // 3 : 2 * len(usage) // 3], usage[2 * len(usage) // 3 :]
    for name, slack in (("memory", 0.02), ("files", 0.05), ("threads", 0.0), ("processes", 0.0)):
        before, after = (statistics.median(getattr(each, name) for each in part) for part in (middle, last))
        assert after <= before * (1 + slack), (name, before, after)
