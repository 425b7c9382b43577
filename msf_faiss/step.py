"""One step of mean shift.

Shapes: B batch, S height and width of a view, D dimensions of an embedding, K neighbours.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from msf_faiss.bank import Neighbors
from msf_faiss.loss import mean_shift_loss
from msf_faiss.monitor import Clock
from msf_faiss.state import TrainState


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
    clock: Clock | None = None,
) -> tuple[Tensor, Neighbors]:
    """One step of mean shift (paper, section 3, algorithm 1; the order is that of the authors' code).

    Args:
        state: changed in place; its step count rises by one.
        online_view: T2(x), [B, 3, S, S].
        target_view: T1(x), [B, 3, S, S].
        ids: [B] int64, data-set indices of the images.
        k: neighbours of each target embedding, itself included.
        learning_rate: of this step.
        momentum: of the target's moving average.
        precision: bfloat16 runs the forwards under autocast; any other dtype runs them as the model is.
        share: of the step's images that are this rank's, 0..1.
        clock: times push and search.

    Returns:
        This rank's share of the loss, a scalar on the device (the sum over the ranks is the mean over all images), and
        the neighbours that it pulled to. The device is not waited for.
    """
    autocast = torch.autocast(ids.device.type, precision, enabled=precision == torch.bfloat16)
    with autocast:
        queries = state.network(online_view)  # [B, D]
    state.model.update_target(momentum)
    with autocast:
        targets = state.embed_target(target_view)  # [B, D]
    with clock.on_device("push") if clock else contextlib.nullcontext():
        state.bank.push(targets, ids)
    with clock.on_device("search") if clock else contextlib.nullcontext():
        found = state.bank.search(targets, k)  # [B, K]
        means = state.bank.mean_of(found.slots)  # [B, D]
    loss = mean_shift_loss(queries, means) * share
    # Gradients are averaged over the ranks, and this loss is a summand.
    (loss * state.ranks.size).backward()  # type: ignore[no-untyped-call]
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return loss.detach(), found
