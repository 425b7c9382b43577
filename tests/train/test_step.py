"""One step compared with a dense float64 implementation: a deque, a [B, N] matrix, a sum of squares.

Both use the same networks; everything else is implemented twice.
"""

import copy
from collections import deque
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_faiss.bank import Bank, FlatBank, ReferenceBank, RingSpec
from msf_faiss.config import ModelConfig, NarrowBackbone, OptimizerConfig
from msf_faiss.models import MeanShift, build_model
from msf_faiss.train.loss import mean_shift_loss
from msf_faiss.train.optimizer import create_optimizer
from msf_faiss.train.overlap import ThreadedRetriever
from msf_faiss.train.state import TrainState
from msf_faiss.train.step import train_step

BATCH, CAPACITY, PUSHED = 12, 45, 70  # the bank has wrapped around, and wraps again within the step
RATE, MOMENTUM = 0.05, 0.9
MODEL = ModelConfig(backbone=NarrowBackbone(width=8, depths=(1, 1), strides=(1, 2)), dim=24)


@dataclass
class Step:
    """Result of a step."""

    loss: Tensor
    gradients: dict[str, Tensor]
    online: dict[str, Tensor]  # weights after the optimizer
    target: dict[str, Tensor]  # weights after the EMA
    bank: Tensor  # [N, D] oldest first
    ids: list[int]


