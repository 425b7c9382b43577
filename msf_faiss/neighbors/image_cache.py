"""Neighbours, embeddings and thumbnails of a gallery's images, each computed once.

An image is identified by its key: its id in the training set, or len(source) + i for the i-th file among the queries.

Shapes: M images, K neighbours, D dimensions, n entries of the gallery.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery, thumbnail
from msf_faiss.neighbors.image_search import ImageNeighbors, search_images
from msf_faiss.text import printable

_MAX_K = 1000  # the neighbours of all images are kept in memory
_CHUNK = 1 << 16  # entries that are copied out of the bank to be queries


class ImageCache:
    """What is known about images of a gallery.

    Args:
        gallery: where to look up what is unknown.
        k: K, neighbours of each image.
        files: number of queries that are not training images.

    Raises:
        UserError: if k is above 1,000.
    """

    def __init__(self, gallery: Gallery, k: int, files: int = 0) -> None:
        if k > _MAX_K:
            raise UserError(f"{k:,} neighbours of many images take too much memory; --k can be at most {_MAX_K}")
        self._gallery = gallery
        self._k = k
        self._rows = np.full(len(gallery.source) + files, -1, np.int64)  # by key, row in `_neighbors`
        self._neighbors = ImageNeighbors.empty(0, k)
        self._embeddings: dict[int, Tensor] = {}  # by key, [D]
        self._thumbnails: dict[int, Image.Image] = {}  # by key

    def add(
        self, keys: NDArray[np.int64], embeddings: Tensor, thumbnails: Iterable[Image.Image], neighbors: ImageNeighbors
    ) -> None:
        """Add images with `embeddings` [M, D]."""
        self._embeddings |= zip(keys.tolist(), embeddings, strict=True)
        self._thumbnails |= zip(keys.tolist(), thumbnails, strict=True)
        self._add_neighbors(keys, neighbors)

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Search the neighbours of `count` random training images, or of all if the data set is searched.

        Returns ids [M], ascending, without skipped unreadable images.
        """
        gallery = self._gallery
        if gallery.searched == "bank":
            chosen = np.random.default_rng(seed).permutation(len(gallery.source))[:count]
            return self._embed(np.sort(chosen), required=False, search=True)
        parts = [
            search_images(
                gallery.bank, gallery.bank.reconstruct(slots), gallery.entry_ids[slots.cpu().numpy()], self._k
            )
            for slots in torch.split(torch.arange(len(gallery.bank), device=gallery.device), _CHUNK)
        ]
        self._add_neighbors(gallery.entry_ids, ImageNeighbors.concatenate(parts))
        return np.sort(gallery.entry_ids)

    def neighbors(self, keys: NDArray[np.int64]) -> ImageNeighbors:
        """The neighbours of images `keys` [M] in the gallery.

        Raises:
            UserError: if an image is unreadable.
        """
        unknown = keys[self._rows[keys] < 0]
        if len(unknown):
            self._embed(unknown, required=True, search=True)
        return self._neighbors.take(self._rows[keys])

    def neighbors_among(self, keys: NDArray[np.int64], candidates: NDArray[np.int64]) -> ImageNeighbors:
        """The neighbours of images `keys` [M] among those of the gallery's images that are `candidates`."""
        bank, slots = self._gallery.bank, self._gallery.searchable_slots()
        chosen = np.isin(self._gallery.entry_ids[slots.cpu().numpy()], candidates)
        slots = slots[torch.from_numpy(chosen).to(slots.device)]
        if len(slots) == 0:
            return ImageNeighbors.empty(len(keys), self._k)
        dtype = torch.float32 if bank.dtype == torch.float64 else bank.dtype
        part = FlatBank(RingSpec(len(slots), bank.dim, dtype, bank.device))
        part.push(bank.reconstruct(slots), bank.ids(slots))
        neighbors = search_images(part, self.embeddings(keys), keys, self._k)
        ages = bank.age(slots.flip(0)).cpu().numpy()  # [n] age in the bank, by age in the part
        return neighbors._replace(ages=np.append(ages, -1)[neighbors.ages])

    def embeddings(self, keys: NDArray[np.int64]) -> Tensor:
        """Unit vectors [M, D] on the gallery's device.

        Raises:
            UserError: if an image is unreadable.
        """
        unknown = np.array([key for key in keys.tolist() if key not in self._embeddings], np.int64)
        if len(unknown):
            self._embed(unknown, required=True, search=False)
        return torch.stack([self._embeddings[key] for key in keys.tolist()])

    def thumbnails(self, keys: NDArray[np.int64]) -> list[Image.Image]:
        """Thumbnails of the images' centre views.

        Raises:
            UserError: if an image is unreadable.
        """
        unknown = np.array([key for key in keys.tolist() if key not in self._thumbnails], np.int64)
        if len(unknown):
            for ids, views in self._required_views(unknown):
                self._thumbnails |= zip(ids.tolist(), map(thumbnail, views), strict=True)
        return [self._thumbnails[key] for key in keys.tolist()]

    def _embed(self, ids: NDArray[np.int64], *, required: bool, search: bool) -> NDArray[np.int64]:
        """Embed training images, and search their neighbours; returns the readable ids, all of them if `required`."""
        gallery = self._gallery
        if gallery.searched == "dataset":
            slots = torch.from_numpy(self._slots[ids]).to(gallery.device)
            readable, embeddings = ids, gallery.bank.reconstruct(slots)
        else:
            seen, parts = [], []
            for some, views in self._required_views(ids) if required else gallery.views(ids):
                seen.append(some)
                parts.append(gallery.embed_views(views))
                if required:  # which means that they are on the page
                    self._thumbnails |= zip(some.tolist(), map(thumbnail, views), strict=True)
            readable, embeddings = np.concatenate(seen), torch.cat(parts)
        self._embeddings |= zip(readable.tolist(), embeddings, strict=True)
        if search:
            self._add_neighbors(readable, search_images(gallery.bank, embeddings, readable, self._k))
        return readable

    @cached_property
    def _slots(self) -> NDArray[np.int64]:
        """[N] slot of each image, in a bank that has one entry of each readable one."""
        slots = np.full(len(self._gallery.source), -1, np.int64)
        slots[self._gallery.entry_ids] = np.arange(len(self._gallery.entry_ids))
        return slots

    def _add_neighbors(self, keys: NDArray[np.int64], neighbors: ImageNeighbors) -> None:
        self._rows[keys] = len(self._neighbors.ids) + np.arange(len(keys))
        self._neighbors = ImageNeighbors.concatenate([self._neighbors, neighbors])

    def _required_views(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Centre views of images of the page, on which unreadable ones cannot be skipped."""
        missing, cause = set(ids.tolist()), None
        try:
            for some, views in self._gallery.views(ids):
                missing -= set(some.tolist())
                yield some, views
        except UserError as error:
            if self._gallery.config.data.unreadable == "error":
                raise
            cause = error
        if missing:
            raise UserError(
                f"{printable(self._gallery.source.name(min(missing)))} is in the bank but no longer readable; restore "
                "the image, or search the present images with --source dataset"
            ) from cause
