"""Inverted lists over a whole ring: one set, or one for each segment of the ring.

Shapes: N slots, M vectors, B queries, L lists, P probed lists, C candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from msf_faiss.bank.ivf.inverted_lists import Centroids, InvertedLists, Probes

_RATE = 0.05  # of the centroids' moving average, for each new entry of a list
_NEXT_QUERIES = 4096  # largest push whose vectors are expected to be the next queries


class SegmentedLists:
    """Inverted lists of the slots [0, `covered`) of a ring.

    The centroids follow the newest entries by a moving average, because the embeddings drift while the encoder trains.
    With one segment, entries stay in the list of their push, which in time may no longer be the nearest. With more,
    each segment keeps the centroids with which its entries were assigned: they freeze when the next segment starts.

    Args:
        entries: the ring, [N, D]; never written.
        centroids: of the first lists; modified in place.
        scale: of the codes.
        segment: slots of a segment; the last one may have fewer.
    """

    def __init__(self, entries: Tensor, centroids: Centroids, scale: float, segment: int) -> None:
        self._entries, self._scale, self._segment = entries, scale, segment
        self._centroids = centroids  # of the newest entries
        self._parts: list[InvertedLists] = []  # by segment
        self._leaving: InvertedLists | None = None  # entries of the newest segment that are not yet overwritten
        self._leaving_number = 0
        self._rolls = False  # whether a segment starts empty when new entries reach it
        self._pending: list[tuple[Tensor, Tensor]] = []  # slots and lists [M] that the centroids have yet to follow
        self._probed: tuple[int, int, Probes] | None = (
            None  # range of the newest slots, and the probes of their entries
        )

    @property
    def lists(self) -> int:
        """Lists of each segment."""
        return len(self._centroids)

    @property
    def covered(self) -> int:
        return (len(self._parts) - 1) * self._segment + len(self._parts[-1]) if self._parts else 0

    @property
    def imbalance(self) -> float:
        """Mean of `InvertedLists.imbalance` over all entries."""
        sizes = [len(part) for part in self._parts]
        weighted = sum(size * part.imbalance for size, part in zip(sizes, self._parts, strict=True) if size)
        return weighted / sum(sizes) if any(sizes) else 1.0

    def extend(self, stop: int) -> Tensor:
        """Cover the slots up to `stop`, with the present centroids.

        Returns:
            The lists of these entries, [M] int64.
        """
        lists = []
        while self.covered < stop:
            start = self.covered
            part_stop = min(stop, (start // self._segment + 1) * self._segment)
            vectors = self._entries[start:part_stop]
            lists.append(self._centroids.nearest(vectors, 1).lists[:, 0])
            self._put(start, vectors, lists[-1])
        return torch.cat(lists)

    def complete(self, head: int) -> None:
        """All filled slots are covered: from now on the centroids follow the entries.

        Args:
            head: slot of the next push.
        """
        self._rolls = self._entries.shape[0] > self._segment
        if self._rolls:
            self._centroids = self._centroids.copy()
            newest = (head - 1) % self._entries.shape[0] // self._segment
            self._parts[newest].centroids = self._centroids

    def replace(self, start: int, stop: int) -> None:
        """The slots [start, stop) have new entries; update those that are covered."""
        stop = min(stop, self.covered)
        while start < stop:
            part_stop = min(stop, (start // self._segment + 1) * self._segment)
            vectors = self._entries[start:part_stop]
            part = self._parts[start // self._segment]
            part.write(start % self._segment, vectors, part.centroids.nearest(vectors, 1).lists[:, 0])
            start = part_stop

    def write(self, start: int, stop: int, probes: int) -> None:
        """Cover the newest entries, in the slots [start, stop).

        Args:
            start: at most `covered`.
            stop: after the last.
            probes: lists that a query will probe. In MSF the newest entries are the next queries, so one comparison
                with the centroids serves both.
        """
        while start < stop:
            part_stop = min(stop, (start // self._segment + 1) * self._segment)
            if self._rolls and start % self._segment == 0:
                self._roll(start // self._segment)
            vectors = self._entries[start:part_stop]
            nearest = self._centroids.nearest(vectors, probes if len(vectors) <= _NEXT_QUERIES else 1)
            self._probed = (start, part_stop, nearest)
            lists = nearest.lists[:, 0].contiguous()
            self._pending.append((torch.arange(start, part_stop), lists))
            self._put(start, vectors, lists)
            start = part_stop

    def follow(self) -> None:
        """Move the centroids towards the entries written since the last call."""
        if self._pending:
            slots, lists = (torch.cat(each) for each in zip(*self._pending, strict=True))
            self._centroids.follow(self._entries[slots], lists, _RATE)
        self._pending, self._probed = [], None

    def search(
        self, queries: Tensor, probes: int, count: int, live: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Return approximate similarities [B, C] and slots [B, C] of candidates; missing ones are -inf, in any slot.

        Args:
            queries: [B, D].
            probes: lists to probe in each segment.
            count: candidates from each segment.
            live: disjoint ranges [start, stop) of the slots to search.
        """
        similarities, slots = [], []
        probed: dict[int, Probes] = {}  # segments may share centroids
        for start, part, ranges in self._searched(live):
            key = id(part.centroids)
            if key not in probed:
                probed[key] = self._probes(queries, part.centroids, probes)
            part_similarities, places = part.search(queries, probed[key], count, ranges)
            similarities.append(part_similarities)
            slots.append(places.clamp_(min=0) + start)
        return torch.cat(similarities, dim=1), torch.cat(slots, dim=1)

    def _searched(self, live: Sequence[tuple[int, int]]) -> Iterator[tuple[int, InvertedLists, list[tuple[int, int]]]]:
        """Yield the first slot, the lists and the live places of each segment that has any."""
        for number, part, first in self._current():
            start = number * self._segment
            last = min(self._segment, self._entries.shape[0] - start) if part is self._leaving else len(part)
            ranges = [(max(low - start, first), min(high - start, last)) for low, high in live]
            if ranges := [(low, high) for low, high in ranges if low < high]:
                yield start, part, ranges

    def _probes(self, queries: Tensor, centroids: Centroids, count: int) -> Probes:
        if self._probed is not None and centroids is self._centroids:
            start, stop, known = self._probed
            if known.lists.shape == (queries.shape[0], count) and torch.equal(queries, self._entries[start:stop]):
                return known
        return centroids.nearest(queries, count)

    def _put(self, start: int, vectors: Tensor, lists: Tensor) -> None:
        number, place = divmod(start, self._segment)
        if number == len(self._parts):
            self._parts.append(InvertedLists(self._centroids, self._scale))
        self._parts[number].write(place, vectors, lists)

    def _roll(self, number: int) -> None:
        """Start a segment with a copy of the centroids; those of the previous segment freeze."""
        self._centroids = self._centroids.copy()
        started = InvertedLists(self._centroids, self._scale)
        if number == len(self._parts):
            self._parts.append(started)
        else:
            self._leaving, self._leaving_number = self._parts[number], number
            self._parts[number] = started

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs besides the ring."""
        none = torch.empty(0, dtype=torch.int64)
        slots, lists = (torch.cat([none, *each]) for each in zip((none, none), *self._pending, strict=True))
        state = {
            "scale": torch.tensor(self._scale, dtype=torch.float64),
            "rolls": torch.tensor(self._rolls),
            "leaving": torch.tensor(self._leaving_number if self._leaving is not None else -1),
            "centroids": self._centroids.vectors,
            "pending_slots": slots,
            "pending_lists": lists,
        }
        for number, part, first in self._current():
            name = "leaving" if part is self._leaving else f"part{number}"
            places, sizes = part.order(first)
            own = part.centroids.vectors if part.centroids is not self._centroids else torch.empty(0)
            state |= {f"{name}.places": places, f"{name}.sizes": sizes, f"{name}.centroids": own}
        return state

    @classmethod
    def restore(cls, state: Mapping[str, Tensor], entries: Tensor, segment: int) -> SegmentedLists:
        """Return the lists that had this `state`, over the same ring.

        Raises:
            ValueError, KeyError: if the state is damaged.
        """
        segmented = cls(entries, Centroids(state["centroids"].clone()), float(state["scale"]), segment)
        segmented._rolls = bool(state["rolls"])
        if state["pending_slots"].numel():
            segmented._pending = [(state["pending_slots"], state["pending_lists"])]
        while (name := f"part{len(segmented._parts)}") + ".places" in state:
            segmented._parts.append(segmented._restore_part(state, name, len(segmented._parts)))
        if (number := int(state["leaving"])) >= 0:
            segmented._leaving, segmented._leaving_number = segmented._restore_part(state, "leaving", number), number
        return segmented

    def _restore_part(self, state: Mapping[str, Tensor], name: str, number: int) -> InvertedLists:
        own = state[f"{name}.centroids"]
        part = InvertedLists(Centroids(own.clone()) if own.numel() else self._centroids, self._scale)
        entries = self._entries[number * self._segment : (number + 1) * self._segment]
        part.restore(state[f"{name}.places"], state[f"{name}.sizes"], entries)
        return part

    def _current(self) -> Iterator[tuple[int, InvertedLists, int]]:
        """Yield the number and lists of each segment, and the first place that the ring has not overwritten."""
        for number, part in enumerate(self._parts):
            yield number, part, 0
        if self._leaving is not None:
            yield self._leaving_number, self._leaving, len(self._parts[self._leaving_number])
