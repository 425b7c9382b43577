"""Run directories written without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msf_faiss.config import Config, DemoData
from msf_faiss.config.load import dump_config, override_config
from msf_faiss.run.metrics_file import HEADER

MakeRun = Callable[..., Path]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7*7 }}\u2028"


def record(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, as training writes it."""
    values = {
        "step": step,
        "epoch": step / 100,
        "loss": 1 / (1 + step / 100),
        "purity": min(0.9, step / 2000),
        "learning_rate": 0.05,
        "ema_momentum": 0.99,
        "bank_fill_ratio": 1.0,
        "neighbor_age_mean": 100.0 + step,
        "neighbor_age_p95": 200.0 + step,
        "hubness": 0.01,
        "recall_at_k": None,
        "embedding_std": 0.8,
        "effective_rank": 12.5,
        "collapsing_since": None,
        "push_ms": 0.08,
        "search_ms": 5.25,
        "images_per_second": 812.0,
        "data_time_ratio": 0.125,
        "bank_time_ratio": 0.05,
        "model_time_ratio": 0.825,
        "eta_seconds": 600.0,
        "unreadable_images": 0,
    }
    return values | changes


def heartbeat(state: str = "finished", **changes: Any) -> dict[str, Any]:
    """The content of a status.json."""
    values = {
        "state": state,
        "host": "a host",
        "pid": 1,
        "time": 1_790_000_061.0,  # 2026-09-21 14:14
        "started": 1_790_000_000.0,
        "step": 300,
        "total_steps": 300,
        "epoch": 3.0,
    }
    return values | changes


def write_run(
    path: Path,
    lines: list[dict[str, Any]] | None = None,
    *,
    settings: tuple[str, ...] = (),
    status: dict[str, Any] | None = None,
    tail: str = "",
) -> Path:
    """Write a run of the demo data with these lines of metrics; None: thirty."""
    path.mkdir(parents=True)
    lines = [record(10 * (place + 1)) for place in range(30)] if lines is None else lines
    (path / "metrics.jsonl").write_text(HEADER + "".join(json.dumps(line) + "\n" for line in lines) + tail)
    (path / "config.yaml").write_text(dump_config(override_config(Config(data=DemoData()), settings)))
    (path / "status.json").write_text(json.dumps(status or heartbeat()))
    return path
