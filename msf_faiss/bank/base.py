"""The contract of a bank: a FIFO of unit vectors that can be searched.

Shapes: N capacity, n filled slots, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msf_faiss.search.neighbors import Neighbors


@runtime_checkable
class Bank(Protocol):
    """A first-in, first-out bank of embeddings. All tensors are on `device`.

    Storage is the truth, an index only a way of searching it: what is returned always comes from the stored entries, in
    the bank's dtype. A query is rounded to that dtype too before it is compared, so that an embedding and its own
    entry are the same vector.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pushed(self) -> int:
        """Entries ever pushed; the newest has sequence number pushed - 1 and lies in slot (pushed - 1) mod N."""

    def __len__(self) -> int:
        """Filled slots, n = min(pushed, N)."""

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        """Store `embeddings` [M, D] (unit norm, any floating dtype) under `ids` [M] int64, oldest first.

        The oldest entries give way; of more than N vectors only the last N stay.

        Raises:
            ValueError: on a wrong shape, dtype or device.
        """

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """The min(k, n) most similar entries of each of `queries` [B, D] (unit norm, any floating dtype).

        Neighbours are canonical: similarities are computed pair by pair in float64 from the stored entries and
        rounded to float32; equal ones are ordered youngest first. An empty bank gives K = 0. An approximate bank may
        miss some of the most similar entries, but never a query's own entry among those that were pushed last.

        Raises:
            ValueError: on a wrong shape or device, or k < 1.
        """

    def mean_of(self, slots: Tensor) -> Tensor:
        """Plain mean over the entries in `slots` [B, K]: [B, D], float32 (float64 in a float64 bank).

        Not of unit norm in general: it is the z-bar of the loss (design 1). [B, K, D] is never held.

        Raises:
            ValueError: if K is 0.
        """

    def reconstruct(self, slots: Tensor) -> Tensor:
        """Entries in `slots` [...]: [..., D] float32 (float64 in a float64 bank)."""

    def ids(self, slots: Tensor) -> Tensor:
        """Data-set ids [...] int64 of the entries in `slots` [...]."""

    def age(self, slots: Tensor) -> Tensor:
        """Entries pushed since each entry in `slots` [...]: [...] int64, 0 for the newest."""

    def newest(self, count: int) -> Tensor:
        """Slots of the last `count` entries that this process pushed, oldest first, or of as many as are still there.

        [n] int64 with n <= count.
        """

    def metrics(self) -> dict[str, float]:
        """What this kind of bank knows about itself since the last reading, by name; see each kind."""

    def state_dict(self) -> dict[str, Tensor]:
        """The ring as it lies in memory, without copying: embeddings [n, D], ids [n], pushed [].

        What a search depends on besides is there too, under names that begin with "index."; a bank of another kind or
        capacity leaves it alone.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the entries of a saved bank, of any capacity: the newest that fit, in order, in their own slots.

        Raises:
            ValueError: if the state is not a bank's, or has another dimension.
        """


@runtime_checkable
class ApproximateBank(Bank, Protocol):
    """A bank whose `search` may miss neighbours, and which can be told to miss fewer."""

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        """What `search` would return if it missed nothing, found slowly."""

    def raise_recall(self) -> str:
        """Spend more on each search, or rebuild what has decayed; as a last resort search exactly from now on.

        Returns:
            What it did, in words, for the log.
        """
