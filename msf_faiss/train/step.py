"""One step of mean shift.

Shapes: B batch, S height and width of a view, D dimensions of an embedding, K neighbours.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from msf_faiss.distributed.ranks import no_gradient_sync
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.clock import Clock
from msf_faiss.train.loss import mean_shift_loss
from msf_faiss.train.state import TrainState


def train_step(
    state: TrainState,
    online_view: Tensor,
    target_view: Tensor,
    ids: Tensor,
    *,
    k: int,
    learning_rate: float,
    momentum: float,
    precision: torch.dtype = torch.float32,
    share: float = 1.0,
    parts: int = 1,
    clock: Clock | None = None,
) -> tuple[Tensor, Neighbors]:
    """One step of mean shift (paper, section 3, algorithm 1).

    The authors' code has the forward of the online encoder first. It needs nothing of the rest, so it comes last here,
    beside the bank's work, to the same numbers.

    Args:
        state: changed in place; its step count rises by one.
        online_view: T2(x), [B, 3, S, S].
        target_view: T1(x), [B, 3, S, S].
        ids: [B] int64, data-set indices of the images, on the bank's device.
        k: neighbours of each target embedding, itself included.
        learning_rate: of this step.
        momentum: of the target's moving average.
        precision: bfloat16 runs the forwards under autocast; any other dtype runs them as the model is.
        share: of the step's images that are this rank's, 0..1.
        parts: that the batch goes through the networks in, at most B and on all ranks as many. The bank is filled and
            searched once; batch statistics are each part's own.
        clock: times the parts of the step.

    Returns:
        This rank's share of the loss, a scalar on the device (the sum over the ranks is the mean over all images), and
        the neighbours that it pulled to, on the bank's device. The device is not waited for, unless the bank is on
        another.
    """
    clock = clock or Clock(state.device)
    autocast = torch.autocast(online_view.device.type, precision, enabled=precision == torch.bfloat16)
    with clock.on_device("target"), autocast:
        state.model.update_target(momentum)
        targets = state.embed_target(target_view, parts)  # [B, D]
    retrieved = state.retrieve(targets, ids, k, clock)
    losses: list[Tensor] = []
    for view in online_view.tensor_split(parts):  # [b, 3, S, S]
        last = len(losses) == parts - 1
        with contextlib.nullcontext() if last else no_gradient_sync(state.network):
            with clock.on_device("online"), autocast:
                queries = state.network(view)  # [b, D]
            if not losses:
                means, found = retrieved()  # [B, D], [B, K]
            with clock.on_device("backward"):
                loss = mean_shift_loss(queries, means.tensor_split(parts)[len(losses)])
                loss = loss * (share * len(view) / len(online_view))
                # Gradients are averaged over the ranks, and this loss is a summand.
                (loss * state.ranks.size).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    with clock.on_device("optimizer"):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return torch.stack(losses).sum(), found
