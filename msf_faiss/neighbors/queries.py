"""Choose, decode and embed the queries of an inspection.

Shapes: Q queries, B images, S pixels of a view's side, D dimensions.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msf_faiss.data.readable import decode_readable
from msf_faiss.data.source import Source, UnreadableImageError
from msf_faiss.data.sources.decode import decode_file
from msf_faiss.errors import UserError
from msf_faiss.files import kind_of
from msf_faiss.neighbors.gallery import Gallery
from msf_faiss.neighbors.options import InspectOptions
from msf_faiss.text import printable
from msf_faiss.views.random_view import center_crop

_DECODE_BATCH = 16  # images; a decoded photograph may take 50 MB


class Queries(NamedTuple):
    """Embedded queries: files first, then training images."""

    ids: NDArray[np.int64]  # [Q], -1 for a file
    names: list[str]
    views: Tensor  # [Q, 3, S, S] uint8 centre views
    embeddings: Tensor  # [Q, D] unit norm


def choose_queries(gallery: Gallery, options: InspectOptions) -> Queries | None:
    """The chosen or random queries, each once; None if the worst are wanted, which depend on their neighbours.

    Raises:
        UserError: as `embed_queries`; if the worst are wanted, but no image has a label.
    """
    if options.selection == "worst":
        if gallery.labels.max() < 0:
            raise UserError("the images have no labels, so none is a worse query than another; leave out --worst")
        return None
    if options.selection == "random":
        return embed_queries(gallery, (), balanced_choice(gallery.source, options.queries, options.seed))
    return embed_queries(gallery, list(dict.fromkeys(options.files)), list(dict.fromkeys(options.ids)))


def embed_queries(gallery: Gallery, files: Sequence[Path], ids: Sequence[int]) -> Queries:
    """Embed files and training images; with `unreadable: skip`, unreadable training images are left out.

    Raises:
        UserError: if an image does not exist or is unreadable, or none is left.
    """
    source, config = gallery.source, gallery.config
    for index in ids:
        if not 0 <= index < len(source):
            raise UserError(f"there is no training image {index}; ids are 0 to {len(source) - 1:,}")
    views = [center_crop([_decode_query(path)], config.views) for path in files]  # [B, 3, S, S] uint8 each
    readable: list[int] = []
    unreadable: list[str] = []
    for batch in decode_batches(ids):
        decoded = decode_readable(source, np.array(batch, np.int64), config.data)
        readable += decoded.ids.tolist()
        unreadable += decoded.unreadable.values()
        views.append(center_crop(decoded.images, config.views))
    all_views = torch.cat(views)  # [Q, 3, S, S]
    if len(all_views) == 0:
        raise UserError(f"none of the queries can be read: {unreadable[0]}")
    return Queries(
        ids=np.array([-1] * len(files) + readable, np.int64),
        names=[printable(path) for path in files] + [printable(source.name(index)) for index in readable],
        views=all_views,
        embeddings=gallery.embed_views(all_views),
    )


def balanced_choice(source: Source, count: int, seed: int) -> list[int]:
    """Ids of `count` random images, by class and id, with equal classes as far as possible.

    Unlabelled images are chosen only if no image has a label.
    """
    shuffled = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels
    if labels is None or labels.max() < 0:
        return sorted(shuffled[:count].tolist())
    shuffled = shuffled[labels[shuffled] >= 0]
    by_class = np.argsort(labels[shuffled], kind="stable")
    _, starts, sizes = np.unique(labels[shuffled][by_class], return_index=True, return_counts=True)
    turn = np.empty_like(by_class)  # number of images of the same class that come before
    turn[by_class] = np.arange(len(by_class)) - np.repeat(starts, sizes)
    chosen = shuffled[np.argsort(turn, kind="stable")[:count]]
    return sorted(chosen.tolist(), key=lambda index: (int(labels[index]), index))


def decode_batches(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """`ids` in batches small enough to be decoded at once."""
    return (ids[start : start + _DECODE_BATCH] for start in range(0, len(ids), _DECODE_BATCH))


def _decode_query(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    kind = kind_of(path, "name an image file")
    if kind != "file":
        problem = "is a folder" if kind == "folder" else "is not a regular file" if kind else "does not exist"
        raise UserError(f"--query {printable(path)} {problem}; name an image file")
    try:
        return decode_file(path, lambda: printable(path))
    except UnreadableImageError as error:
        raise UserError(f"--query {printable(path)} cannot be read as an image; name a JPEG or PNG file") from error
