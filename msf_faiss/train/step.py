"""One step of mean shift.

Shapes: B batch, b micro-batch, S height and width of a view, D dimensions of an embedding, K neighbours.
"""

import contextlib

import torch
from torch import Tensor

from msf_faiss.distributed.ranks import no_gradient_sync
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.train.clock import Clock
from msf_faiss.train.loss import contrastive_loss, mean_shift_loss
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
    temperature: float | None = None,
    loss_weight: float = 1.0,
    micro_batches: int = 1,
    clock: Clock | None = None,
) -> tuple[Tensor, Neighbors]:
    """Take one step: MSF (Koohpayegani et al., ICCV 2021), section 3, algorithm 1.

    The authors' code begins with the online forward. Nothing before the loss depends on it, so it comes last here,
    where it overlaps with the retrieval; every number is the same.

    Args:
        state: updated in place.
        online_view: T2(x), [B, 3, S, S].
        target_view: T1(x), [B, 3, S, S].
        ids: [B] int64, data-set indices of the images, on the bank's device.
        k: neighbours of each target embedding, itself included.
        learning_rate: of the online encoder and the predictor.
        momentum: EMA momentum of the target.
        precision: bfloat16 runs the forwards under autocast; any other dtype runs them in the model's own dtype.
        temperature: of `contrastive_loss`, with the images of all ranks; None: `mean_shift_loss`.
        loss_weight: this rank's ratio of the images of the step, 0..1.
        micro_batches: number of forwards that the batch is divided into, at most B and equal on all ranks. The bank is
            pushed and searched once for the whole batch; batch statistics are those of each micro-batch.
        clock: times the parts of the step.

    Returns:
        This rank's weighted loss, a scalar on the device (summed over the ranks: the mean over all images), and the
        neighbours, on the bank's device. Does not wait for the device, unless the bank is on another one.
    """
    clock = clock or Clock(state.device)
    autocast = torch.autocast(online_view.device.type, precision, enabled=precision == torch.bfloat16)
    with clock.on_device("target"), autocast:
        state.model.update_target(momentum)
        targets = state.embed_target(target_view, micro_batches)  # [B, D]
    retrieval = state.retrieve(targets, ids, k, clock)
    losses: list[Tensor] = []
    first = 0  # row of the micro-batch
    for view in online_view.tensor_split(micro_batches):  # [b, 3, S, S]
        last = len(losses) == micro_batches - 1
        with contextlib.nullcontext() if last else no_gradient_sync(state.network):
            with clock.on_device("online"), autocast:
                queries = state.network(view)  # [b, D]
            means, neighbors = retrieval.result()  # [B, D], [B, K]: the first forward overlaps with the retrieval
            with clock.on_device("backward"):
                if temperature is None:
                    loss = mean_shift_loss(queries, means[first : first + len(view)])
                else:
                    if not losses:
                        everyone, mine = state.ranks.gather_rows(means), state.ranks.first_row(len(means))  # [W B, D]
                    loss = contrastive_loss(queries, everyone, mine + first, temperature)
                first += len(view)
                loss = loss * (loss_weight * len(view) / len(online_view))
                # DDP averages the gradients over the ranks; this loss is a summand.
                (loss * state.ranks.size).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    with clock.on_device("optimizer"):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return torch.stack(losses).sum(), neighbors
