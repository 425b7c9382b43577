"""Runs of several ranks: compared with one rank, and resumed by as many, fewer and more ranks."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from pool import RankPool
from runs import assert_same_tensors, metrics, tensors

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank
from msf_faiss.config import (
    CheckpointConfig,
    Config,
    DemoData,
    FlatBankConfig,
    FolderData,
    IvfBankConfig,
    IvfConfig,
    KnnConfig,
    ModelConfig,
    NarrowBackbone,
    OptimizerConfig,
    RecallCheckConfig,
    TrainConfig,
    ViewsConfig,
)
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import PeerError, UserError
from msf_faiss.run.events import RunEnded, RunStarted
from msf_faiss.run.recorder import Recorder
from msf_faiss.train.trainer import pretrain


def config(
    placement: str = "replicated",
    batch_norm: str = "shuffle_bn",
    *,
    bank: str = "flat",
    batch_size: int = 16,
    accumulate: int = 1,
    temperature: float | None = None,
) -> Config:
    kinds = {
        "flat": FlatBankConfig(capacity=50, k=3, placement=placement),
        "ivf": IvfBankConfig(
            capacity=50,
            k=3,
            placement=placement,
            ivf=IvfConfig(lists=2, probes=1),
            recall_check=RecallCheckConfig(every_steps=2, queries=4),
        ),
    }
    return Config(
        seed=1,
        data=DemoData(images=70, test_images=20, size=16),
        views=ViewsConfig(size=16),
        model=ModelConfig(backbone=NarrowBackbone(width=4, depths=(1, 1), strides=(2, 2)), dim=8),
        bank=kinds[bank],
        train=TrainConfig(
            epochs=3,
            batch_size=batch_size,
            accumulate=accumulate,
            log_every=2,
            device="cpu",
            threads=1,
            batch_norm=batch_norm,
            temperature=temperature,
        ),
        checkpoint=CheckpointConfig(every_epochs=1, keep_last=10),
        knn=KnnConfig(every_epochs=3, k=5),
    )


def train(
    ranks: Ranks, settings: Config, run_dir: Path, stop_after: int | None = None, lost: Path | None = None
) -> str:
    """Train as the command line does; returns how the run ended.

    After `stop_after` steps it is asked to stop or, if a file is to be `lost`, that is removed instead.
    """
    asked = itertools.count()

    def should_stop() -> bool:
        chosen = next(asked) == stop_after and ranks.rank == ranks.size - 1  # all stop when one is asked to
        if chosen and lost is not None:
            lost.unlink()
        return chosen and lost is None

    record = Recorder(run_dir)
    try:
        with record:
            for event in pretrain(settings, run_dir, should_stop=should_stop, ranks=ranks):
                if ranks.is_main:
                    record(event)
                if isinstance(event, RunStarted):
                    started = event
    except PeerError as error:
        return f"peer: {error}"
    except UserError as error:
        return f"own: {error}"
    assert isinstance(event, RunEnded)
    return f"{event.reason} {started.first_step} to {event.step}"


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, config("replicated")),
        (2, config("sharded")),
        (3, config("sharded", "sync", accumulate=2, temperature=0.2)),
        (3, config("sharded", bank="ivf")),
        (2, config("replicated", bank="ivf")),
    ],
    ids=["2-replicated", "2-sharded", "3-sharded-sync-accumulate", "3-sharded-ivf", "2-replicated-ivf"],
)
def test_interrupted_ranks_resume_bit_for_bit(pool: RankPool, tmp_path: Path, size: int, settings: Config) -> None:
    assert pool.run(size, train, settings, tmp_path / "whole") == ["finished 0 to 12"] * size
    assert pool.run(size, train, settings, tmp_path / "run", 5) == ["interrupted 0 to 5"] * size
    assert pool.run(size, train, settings, tmp_path / "run", 4) == ["interrupted 5 to 9"] * size
    assert pool.run(size, train, settings, tmp_path / "run") == ["finished 9 to 12"] * size
    assert_same_tensors(tmp_path / "run", tmp_path / "whole", 12)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    shards = sorted(path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000012").glob("bank*"))
    if settings.bank.placement == "sharded":
        assert shards == [f"bank-{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    else:
        assert shards == ["bank.safetensors"]
    bank = load_bank(find_checkpoint(tmp_path / "run"), torch.device("cpu"))
    assert (len(bank), bank.capacity, bank.pushed) == (50, 50, 12 * 16)


@pytest.mark.parametrize(("placement", "temperature"), [("replicated", None), ("sharded", None), ("sharded", 0.2)])
def test_two_ranks_match_one_rank(pool: RankPool, tmp_path: Path, placement: str, temperature: float | None) -> None:
    settings = config(placement, "sync", temperature=temperature)
    settings = settings.model_copy(update={"optimizer": OptimizerConfig(learning_rate=0.005)})
    assert train(ALONE, settings, tmp_path / "one") == "finished 0 to 12"
    assert pool.run(2, train, settings, tmp_path / "two") == ["finished 0 to 12"] * 2
    ends = [find_checkpoint(tmp_path / name) for name in ("one", "two")]
    one, two = (load_bank(checkpoint, torch.device("cpu")) for checkpoint in ends)
    slots = torch.arange(50)
    assert torch.equal(one.ids(slots), two.ids(slots))
    # float32 sums in another order; over 12 steps the relative difference reached 5e-6 at this learning rate, and 5e-4
    # at ten times this rate.
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(one.reconstruct(slots), two.reconstruct(slots), **close)
    weights = [checkpoint.tensors("model") for checkpoint in ends]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, **close)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    purities = [[line.get("purity") for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert purities[1] == pytest.approx(purities[0], abs=1e-6)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_resumes(
    pool: RankPool, tmp_path: Path, placement: str, before: int, after: int
) -> None:
    """Same images in the same steps, same bank; with synchronised batch norm also the same weights."""
    settings = config(placement, "sync")

    def run(size: int, run_dir: Path, stop_after: int | None = None) -> list[str]:
        if size == 1:
            return [train(ALONE, settings, run_dir, stop_after)]
        return pool.run(size, train, settings, run_dir, stop_after)

    assert run(1, tmp_path / "whole") == ["finished 0 to 12"]
    assert run(before, tmp_path / "run", 5) == ["interrupted 0 to 5"] * before
    assert run(after, tmp_path / "run") == ["finished 5 to 12"] * after
    whole, found = (load_bank(find_checkpoint(tmp_path / n), torch.device("cpu")) for n in ("whole", "run"))
    slots = torch.arange(50)
    assert found.pushed == whole.pushed
    assert torch.equal(found.ids(slots), whole.ids(slots))
    torch.testing.assert_close(found.reconstruct(slots), whole.reconstruct(slots), rtol=0, atol=2e-4)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [
        line["step"] for line in metrics(tmp_path / "whole")
    ]


def test_shuffled_batch_norm_differs_from_one_rank(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, train, config(), tmp_path / "two")
    train(ALONE, config(), tmp_path / "one")
    one, two = (tensors(tmp_path / name, 12) for name in ("one", "two"))
    assert torch.equal(one["bank.ids"], two["bank.ids"])
    assert not torch.allclose(one["bank.embeddings"], two["bank.embeddings"], atol=1e-3)


def test_too_small_batch_is_reported_by_rank_0(pool: RankPool, tmp_path: Path) -> None:
    ends = pool.run(3, train, config(batch_size=5), tmp_path / "run")
    assert ends[0].startswith("own: train.batch_size=5 is too small for 3 ranks: each needs at least 2 images")
    assert all(each.startswith("peer: ") for each in ends[1:])
    assert not (tmp_path / "run").exists()


def test_non_finite_loss_is_reported_by_rank_0(pool: RankPool, tmp_path: Path) -> None:
    settings = config().model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e30)})
    ends = pool.run(2, train, settings, tmp_path / "run")
    assert ends[0].startswith("own: the loss of step ")
    assert ends[1] == ends[0].replace("own: ", "peer: ")


def test_image_that_vanishes_loses_no_step(pool: RankPool, tmp_path: Path) -> None:
    """One rank cannot read its image, and all save what they have before the error ends the run."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(70):
        Image.new("RGB", (20, 20), (3 * number, 99, 255 - 3 * number)).save(images / f"{number:02d}.png")
    settings = config("sharded").model_copy(
        update={
            "data": FolderData(path=images, workers=0, cache="none"),
            "checkpoint": CheckpointConfig(every_epochs=1000),
        }
    )
    assert pool.run(2, train, settings, tmp_path / "whole") == ["finished 0 to 12"] * 2
    kept = (images / "05.png").read_bytes()
    ends = sorted(pool.run(2, train, settings, tmp_path / "run", 5, images / "05.png"))
    assert ends[0].startswith(f"own: {images / '05.png'}")
    assert ends[1].startswith("peer: ")
    saved = find_checkpoint(tmp_path / "run").step
    assert 5 < saved < 12
    (images / "05.png").write_bytes(kept)
    assert pool.run(2, train, settings, tmp_path / "run") == [f"finished {saved} to 12"] * 2
    assert_same_tensors(tmp_path / "run", tmp_path / "whole", 12)


def test_bank_that_cannot_be_sharded(pool: RankPool, tmp_path: Path) -> None:
    settings = config("sharded")
    small = settings.model_copy(update={"bank": FlatBankConfig(capacity=1, k=1, placement="sharded")})
    ends = pool.run(2, train, small, tmp_path / "run")
    assert all("bank: 1 entries cannot be sharded over 2 ranks" in each for each in ends)
