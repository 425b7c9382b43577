"""The interface of a bank: a first-in, first-out memory of unit vectors that can be searched.

Shapes: N capacity, n filled slots, M pushed vectors, B queries, K neighbours, D dimensions.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from msf_faiss.search.neighbors import Neighbors


class Layout(NamedTuple):
    """Which part of a bank this process stores.

    Entry number s (from 0) is in slot j = s mod `capacity` of the bank, which is slot j // `size` of part j mod `size`.
    """

    capacity: int  # slots of the whole bank
    size: int  # number of parts
    rank: int  # number of this part
    pushed: int  # entries ever pushed into the whole bank

    @property
    def slots(self) -> int:
        """Slots of this part."""
        return len(range(self.rank, self.capacity, self.size))

    def count(self, pushed: int) -> int:
        """How many of the first `pushed` entries of the bank this part received."""
        rotations, rest = divmod(pushed, self.capacity)
        return rotations * self.slots + len(range(self.rank, rest, self.size))


class Bank(Protocol):
    """A first-in, first-out memory of embeddings. All tensors are on `device`.

    Results always come from the stored entries, in the bank's dtype; an index only proposes candidates. Queries are
    rounded to that dtype before they are compared, so an embedding and its own entry are the same vector.
    """

    capacity: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    engine_ms: Mapping[str, float]
    """Milliseconds of an exact search by each engine, if they were timed when the bank was created."""

    @property
    def pushed(self) -> int:
        """Entries ever pushed. The newest has sequence number pushed - 1 and is in slot (pushed - 1) mod N."""

    def __len__(self) -> int:
        """Filled slots, n = min(pushed, N)."""
        return min(self.pushed, self.capacity)

    def push(self, embeddings: Tensor, ids: Tensor) -> None:
        """Store `embeddings` [M, D] (unit norm or zero, any floating dtype) under `ids` [M] int64, oldest first.

        They overwrite the oldest entries; of more than N vectors the last N are stored. On CUDA and on several ranks,
        where raising would wait for the device or leave the other ranks waiting, a row that is not finite or not of
        unit norm is stored as zeros, and counted in `metrics`.

        Raises:
            ValueError: on a wrong type, shape, dtype or device; a `VectorError` if a row is not finite or its norm
                differs from 1 by more than 1/64.
        """

    def search(self, queries: Tensor, k: int) -> Neighbors:
        """Return the min(k, n) most similar entries of each of `queries` [B, D] (as in `push`), k of any integer type.

        Neighbours are canonical: similarities are computed pair by pair in float64 from the stored entries and rounded
        to float32, and ties are ordered youngest first. An empty bank returns K = 0. An approximate bank may miss some
        of the most similar entries, but never a query's own entry if that was in the last push. Where `push`
        would store a query as zeros, its similarities are NaN.

        Raises:
            ValueError: on a wrong type, shape, dtype or device, or k < 1; a `VectorError` as in `push`.
        """

    def search_exactly(self, queries: Tensor, k: int) -> Neighbors:
        """Search without missing any neighbour: as `search`, but slower where the bank is approximate."""

    def mean_of(self, slots: Tensor) -> Tensor:
        """Return the mean of the entries in `slots` [B, K]: [B, D], float32 (float64 in a float64 bank).

        Not normalized. With all vectors of unit norm, the loss of MSF (Koohpayegani et al., ICCV 2021, eq. 1) depends
        on the neighbours only through this mean. Needs O(B D) memory.

        Raises:
            ValueError: on a wrong type or shape, or if K is 0.
        """

    def reconstruct(self, slots: Tensor) -> Tensor:
        """Return the entries in `slots` [...]: [..., D] float32 (float64 in a float64 bank)."""

    def ids(self, slots: Tensor) -> Tensor:
        """Return the ids [...] int64 under which the entries in `slots` [...] were pushed."""

    def age(self, slots: Tensor) -> Tensor:
        """Return the number of entries pushed after each entry in `slots` [...]: [...] int64, 0 for the newest."""
        return (self.pushed - 1 - slots) % self.capacity

    def newest(self, count: int) -> Tensor:
        """Return the slots [n] int64, n <= count, of the last entries that this process pushed, oldest first."""

    def metrics(self) -> dict[str, float]:
        """Return metrics that only this kind of bank has, by name, and start counting anew."""

    def raise_recall(self) -> str | None:
        """Spend more time on each search or rebuild the index; as a last resort, search exactly from now on.

        Returns:
            What changed, as a sentence for the log; None: nothing, because a better index is already being built.
        """

    def layout(self) -> Layout:
        """Return which part of the bank this process stores."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the ring without copying it: embeddings [n, D], ids [n], pushed [].

        Index data that does not follow from the ring have names that start with "index."; banks of another kind or
        capacity ignore them.
        """

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the entries of a saved bank of any capacity: the newest that fit, in order, each in its own slot.

        Raises:
            ValueError: if `state` is not that of a bank, has another dimension, or entries that `push` would refuse.
        """

    def take_over(self, part: dict[str, Tensor], pushed: int) -> None:
        """Load this process's part of a bank of the same layout.

        Args:
            part: state of the part, as of a bank of its own.
            pushed: entries ever pushed into the whole bank.

        Raises:
            ValueError: as `load_state_dict`.
        """
