import copy

import pytest
import torch
from pool import RankPool
from torch import Tensor, nn

from msf_faiss.config import ModelConfig, NarrowBackbone
from msf_faiss.distributed.batch_norm import CpuSyncBatchNorm, shuffle_rows, synchronize_batch_norm
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.models import build_model

SHAPES = {"linear": (6,), "images": (6, 5, 4)}


def whole_batch(counts: list[int], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Far from zero, so that sums of squares would lose digits; with another mean on each rank."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(count, *shape, generator=generator, dtype=torch.float64) + 30 + 5 * rank
        for rank, count in enumerate(counts)
    ]
    return torch.cat(parts).to(dtype)


def layer(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], dtype=dtype)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm


def normalise_in_parts(
    ranks: Ranks, counts: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    norm = CpuSyncBatchNorm(layer(shape, dtype), ranks)
    start = sum(counts[: ranks.rank])
    inputs = whole_batch(counts, shape, dtype)[start : start + counts[ranks.rank]].requires_grad_()
    outputs = norm(inputs)
    (outputs.sigmoid() * torch.arange(start, start + len(inputs)).view(-1, *[1] * len(shape))).sum().backward()
    norm.eval()
    return {
        "outputs": outputs.detach(),
        "inputs": inputs.grad,
        "weight": ranks.sum(norm.weight.grad),
        "bias": ranks.sum(norm.bias.grad),
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "count": norm.num_batches_tracked,
        "eval": norm(inputs).detach(),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("counts", [[4, 4], [2, 9], [3, 2, 5]], ids=str)
def test_matches_batch_norm_of_the_whole_batch(
    pool: RankPool, counts: list[int], kind: str, dtype: torch.dtype
) -> None:
    shape = SHAPES[kind]
    norm, inputs = layer(shape, dtype), whole_batch(counts, shape, dtype).requires_grad_()
    outputs = norm(inputs)
    (outputs.sigmoid() * torch.arange(len(inputs)).view(-1, *[1] * len(shape))).sum().backward()
    norm.eval()
    found = pool.run(len(counts), normalise_in_parts, counts, shape, dtype)
    # Rounding of means of some 200 numbers around 30, times rows of up to 10 in the gradients.
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(torch.cat([each["outputs"] for each in found]), outputs.detach(), **close)
    torch.testing.assert_close(torch.cat([each["inputs"] for each in found]), inputs.grad, **close)
    torch.testing.assert_close(torch.cat([each["eval"] for each in found]), norm(inputs).detach(), **close)
    for each in found:
        torch.testing.assert_close(each["weight"], norm.weight.grad, **close)
        torch.testing.assert_close(each["bias"], norm.bias.grad, **close)
        torch.testing.assert_close(each["mean"], norm.running_mean, **close)
        torch.testing.assert_close(each["variance"], norm.running_var, **close)
        assert each["count"] == 1


def half_precision(ranks: Ranks) -> tuple[torch.dtype, torch.dtype]:
    norm = CpuSyncBatchNorm(nn.BatchNorm1d(4), ranks)
    inputs = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    outputs = norm(inputs)
    outputs.sum().backward()
    assert inputs.grad is not None
    return outputs.dtype, inputs.grad.dtype


def test_half_precision_keeps_its_dtype(pool: RankPool) -> None:
    assert pool.run(2, half_precision) == [(torch.bfloat16, torch.bfloat16)] * 2


def test_synchronize_batch_norm_keeps_weights_and_names() -> None:
    model = build_model(ModelConfig(backbone=NarrowBackbone(width=4)), seed=0)
    before = copy.deepcopy(model.state_dict())
    assert synchronize_batch_norm(model, ALONE) is model
    assert not any(isinstance(module, CpuSyncBatchNorm) for module in model.modules())
    after = synchronize_batch_norm(model, Ranks(0, 2)).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    kinds = [type(module) for module in model.modules() if "BatchNorm" in type(module).__name__]
    assert set(kinds) == {CpuSyncBatchNorm}
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def shuffle(ranks: Ranks, counts: list[int], step: int) -> tuple[list[int], list[int]]:
    start = sum(counts[: ranks.rank])
    rows = torch.arange(start, start + counts[ranks.rank]).view(-1, 1).expand(-1, 3).float()
    with ranks.known_row_counts(counts):
        others, undo = shuffle_rows(rows, ranks, seed=1, step=step)
        back = undo(others * 10)
    assert torch.equal(back, rows * 10)
    assert others.shape == rows.shape
    return others[:, 0].int().tolist(), others[:, 2].int().tolist()


@pytest.mark.parametrize("counts", [[8, 8], [3, 7, 0], [5, 2, 4, 6]], ids=str)
def test_shuffle_rows_permutes_and_restores(pool: RankPool, counts: list[int]) -> None:
    seen = []
    for step in (0, 1):
        parts = pool.run(len(counts), shuffle, counts, step)
        assert [len(rows) for rows, _ in parts] == counts
        everyone = [row for rows, _ in parts for row in rows]
        assert sorted(everyone) == list(range(sum(counts)))
        assert all(rows == again for rows, again in parts)
        seen.append(everyone)
    assert seen[0] != list(range(sum(counts)))
    assert seen[0] != seen[1]


def test_shuffle_rows_moves_half_of_the_rows_between_two_ranks(pool: RankPool) -> None:
    stayed = [
        sum(row < 50 if rank == 0 else row >= 50 for rank in range(2) for row in parts[rank][0])
        for parts in [pool.run(2, shuffle, [50, 50], step) for step in range(8)]
    ]
    assert abs(sum(stayed) / 800 - 0.5) < 0.1  # five standard deviations are .09 (hypergeometric)