def fresh_model() -> MeanShift:
    """In float64, with a target that differs from the online encoder."""
    model = build_model(MODEL, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    views = torch.randn(2, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
    filling = F.normalize(torch.randn(PUSHED, 24, generator=generator, dtype=torch.float64), dim=1)
    return views[0], views[1], torch.arange(100, 100 + BATCH), filling, torch.arange(PUSHED)


def dense_step(k: int, micro_batches: int = 1, temperature: float | None = None) -> Step:
    model = fresh_model()
    online_view, target_view, ids, filling, filling_ids = inputs()
    before = {name: parameter.detach().clone() for name, parameter in model.online.named_parameters()}

    output = torch.cat([model.predictor(model.online(view)) for view in online_view.tensor_split(micro_batches)])
    queries = output / output.square().sum(1, keepdim=True).sqrt()
    with torch.no_grad():
        for name, parameter in model.target.named_parameters():
            parameter.copy_(MOMENTUM * parameter + (1 - MOMENTUM) * before[name])
        output = torch.cat([model.target(view) for view in target_view.tensor_split(micro_batches)])
        targets = output / output.square().sum(1, keepdim=True).sqrt()
    bank: deque[tuple[Tensor, int]] = deque(zip(filling, filling_ids.tolist(), strict=True), maxlen=CAPACITY)
    bank.extend(zip(targets, ids.tolist(), strict=True))
    entries = torch.stack([vector for vector, _ in bank])  # [N, D]
    nearest = (targets @ entries.T).argsort(dim=1, descending=True)[:, :k]  # [B, K]
    squared = torch.stack(
        [(queries[b] - entries[slot]).square().sum() for b in range(BATCH) for slot in nearest[b].tolist()]
    )
    loss = squared.mean()
    if temperature is not None:
        means = torch.stack([entries[slots].mean(0) for slots in nearest])
        cosines = queries @ (means / means.square().sum(1, keepdim=True).sqrt()).T  # [B, B]
        shares = (cosines / temperature).exp()
        loss = -(shares.diagonal() / shares.sum(1)).log().mean()
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("target.")}
    gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    decay = OptimizerConfig().weight_decay
    return Step(
        loss.detach(),
        gradients,
        {name: (p - RATE * (gradients[name] + decay * p)).detach() for name, p in trained.items()},
        {name: p.detach() for name, p in model.target.named_parameters()},
        entries,
        [index for _, index in bank],
    )


def our_step(
    k: int,
    bank: Bank,
    *,
    precision: torch.dtype,
    micro_batches: int = 1,
    threaded: bool = False,
    temperature: float | None = None,
) -> Step:
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    model = fresh_model().to(dtype)
    online_view, target_view, ids, filling, filling_ids = inputs()
    bank.push(filling, filling_ids)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.detach().clone().double())
            )
    state = TrainState(model, create_optimizer(model, OptimizerConfig()), bank)
    if threaded:
        state.retrieve = ThreadedRetriever(bank)
    loss, found = train_step(
        state,
        online_view.to(dtype),
        target_view.to(dtype),
        ids,
        k=k,
        learning_rate=RATE,
        momentum=MOMENTUM,
        precision=precision,
        micro_batches=micro_batches,
        temperature=temperature,
    )
    assert found.slots.shape == (BATCH, k)
    assert not loss.requires_grad
    slots = torch.arange(CAPACITY)
    oldest_first = slots[bank.age(slots).argsort(descending=True)]
    return Step(
        loss.double(),
        gradients,
        {n: p.detach().double() for n, p in model.named_parameters() if not n.startswith("target.")},
        {name: p.detach().double() for name, p in model.target.named_parameters()},
        bank.reconstruct(oldest_first).double(),
        bank.ids(oldest_first).tolist(),
    )


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a tensor, relative to its norm, or to the norm of all if its own is about 0."""
    assert found.keys() == expected.keys()
    whole = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    return max(
        float((found[name] - tensor).norm() / torch.maximum(tensor.norm(), 1e-3 * whole))
        for name, tensor in expected.items()
    )


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_step_in_float64_matches_the_method(k: int, temperature: float | None) -> None:
    expected = dense_step(k, temperature=temperature)
    bank = ReferenceBank(RingSpec(CAPACITY, 24, torch.float64))
    found = our_step(k, bank, precision=torch.float64, temperature=temperature)
    assert abs(found.loss - expected.loss) <= 1e-9 * expected.loss
    assert relative(found.gradients, expected.gradients) <= 1e-9
    assert relative(found.online, expected.online) <= 1e-9
    assert relative(found.target, expected.target) <= 1e-9
    assert relative({"bank": found.bank}, {"bank": expected.bank}) <= 1e-9
    assert found.ids == expected.ids


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("micro_batches", [2, 3, 5])
def test_micro_batches_are_one_step(micro_batches: int, temperature: float | None) -> None:
    """Micro-batches of 6, of 4, and of 3 and 2 images, which differ only in their batch statistics."""
    expected = dense_step(5, micro_batches, temperature)
    bank = ReferenceBank(RingSpec(CAPACITY, 24, torch.float64))
    found = our_step(5, bank, precision=torch.float64, micro_batches=micro_batches, temperature=temperature)
    assert abs(found.loss - expected.loss) <= 1e-9 * expected.loss
    assert relative(found.gradients, expected.gradients) <= 1e-9
    assert relative(found.online, expected.online) <= 1e-9
    assert relative({"bank": found.bank}, {"bank": expected.bank}) <= 1e-9
    assert found.ids == expected.ids


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_threaded_retrieval_changes_no_bit(micro_batches: int) -> None:
    sequential = our_step(5, FlatBank(RingSpec(CAPACITY, 24)), precision=torch.float32, micro_batches=micro_batches)
    threaded = our_step(
        5, FlatBank(RingSpec(CAPACITY, 24)), precision=torch.float32, micro_batches=micro_batches, threaded=True
    )
    assert torch.equal(sequential.loss, threaded.loss)
    for before, after in [(sequential.online, threaded.online), (sequential.target, threaded.target)]:
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(sequential.bank, threaded.bank)


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("kind", [ReferenceBank, FlatBank])
def test_step_in_float32(k: int, kind: type[ReferenceBank] | type[FlatBank]) -> None:
    """Rounding errors of 2^-24 per operation, amplified a few hundred times by the divisions of batch norms."""
    expected = dense_step(k)
    found = our_step(k, kind(RingSpec(CAPACITY, 24)), precision=torch.float32)
    assert abs(found.loss - expected.loss) <= 1e-6 * expected.loss
    assert relative(found.gradients, expected.gradients) <= 2e-4
    assert relative(found.online, expected.online) <= 1e-5
    assert relative(found.target, expected.target) <= 1e-6
    assert relative({"bank": found.bank}, {"bank": expected.bank}) <= 1e-5
    assert found.ids == expected.ids


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16])
def test_step_in_bfloat16(k: int, bank_dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits: errors of up to 2^-9 at each of about ten layers, so 1 to 2 % in the activations.

    The backward amplifies them to 11 to 17 % of the gradient, as for plain modules with the same loss. Some neighbours
    are replaced by others within 2 % of their distance. Weights and EMA are float32.
    """
    expected = dense_step(k)
    found = our_step(k, FlatBank(RingSpec(CAPACITY, 24, bank_dtype)), precision=torch.bfloat16)
    assert abs(found.loss - expected.loss) <= 0.02 * expected.loss
    flat, reference = (torch.cat([g.gradients[n].flatten() for n in expected.gradients]) for g in (found, expected))
    assert (flat - reference).norm() <= 0.25 * reference.norm()
    assert relative(found.target, expected.target) <= 1e-6
    assert relative({"bank": found.bank}, {"bank": expected.bank}) <= 0.03
    assert found.ids == expected.ids


