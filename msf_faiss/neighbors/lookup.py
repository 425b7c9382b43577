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

from msf_faiss.bank import FlatBank
from msf_faiss.errors import UserError
from msf_faiss.neighbors.retrieval import Retrieved, retrieve_images
from msf_faiss.neighbors.subject import Subject, thumbnail
from msf_faiss.text import printable

_MOST = 1000  # neighbours: those of all images are held at a time
_AT_A_TIME = 1 << 16  # embeddings copied out of the bank to be queries


class Lookup:
    """What is known of images.

    Args:
        subject: is asked.
        k: neighbours of each image.
        files: queries that are no training images.

    Raises:
        UserError: if k is above 1,000.
    """

    def __init__(self, subject: Subject, k: int, files: int = 0) -> None:
        if k > _MOST:
            raise UserError(f"{k:,} neighbours of each of many images are too many; --k {_MOST} is the most")
        self._subject = subject
        self._k = k
        self._rows = np.full(len(subject.source) + files, -1, np.int64)  # of each image in what was found
        self._found = Retrieved.empty(0, k)
        self._embeddings: dict[int, Tensor] = {}  # [D] each
        self._pictures: dict[int, Image.Image] = {}

    def put(
        self, keys: NDArray[np.int64], embeddings: Tensor, pictures: Sequence[Image.Image], found: Retrieved
    ) -> None:
        """Take over what is known of some images: `embeddings` [M, D] and the rest."""
        self._embeddings |= zip(keys.tolist(), embeddings, strict=True)
        self._pictures |= zip(keys.tolist(), pictures, strict=True)
        self._keep(keys, found)

    def sample(self, count: int, seed: int) -> NDArray[np.int64]:
        """Images whose neighbours are known from now on: all that were searched, of a bank `count` random ones.

        [M] ids, rising; unreadable images that the config allows are missing.
        """
        subject = self._subject
        if subject.searched == "bank":
            some = np.random.default_rng(seed).permutation(len(subject.source))[:count]
            return self._embed(np.sort(some), pictured=False, ask=True)
        parts = [
            retrieve_images(
                subject.bank, subject.bank.reconstruct(slots), subject.entries[slots.cpu().numpy()], self._k
            )
            for slots in torch.split(torch.arange(len(subject.bank), device=subject.device), _AT_A_TIME)
        ]
        self._keep(subject.entries, Retrieved.joined(parts))
        return np.sort(subject.entries)

    def neighbors(self, keys: NDArray[np.int64]) -> Retrieved:
        """Of all that is searched, those of the images `keys` [M].

        Raises:
            UserError: if one of them cannot be read.
        """
        unknown = keys[self._rows[keys] < 0]
        if len(unknown):
            self._embed(unknown, pictured=True, ask=True)
        return self._found.of(self._rows[keys])

    def neighbors_among(self, keys: NDArray[np.int64], those: NDArray[np.int64]) -> Retrieved:
        """Of the images `those` alone, as far as they are searched, the neighbours of the images `keys` [M]."""
        bank, slots = self._subject.bank, self._subject.searchable()
        slots = slots[torch.from_numpy(np.isin(self._subject.entries[slots.cpu().numpy()], those)).to(slots.device)]
        if len(slots) == 0:
            return Retrieved.empty(len(keys), self._k)
        dtype = torch.float32 if bank.dtype == torch.float64 else bank.dtype
        part = FlatBank(len(slots), bank.dim, dtype, bank.device)
        part.push(bank.reconstruct(slots), bank.ids(slots))
        found = retrieve_images(part, self.embeddings(keys), keys, self._k)
        ages = bank.age(slots.flip(0)).cpu().numpy()  # [n] in the bank, by the age in the part
        return found._replace(ages=np.append(ages, -1)[found.ages])

    def embeddings(self, keys: NDArray[np.int64]) -> Tensor:
        """[M, D] unit norm, on the subject's device.

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
        subject = self._subject
        if subject.searched == "dataset":
            slots = torch.from_numpy(self._slots[ids]).to(subject.device)
            readable, embeddings = ids, subject.bank.reconstruct(slots)
        else:
            seen, parts = [], []
            for some, crops in self._required(ids) if pictured else subject.crops(ids):
                seen.append(some)
                parts.append(subject.embed(crops))
                if pictured:
                    self._pictures |= zip(some.tolist(), map(thumbnail, crops), strict=True)
            readable, embeddings = np.concatenate(seen), torch.cat(parts)
        self._embeddings |= zip(readable.tolist(), embeddings, strict=True)
        if ask:
            self._keep(readable, retrieve_images(subject.bank, embeddings, readable, self._k))
        return readable

    @cached_property
    def _slots(self) -> NDArray[np.int64]:
        """[N] of each image in a bank that holds every readable one once."""
        slots = np.full(len(self._subject.source), -1, np.int64)
        slots[self._subject.entries] = np.arange(len(self._subject.entries))
        return slots

    def _keep(self, keys: NDArray[np.int64], found: Retrieved) -> None:
        self._rows[keys] = len(self._found.ids) + np.arange(len(keys))
        self._found = Retrieved.joined([self._found, found])

    def _required(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Centre views of images that the page cannot do without, even where unreadable ones may be skipped."""
        missing, cause = set(ids.tolist()), None
        try:
            for some, crops in self._subject.crops(ids):
                missing -= set(some.tolist())
                yield some, crops
        except UserError as error:
            if self._subject.config.data.unreadable == "error":
                raise
            cause = error
        if missing:
            raise UserError(
                f"{printable(self._subject.source.name(min(missing)))} cannot be read any more, but the bank "
                "retrieves it; bring the image back, or search the present ones with --source dataset"
            ) from cause
