"""Batch norm across ranks: statistics of the whole batch, or each rank's own over images shuffled between ranks.

Shapes: b rows of this rank, B rows of all ranks, C channels, [b, C, ...] activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msf_faiss.counter_rng import hash_counters
from msf_faiss.distributed.ranks import Ranks

_Network = TypeVar("_Network", bound=nn.Module)

_SHUFFLE = 101  # this module's stream of random numbers; data/sampler and views use others


def synchronize_batch_norm(network: _Network, ranks: Ranks) -> _Network:
    """Have the batch norms of `network` normalise by the images of all ranks; its tensors keep their names.

    Args:
        network: changed in place; on a GPU it gets torch's SyncBatchNorm, on the CPU `CpuSyncBatchNorm`.
        ranks: train together, one copy of the network each.
    """
    if ranks.size == 1:
        return network
    if next(network.parameters()).is_cuda:
        converted: _Network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, CpuSyncBatchNorm(child, ranks))
    return network


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all ranks, which need not be equally many. torch's SyncBatchNorm needs a GPU.

    Args:
        norm: the batch norm to replace, affine and with running statistics; its tensors are shared.
        ranks: the ranks that normalise together.
    """

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum)
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            setattr(self, name, tensor)
        self.train(norm.training)
        self._ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm expects [b, C, ...], found {list(input.shape)}")

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuSyncBatchNorm:
        raise TypeError("copy a model before synchronising its batch norms: ranks cannot be copied")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        normalised, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self._ranks)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        output: Tensor = normalised
        return output


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, with the mean and the variance over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        over = [0, *range(2, input.ndim)]
        wide = input if input.dtype == torch.float64 else input.float()
        variance, mean = torch.var_mean(wide, dim=over, correction=0)  # [C] each
        count = mean.new_tensor([input.numel() / input.shape[1]])
        with ranks.known_row_counts([1] * ranks.size):
            everyone = ranks.gather_rows(torch.cat([count, mean, variance]).unsqueeze(0))  # [W, 1 + 2 C]
        counts, means, variances = everyone[:, :1], everyone[:, 1 : 1 + len(mean)], everyone[:, 1 + len(mean) :]
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        # Each rank's variance is about its own mean: sums of squares would lose digits if means are large.
        variance = (counts * (variances + (means - mean).square())).sum(dim=0) / total
        inverse = (variance + eps).rsqrt()
        along = [1, -1] + [1] * (input.ndim - 2)
        centred = (wide - mean.view(along)).mul_(inverse.view(along))
        ctx.save_for_backward(centred, inverse, weight, total)
        ctx.ranks, ctx.over, ctx.along = ranks, over, along
        output = (centred * weight.view(along) + bias.view(along)).to(input.dtype)
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        centred, inverse, weight, total = ctx.saved_tensors
        ranks, along = ctx.ranks, ctx.along
        gradient = gradients[0] if gradients[0].dtype == torch.float64 else gradients[0].float()
        of_bias = gradient.sum(dim=ctx.over)  # [C]
        of_weight = (gradient * centred).sum(dim=ctx.over)
        with ranks.known_row_counts([1] * ranks.size):
            everyone = ranks.gather_rows(torch.stack([of_bias, of_weight]).unsqueeze(0))  # [W, 2, C]
        of_all = (everyone.sum(dim=0) / total).view(2, *along)
        of_input = (gradient - of_all[0] - centred * of_all[1]) * (inverse * weight).view(along)
        # The gradients of weight and bias are this rank's only: data_parallel averages them with all others.
        return of_input.to(gradients[0].dtype), of_weight, of_bias, None, None


def shuffle_rows(rows: Tensor, ranks: Ranks, *, seed: int, step: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Shuffle `rows` [b, ...] randomly over all ranks; every rank receives as many rows as it sends.

    Returns:
        The received rows [b, ...], and a function that sends results for them [b, ...] back to where they came from.
    """
    counts = ranks.counts(rows.shape[0])
    order = np.argsort(
        hash_counters(seed, step, _SHUFFLE, np.arange(sum(counts))), kind="stable"
    )  # [B] row at each place
    owner = np.repeat(np.arange(ranks.size), counts)  # [B] rank of each row, and of each place
    start = sum(counts[: ranks.rank])
    place = np.argsort(order)  # [B] place of each row
    mine = slice(start, start + counts[ranks.rank])
    goes_to, comes_from = owner[place[mine]], owner[order[mine]]
    sent, received = (np.bincount(of, minlength=ranks.size).tolist() for of in (goes_to, comes_from))
    # Rows are sent in the order of their places, so that those received from each rank are in that order too.
    outgoing = torch.from_numpy(np.argsort(place[mine], kind="stable")).to(rows.device, non_blocking=True)
    incoming = torch.from_numpy(np.argsort(comes_from, kind="stable")).to(rows.device, non_blocking=True)

    def undo(results: Tensor) -> Tensor:
        back = ranks.exchange_rows(results[incoming], received, sent)
        return torch.empty_like(back).index_copy_(0, outgoing, back)

    others = ranks.exchange_rows(rows[outgoing], sent, received)
    return torch.empty_like(others).index_copy_(0, incoming, others), undo
