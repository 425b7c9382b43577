"""Features of the images of an evaluation: computed by all ranks together, or read from the cache."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from msf_faiss.data.source import Source
from msf_faiss.embeddings.extract import DIVERGED, Features, describe_view, extract
from msf_faiss.evaluate.feature_cache import CachedFeatures
from msf_faiss.evaluate.images import labelled_ids, sample
from msf_faiss.evaluate.results import EvalEncoder
from msf_faiss.evaluate.setup import EvalSetup

_SPLITS = {"train": "training", "test": "held-out"}


def choose_images(setup: EvalSetup, limit: int | None = None) -> dict[str, Tensor]:
    """Ids [N] of the labelled images by split; at most `limit` of each, a sample that the config's seed determines.

    Raises:
        UserError: if a split has no labels.
    """
    return {
        split: sample(labelled_ids(source), limit, seed=setup.config.seed) for split, source in setup.splits.items()
    }


def compute_features(
    setup: EvalSetup, encoder: EvalEncoder, chosen: Mapping[str, Tensor], *, network: nn.Module | None = None
) -> dict[str, Features]:
    """Centre-view features of the chosen images by split, on every rank.

    Args:
        setup: weights and images; features are read from its cache, and written to it.
        encoder: name of the encoder.
        chosen: ids [N] by split.
        network: the encoder, if it is loaded already.

    Raises:
        UserError: if an image is unreadable, the weights cannot be loaded, or a feature is not finite.
    """
    features = {}
    for split, ids in chosen.items():
        source, images = setup.splits[split], f"{len(ids):,} {_SPLITS[split]} images"
        cached = _read_cache(setup, encoder, split, ids)
        if all(setup.ranks.gather_objects(cached is not None)) and cached is not None:
            setup.notify(f"{encoder}: cached features of {images}")
        else:
            setup.notify(f"{encoder}: features of {images}")
            if network is None:
                with setup.ranks.report_on_main():
                    network = setup.encoder(encoder)
            cached = _compute(setup, network, source, ids)
            if setup.cache is not None and setup.ranks.is_main:
                try:
                    setup.cache.put(_cache_path(setup, encoder, split, ids), cached)
                except OSError as error:
                    setup.notify(f"features not cached in {setup.cache.folder}: {error.strerror or error}")
        labels = None if source.labels is None else torch.from_numpy(source.labels[cached.ids.numpy()])
        features[split] = Features(cached.embeddings, labels, cached.ids)
    return features


def _read_cache(setup: EvalSetup, encoder: EvalEncoder, split: str, ids: Tensor) -> CachedFeatures | None:
    """Cached features of the images `ids` [N], or of all labelled images, reduced to `ids`."""
    if setup.cache is None:
        return None
    if split not in setup.identities:
        setup.identities[split] = setup.ranks.broadcast_object(setup.splits[split].identity())
    cached = setup.cache.get(_cache_path(setup, encoder, split, ids))
    if cached is None and len(ids) < len(all_ids := labelled_ids(setup.splits[split])):
        whole = setup.cache.get(_cache_path(setup, encoder, split, all_ids))
        if whole is not None:
            rows = torch.isin(whole.ids, ids)
            cached = CachedFeatures(whole.embeddings[rows], whole.ids[rows])
    return cached


def _cache_path(setup: EvalSetup, encoder: EvalEncoder, split: str, ids: Tensor) -> Path:
    assert setup.cache is not None
    weights, config = setup.weights, setup.config
    trained = encoder in weights.trained
    key = {
        "encoder": encoder,
        "weights": weights.digest if trained else None,
        "net": None if encoder == "pixels" else weights.net,
        "seed": config.seed if encoder == "untrained" else None,
        "view": describe_view(config.views),
        "images": setup.identities[split],
        "ids": hashlib.sha256(ids.to(torch.int64).contiguous().numpy().data).hexdigest(),
        "unreadable": config.data.unreadable,
        "device": setup.device.type,
    }
    step = f"-step-{weights.step:08d}" if trained and weights.step is not None else ""
    return setup.cache.path(f"{encoder}{step}-{split}", key)


def _compute(setup: EvalSetup, network: nn.Module, source: Source, ids: Tensor) -> CachedFeatures:
    ranks = setup.ranks
    shared = len(ids) >= ranks.size
    own = ids[ranks.slice_of(len(ids))] if shared else ids
    foreign = f"the weights of {setup.weights.path} do not suit the network or the views; check --arch and views.…"
    features = ranks.on_all(
        lambda: extract(
            network,
            source,
            ids=own,
            config=setup.config,
            device=setup.device,
            batch_size=setup.batch_size,
            if_not_finite=DIVERGED if setup.weights.form == "msf-faiss" else foreign,
        )
    )
    if not shared:
        return CachedFeatures(features.embeddings, features.ids)
    return CachedFeatures(ranks.gather_rows(features.embeddings), ranks.gather_rows(features.ids))
