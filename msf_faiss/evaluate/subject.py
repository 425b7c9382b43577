"""What is evaluated: encoders, and the images to judge them by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.data.sources.open import open_source
from msf_faiss.data.workers import worker_count
from msf_faiss.distributed.ranks import Ranks
from msf_faiss.errors import UserError
from msf_faiss.evaluate.feature_cache import FeatureCache
from msf_faiss.evaluate.inputs import has_held_out, is_labelled
from msf_faiss.evaluate.results import EncoderName
from msf_faiss.evaluate.weights import Weights, open_weights
from msf_faiss.search.faiss_setup import set_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Weights and the images that judge them."""

    weights: Weights
    config: Config  # that of the weights
    device: torch.device
    train: Source
    test: Source | None  # None: there are no held-out images with labels
    cache: FeatureCache | None  # None: features are not kept
    ranks: Ranks  # that share the work; every function that is given this subject is called by all of them
    identities: dict[str, str] = field(default_factory=dict)  # of the images, by split, once they are known

    def encoder(self, name: EncoderName) -> nn.Module:
        """[B, 3, S, S] normalised views -> [B, F] on the device, frozen, in eval mode.

        Raises:
            UserError: if there is no such encoder, the weights are damaged, or do not fit the network one by one.
        """
        return self.weights.backbone(name).to(self.device).requires_grad_(False).eval()

    def held_out(self, why: str) -> Source:
        """The held-out images.

        Raises:
            UserError: if there are none; `why` says what they are for.
        """
        if self.test is None:
            raise UserError(
                f"{why}, and the config names no held-out images with labels; name some with --set data.test_path=…"
                " (with data.kind=huggingface: data.test_split)"
            )
        return self.test


def open_subject(
    path: Path,
    overrides: Sequence[str],
    device: torch.device,
    *,
    base: str | None = None,
    arch: str | None = None,
    cache: FeatureCache | None = None,
    ranks: Ranks | None = None,
) -> Subject:
    """Open a run's newest checkpoint, a checkpoint or a file of weights, and its data; torch and FAISS get the
    config's threads.

    Args:
        path: run or checkpoint directory, or a file.
        overrides: see `weights.open_weights`, as `base` and `arch`.
        device: where its encoders compute.
        base: for a file: the config of data and views.
        arch: for a file: the network.
        cache: where features are kept.
        ranks: that share the work; None: this process alone.

    Raises:
        UserError: if weights or data cannot be used, or an override touches anything else.
    """
    ranks = ranks or Ranks.alone()
    with ranks.report_on_main():
        weights = open_weights(path, overrides, base=base, arch=arch)
    config = weights.config
    if config.train.threads is not None:
        set_threads(config.train.threads)
    with ranks.main_first():
        train = open_source(config.data, "train")
        assert train is not None, "every config names training data"
        test = open_source(config.data, "test") if has_held_out(config.data) else None
        if test is not None and not is_labelled(test):
            test = None
    if ranks.local_size > 1:  # the host's cores are shared by its ranks
        workers = worker_count(train, config, device, processes=ranks.local_size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    return Subject(weights=weights, config=config, device=device, train=train, test=test, cache=cache, ranks=ranks)