def test_float64_tolerance_detects_a_wrong_order() -> None:
    """Updating the target after its forward, the most likely error, is far outside the tolerance."""
    expected, model = dense_step(5), fresh_model()
    early = F.normalize(model.target(inputs()[1]), dim=1)
    assert (early - expected.bank[-BATCH:]).norm() > 1e-3


def test_k_1_is_byol() -> None:
    """With k = 1 the only neighbour is the query's own target embedding: BYOL's loss in one direction."""
    found = our_step(1, FlatBank(RingSpec(CAPACITY, 24)), precision=torch.float32)
    model = fresh_model()
    online_view, target_view, *_ = inputs()
    queries = model(online_view)
    model.update_target(MOMENTUM)
    byol = (2 - 2 * F.cosine_similarity(queries, model.embed_target(target_view))).mean()
    # float32 against float64
    torch.testing.assert_close(found.loss, byol.detach(), rtol=1e-6, atol=0)


def test_loss_of_the_mean_is_the_mean_of_the_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(6, 8, generator=generator, dtype=torch.float64), dim=1)
    neighbors = F.normalize(torch.randn(6, 5, 8, generator=generator, dtype=torch.float64), dim=2)
    every = (queries.unsqueeze(1) - neighbors).square().sum(dim=2)  # [B, K]
    torch.testing.assert_close(mean_shift_loss(queries, neighbors.mean(dim=1)), every.mean(), rtol=1e-12, atol=0)


def test_ema_updates_parameters_not_buffers() -> None:
    model = build_model(MODEL, seed=0)
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.add_(1)
    for module in model.online.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 7
    expected = {
        n: 0.75 * p + 0.25 * dict(model.online.named_parameters())[n] for n, p in model.target.named_parameters()
    }
    buffers = {name: buffer.clone() for name, buffer in model.target.named_buffers()}
    model.update_target(0.75)
    for name, parameter in model.target.named_parameters():
        torch.testing.assert_close(parameter, expected[name].detach(), rtol=1e-6, atol=1e-7)  # one float32 rounding
    for name, buffer in model.target.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_target_has_its_own_batch_statistics() -> None:
    model = build_model(MODEL, seed=0)
    before = copy.deepcopy(model.online.state_dict())
    model.embed_target(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert model.target.projector[1].num_batches_tracked == 1
    assert all(torch.equal(value, before[name]) for name, value in model.online.state_dict().items())
    assert all(not parameter.requires_grad for parameter in model.target.parameters())
