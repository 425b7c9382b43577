"""Results of a run that must be equal in an equal run."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

_TIMED = {"images_per_second", "eta_seconds", "knn_seconds", "data_time_ratio", "bank_time_ratio", "model_time_ratio"}


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors in the checkpoint of a step that training changes, by file and name."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return {
        f"{path.stem}.{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        if path.stem != "data"
        for name, tensor in safetensors.torch.load_file(path).items()
    }


def assert_same_tensors(run_dir: Path, expected_dir: Path, step: int, *, evaluations: bool = True) -> None:
    """The checkpoints of a step are equal bit for bit; without `evaluations`, they may have other kNN accuracies."""
    found, expected = (
        {name: tensor for name, tensor in tensors(folder, step).items() if evaluations or "monitor.knn." not in name}
        for folder in (run_dir, expected_dir)
    )
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without header and timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]
    return [
        {name: value for name, value in line.items() if name not in _TIMED and not name.endswith("_ms")}
        for line in lines
    ]
