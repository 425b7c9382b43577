"""Steps on a GPU: none synchronises, and overlapped retrieval returns the numbers of sequential retrieval."""

from pathlib import Path

import pytest
import torch

from msf_faiss.config import (
    BankConfig,
    Config,
    DemoData,
    FlatBankConfig,
    KnnConfig,
    ModelConfig,
    NarrowBackbone,
    ScanBankConfig,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.train_batches import training_batches
from msf_faiss.models import best_memory_format
from msf_faiss.run.events import StepProfiled
from msf_faiss.train.clock import Clock
from msf_faiss.train.monitors import LossMonitor, NeighborMonitor
from msf_faiss.train.overlap import SequentialRetriever, StreamRetriever, ThreadedRetriever
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step
from msf_faiss.train.trainer import pretrain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = Config(
    data=DemoData(images=1000, test_images=20),
    views=ViewsConfig(size=32),
    model=ModelConfig(backbone=NarrowBackbone(width=16, depths=(1, 1), strides=(2, 2)), dim=64),
    bank=FlatBankConfig(capacity=4096),
    train=TrainConfig(epochs=10, batch_size=64, device="cuda"),
    knn=KnnConfig(every_epochs=None),
)


def steps(config: Config, count: int, *, sequential: bool = False, strict: bool = False) -> TrainState:
    """The state after `count` steps. With `strict`, all but the first five fail if they wait for the device."""
    device = torch.device("cuda", torch.cuda.current_device())
    source = open_source(config.data, "train")
    assert source is not None
    state = TrainState.create(config, device)
    if sequential:
        state.retrieve = SequentialRetriever(state.bank)
    layout, clock = best_memory_format(state.model, device), Clock(device)
    losses, neighbors = LossMonitor(), NeighborMonitor(source.labels, state.bank.device)
    batches = training_batches(source, config, device=device)
    try:
        for number in range(count):
            batch = next(batches)
            torch.cuda.set_sync_debug_mode("error" if strict and number >= 5 else "default")
            ids = batch.ids.to(state.bank.device, non_blocking=True)
            online, target = batch.to(device).views(config.views)
            loss, found = train_step(
                state,
                online.contiguous(memory_format=layout),
                target.contiguous(memory_format=layout),
                ids,
                k=config.bank.k,
                learning_rate=0.05,
                momentum=0.99,
                precision=getattr(torch, config.train.precision),
                micro_batches=config.train.accumulate,
                clock=clock,
            )
            losses.update(loss)
            neighbors.update(ids, state.bank.ids(found.slots), state.bank.age(found.slots), state.bank.pushed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
    torch.cuda.synchronize()
    return state


@pytest.mark.parametrize(
    "bank",
    [
        FlatBankConfig(capacity=4096, engine="faiss"),
        FlatBankConfig(capacity=4096, engine="torch"),
        FlatBankConfig(capacity=4096, dtype="bfloat16", engine="faiss"),
        ScanBankConfig(capacity=4096, scan="bf16"),
        ScanBankConfig(capacity=4096, scan="int8"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step_does_not_wait_for_the_device(bank: BankConfig, precision: str) -> None:
    train = CONFIG.train.model_copy(update={"precision": precision})
    steps(CONFIG.model_copy(update={"bank": bank, "train": train}), 20, strict=True)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_overlapped_retrieval_matches_sequential_retrieval(accumulate: int) -> None:
    torch.backends.cudnn.deterministic = True
    try:
        train = CONFIG.train.model_copy(update={"accumulate": accumulate})
        config = CONFIG.model_copy(update={"train": train})
        on_host = config.model_copy(update={"bank": FlatBankConfig(capacity=4096, device="cpu")})
        stream, thread, sequential = steps(config, 30), steps(on_host, 30), steps(config, 30, sequential=True)
    finally:
        torch.backends.cudnn.deterministic = False
    assert isinstance(stream.retrieve, StreamRetriever)
    assert isinstance(thread.retrieve, ThreadedRetriever)
    assert thread.bank.device.type == "cpu"
    for name, weight in sequential.model.state_dict().items():
        assert torch.equal(weight, stream.model.state_dict()[name]), name
        # The host sums the mean of the neighbours in another order.
        torch.testing.assert_close(weight, thread.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_profile_of_a_gpu_run(device: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"bank": FlatBankConfig(capacity=4096, device=device)})
    (profiled,) = [each for each in pretrain(config, tmp_path / "run", profile=10) if isinstance(each, StepProfiled)]
    assert profiled.overlapped
    assert {"data", "views", "target", "push", "search", "online", "backward", "optimizer"} <= profiled.parts.keys()
    assert profiled.trace.stat().st_size > 1000
