"""Neighbours, embeddings and pictures of training images, each found once whoever asks for them.

An image is named by its key: its id in the training set, or len(source) + i for the i-th file that is a query.

Shapes: M images, K neighbours, D dimensions, n entries searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from msf_faiss.bank import FlatBank, RingSpec
from msf_faiss.errors import UserError
from msf_faiss.neighbors.gallery import Gallery, thumbnail
from msf_faiss.neighbors.retrieval import ImageNeighbors, search_images
from msf_faiss.text import printable

_MOST = 1000  # neighbours: those of all images are held at a time
_AT_A_TIME = 1 << 16  # embeddings copied out of the bank to be queries


class Lookup:
    """What is known of images.

    Args:
        gallery: is asked.
        k: neighbours of each image.
        files: queries that are no training images.

    Raises:
        UserError: if k is above 1,000.
    """

    def __init__(self, gallery: Gallery, k: int, files: int = 0) -> None:
        if k > _MOST:
            raise UserError(f"{k:,} neighbours of each of many images are too many; --k {_MOST} is the most")
        self._gallery = gallery
        self._k = k
        self._rows = np.full(len(gallery.source) + files, -1, np.int64)  # of each image in what was found
        self._found = ImageNeighbors.empty(0, k)
        self._embeddings: dict[int, Tensor] = {}  # [D] each
        self._pictures: dict[int, Image.Image] = {}

    def put(
        self, keys: NDArray[np.int64], embeddings: Tensor, pictures: Sequence[Image.Image], found: ImageNeighbors
    ) -> None:
        """Take over what is known of some images: `embeddings` [M, D] and the rest."""
        self._embeddings |= zip(keys.tolist(), embeddings, strict=True)
        self._pictures |= zip(keys.tolist(), pictures, strict=True)
        self._keep(keys, found)

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Images whose neighbours are known from now on: all that were searched, of a bank `count` random ones.

        [M] ids, rising; unreadable images that the config allows are missing.
        """
        gallery = self._gallery
        if gallery.searched == "bank":
            some = np.random.default_rng(seed).permutation(len(gallery.source))[:count]
            return self._embed(np.sort(some), pictured=False, ask=True)
        parts = [
            search_images(
                gallery.bank, gallery.bank.reconstruct(slots), gallery.entry_ids[slots.cpu().numpy()], self._k
            )
            for slots in torch.split(torch.arange(len(gallery.bank), device=gallery.device), _AT_A_TIME)
        ]
        self._keep(gallery.entry_ids, ImageNeighbors.joined(parts))
        return np.sort(gallery.entry_ids)

    def neighbors(self, keys: NDArray[np.int64]) -> ImageNeighbors:
        """Of all that is searched, those of the images `keys` [M].

        Raises:
            UserError: if one of them cannot be read.
        """
        unknown = keys[self._rows[keys] < 0]
        if len(unknown):
            self._embed(unknown, pictured=True, ask=True)
        return self._found.of(self._rows[keys])

    def neighbors_among(self, keys: NDArray[np.int64], those: NDArray[np.int64]) -> ImageNeighbors:
        """Of the images `those` alone, as far as they are searched, the neighbours of the images `keys` [M]."""
        bank, slots = self._gallery.bank, self._gallery.searchable_slots()
        slots = slots[torch.from_numpy(np.isin(self._gallery.entry_ids[slots.cpu().numpy()], those)).to(slots.device)]
        if len(slots) == 0:
            return ImageNeighbors.empty(len(keys), self._k)
        dtype = torch.float32 if bank.dtype == torch.float64 else bank.dtype
        part = FlatBank(RingSpec(len(slots), bank.dim, dtype, bank.device))
        part.push(bank.reconstruct(slots), bank.ids(slots))
        found = search_images(part, self.embeddings(keys), keys, self._k)
        ages = bank.age(slots.flip(0)).cpu().numpy()  # [n] in the bank, by the age in the part
        return found._replace(ages=np.append(ages, -1)[found.ages])

    def embeddings(self, keys: NDArray[np.int64]) -> Tensor:
        """[M, D] unit norm, on the gallery's device.

        Raises:
            UserError: if an image cannot be read.
        """
        unknown = np.array([key for key in keys.tolist() if key not in self._embeddings], np.int64)
        if len(unknown):
            self._embed(unknown, pictured=True, ask=False)
        return torch.stack([self._embeddings[key] for key in keys.tolist()])

    def pictures(self, keys: NDArray[np.int64]) -> list[Image.Image]:
        """What the encoder saw of each image.

        Raises:
            UserError: if an image cannot be read.
        """
        unknown = np.array([key for key in keys.tolist() if key not in self._pictures], np.int64)
        if len(unknown):
            for ids, crops in self._required(unknown):
                self._pictures |= zip(ids.tolist(), map(thumbnail, crops), strict=True)
        return [self._pictures[key] for key in keys.tolist()]

    def _embed(self, ids: NDArray[np.int64], *, pictured: bool, ask: bool) -> NDArray[np.int64]:
        """Embed training images, and ask for their neighbours; those that can be read, as pictured ones must."""
        gallery = self._gallery
        if gallery.searched == "dataset":
            slots = torch.from_numpy(self._slots[ids]).to(gallery.device)
            readable, embeddings = ids, gallery.bank.reconstruct(slots)
        else:
            seen, parts = [], []
            for some, crops in self._required(ids) if pictured else gallery.views(ids):
                seen.append(some)
                parts.append(gallery.embed_views(crops))
                if pictured:
                    self._pictures |= zip(some.tolist(), map(thumbnail, crops), strict=True)
            readable, embeddings = np.concatenate(seen), torch.cat(parts)
        self._embeddings |= zip(readable.tolist(), embeddings, strict=True)
        if ask:
            self._keep(readable, search_images(gallery.bank, embeddings, readable, self._k))
        return readable

    @cached_property
    def _slots(self) -> NDArray[np.int64]:
        """[N] of each image in a bank that holds every readable one once."""
        slots = np.full(len(self._gallery.source), -1, np.int64)
        slots[self._gallery.entry_ids] = np.arange(len(self._gallery.entry_ids))
        return slots

    def _keep(self, keys: NDArray[np.int64], found: ImageNeighbors) -> None:
        self._rows[keys] = len(self._found.ids) + np.arange(len(keys))
        self._found = ImageNeighbors.joined([self._found, found])

    def _required(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Centre views of images that the page cannot do without, even where unreadable ones may be skipped."""
        missing, cause = set(ids.tolist()), None
        try:
            for some, crops in self._gallery.views(ids):
                missing -= set(some.tolist())
                yield some, crops
        except UserError as error:
            if self._gallery.config.data.unreadable == "error":
                raise
            cause = error
        if missing:
            raise UserError(
                f"{printable(self._gallery.source.name(min(missing)))} cannot be read any more, but the bank "
                "retrieves it; bring the image back, or search the present ones with --source dataset"
            ) from cause
