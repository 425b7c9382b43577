"""Variants of the step benchmark train and take turns, on a tiny network. Speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step
import step_variants

from msf_faiss.config import Config, FlatBankConfig, ModelConfig, NarrowBackbone, ParquetData, TrainConfig, ViewsConfig
from msf_faiss.models import build_model
from msf_faiss.train.optimizer import create_optimizer
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step

BENCHMARKS = Path(step.__file__).parent
CONFIG = Config(
    views=ViewsConfig(size=32),
    model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1,), strides=(4,)), dim=8),
    bank=FlatBankConfig(capacity=64, k=3),
    train=TrainConfig(batch_size=8, device="cpu"),
)


@pytest.mark.shared_data
def test_authors_loop_trains(shared_data: Path) -> None:
    data = ParquetData(path=shared_data / "imagenette224_mini_val.parquet")
    authors = step_variants.Authors(CONFIG.model_copy(update={"data": data}), workers=0)
    before = authors.queue.clone()
    weight = authors.model.online.projector[0].weight
    start, target = weight.detach().clone(), authors.model.target.projector[0].weight.detach().clone()
    assert len(authors.run(2)) == 2
    assert (authors.queue != before).any(dim=1).sum() == 16
    assert not torch.equal(weight, start)
    assert not torch.equal(authors.model.target.projector[0].weight, target)


@pytest.mark.shared_data
def test_authors_step_equals_ours(shared_data: Path) -> None:
    """From the same views and bank, both reach the same loss and weights."""
    data = ParquetData(path=shared_data / "imagenette224_mini_val.parquet")
    authors = step_variants.Authors(CONFIG.model_copy(update={"data": data}), workers=0)
    bank = step_variants.filled_bank(CONFIG.bank, dim=8, device=torch.device("cpu"))
    model = build_model(CONFIG.model, seed=CONFIG.seed)
    state = TrainState(model, create_optimizer(model, CONFIG.optimizer), bank)
    online, target = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    theirs, purity = authors._step(online, target, labels)
    rate = CONFIG.optimizer.learning_rate
    ours, found = train_step(state, online, target, labels, k=3, learning_rate=rate, momentum=0.99)
    assert theirs == pytest.approx(float(ours), rel=1e-5)  # float32
    assert purity >= 1 / 3  # includes the own entry
    assert found.slots[:, 0].tolist() == list(range(8))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(authors.model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)  # one step, float32


def test_ceiling_clears_gradients() -> None:
    ceiling = step_variants.Ceiling(CONFIG)
    assert len(ceiling.run(2)) == 2
    assert all(parameter.grad is None for parameter in ceiling.model.parameters())


@pytest.mark.shared_data
@pytest.mark.slow  # three processes that import torch
def test_variants_take_turns_and_write_a_report(shared_data: Path, tmp_path: Path) -> None:
    tiny = "model.backbone={kind: narrow, width: 4, depths: [1], strides: [4]}"
    command = [sys.executable, str(BENCHMARKS / "step.py"), "imagenette"]
    command += [str(shared_data / "imagenette224_mini_val.parquet"), "--banks", "64:flat", "--batch", "8"]
    command += [
        "--rounds",
        "2",
        "--steps",
        "2",
        "--workers",
        "1",
        "--threads",
        "1",
        "--set",
        tiny,
        "--set",
        "views.size=32",
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "step.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results = {row["variant"]: row for row in json.loads((tmp_path / "step.json").read_text())["results"]}
    assert set(results) == {"authors", "ours", "ceiling"}
    assert results["authors"]["faster_than_authors"] == results["ceiling"]["share_of_ceiling"] == 1
    assert all(len(row["rounds"]) == 2 and row["images_per_second"] > 0 for row in results.values())


def test_parse_bank_reads_capacity_and_kind() -> None:
    assert step.parse_bank("1048576:scan-bf16") == (1_048_576, "scan-bf16")
    assert step.parse_bank("1000") == (1000, "flat")
