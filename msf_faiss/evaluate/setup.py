"""What an evaluation runs on: weights, images, device and ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.workers import worker_count
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.embeddings.inputs import open_inputs
from msf_faiss.errors import UserError
from msf_faiss.evaluate.feature_cache import FeatureCache
from msf_faiss.evaluate.images import has_held_out, is_labelled
from msf_faiss.evaluate.linear import EpochProgress
from msf_faiss.evaluate.logistic import PenaltyFit
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.weights import Weights, open_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSetup:
    """Weights, and the images to evaluate them on. Every rank calls every function that takes a setup."""

    weights: Weights
    config: Config  # of the weights, with overrides
    device: torch.device
    train: Source
    test: Source | None  # None: there are no labelled held-out images, see `no_held_out`
    cache: FeatureCache | None  # None: features are not cached
    ranks: Ranks  # that share the work
    batch_size: int = 256  # images per batch of features
    notify: Callable[[str], None] = lambda line: None  # called with a line on what happens next
    on_progress: Callable[[EpochProgress | PenaltyFit], None] = lambda progress: None  # during training
    no_held_out: str = ""  # why `test` is None
    unlabelled_held_out: int = 0  # held-out images, if none of them has a label
    identities: dict[str, str] = field(default_factory=dict)  # `Source.identity` by split, filled when needed

    @property
    def splits(self) -> dict[str, Source]:
        """The images by split: "train", and "test" if there are held-out images."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})

    def encoder(self, name: EvalEncoder) -> nn.Module:
        """Normalised views [B, 3, S, S] -> features [B, F], on the device, frozen, in eval mode.

        Raises:
            UserError: if there is no such encoder, or the weights are damaged or do not fit the network.
        """
        return self.weights.backbone(name).to(self.device).requires_grad_(False).eval()

    def held_out(self, evaluation: str) -> Source:
        """The held-out images, which `evaluation` ("a linear probe") needs.

        Raises:
            UserError: if there are none.
        """
        if self.test is None:
            raise UserError(f"{evaluation} needs labelled held-out images, {self.no_held_out}")
        return self.test


def open_setup(
    path: Path,
    overrides: Sequence[str],
    device: torch.device,
    *,
    base: str | None = None,
    arch: str | None = None,
    cache: FeatureCache | None = None,
    ranks: Ranks = ALONE,
    batch_size: int = 256,
    notify: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[EpochProgress | PenaltyFit], None] = lambda progress: None,
) -> EvalSetup:
    """Open weights and their data.

    Args:
        path: run directory (its newest checkpoint), checkpoint directory, or a file of weights.
        overrides: see `weights.open_weights`, as `base` and `arch`.
        device: where to compute.
        base: for a file: config that gives data and views.
        arch: for a file: the network.
        cache: where to cache features; None: nowhere.
        ranks: ranks that share the work.
        batch_size: images per batch of features.
        notify: called with a line on what happens next.
        on_progress: called after each epoch of a classifier, and after each penalty of logistic regression.

    Raises:
        UserError: if weights or data cannot be read, or an override changes anything else.
    """
    with ranks.report_on_main():
        weights = open_weights(path, overrides, base=base, arch=arch)
    for note in weights.notes:
        notify(note)
    config = weights.config
    with ranks.main_first():
        train = open_inputs(config)
        test, reason = open_source(config.data, "test") if has_held_out(config.data) else None, ""
        unlabelled = 0
        if test is None:
            reason = (
                "and the config names none; set data.test_path (with data.kind=huggingface: data.test_split)"
                if not (getattr(config.data, "test_path", None) or getattr(config.data, "test_split", None))
                else "but the config names the training images once more; set data.test_path (with "
                "data.kind=huggingface: data.test_split) to others"
            )
        elif not is_labelled(test):
            reason = (
                f"but none of the {len(test):,} held-out images has a label (for example {test.name(0)}); name "
                "labelled ones, e.g. a folder with one subfolder per class"
            )
            unlabelled, test = len(test), None
    if unlabelled:
        notify(f"held-out images are not used: {reason.removeprefix('but ')}")
    if ranks.local_size > 1:  # which share the cores of the host
        workers = worker_count(train, config, device, processes=ranks.local_size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    return EvalSetup(
        weights=weights,
        config=config,
        device=device,
        train=train,
        test=test,
        cache=cache,
        ranks=ranks,
        batch_size=batch_size,
        notify=notify,
        on_progress=on_progress,
        no_held_out=reason,
        unlabelled_held_out=unlabelled,
    )
