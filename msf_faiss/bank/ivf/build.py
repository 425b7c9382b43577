"""Builds inverted lists in small portions, so that no training step waits for it.

Shapes: N slots, L lists, M rows, Q sampled queries, T neighbours recorded for each, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.bank.ivf.inverted_lists import Centroids, code_scale
from msf_faiss.bank.ivf.segments import SegmentedLists

_PASSES = 6  # of k-means over the sample
_PER_LIST = 32  # sampled entries per list
_CHUNK = 4096  # rows read at a time
_NEIGHBORS = 10


class IvfBuild:
    """Spherical k-means on a sample of the ring, then lists of all entries, in any number of portions.

    The ring may change in between. The result depends on the entries and the portions, not on time.

    Args:
        entries: the ring, [N, D]; never written.
        filled: number of filled slots, at least `lists`.
        lists: L.
        segment: slots of a segment.
    """

    def __init__(self, entries: Tensor, filled: int, lists: int, segment: int) -> None:
        self._entries, self._segment = entries, segment
        self._sampled_of, self._sampled = filled, min(filled, _PER_LIST * lists)
        self._pass, self._done = 0, 0
        first = self._rows(torch.arange(lists) * self._sampled // lists)  # [L, D]
        self._centroids = Centroids(first)
        self._sums, self._counts = torch.zeros_like(first), torch.zeros(lists)
        self.lists: SegmentedLists | None = None  # after k-means

    def advance(self, rows: int, filled: int, newest: Tensor) -> bool:
        """Compare about `rows` more rows with all centroids.

        Args:
            rows: at least 1.
            filled: number of filled slots.
            newest: slots [Q] of the newest entries, which serve as sampled queries.

        Returns:
            Whether `lists` covers all filled slots.
        """
        while rows > 0 and self.lists is None:
            portion = min(rows, _CHUNK, self._sampled - self._done)
            self._train(portion)
            rows -= portion
            if self._pass == _PASSES:
                self._begin(newest)
        if self.lists is None:
            return False
        while rows > 0 and (covered := self.lists.covered) < filled:
            portion = min(rows, _CHUNK, filled - covered)
            self._cover(self.lists, covered + portion)
            rows -= portion
        return self.lists.covered == filled

    def replace(self, start: int, stop: int) -> None:
        """The slots [start, stop) have new entries."""
        if self.lists is not None:
            self.lists.replace(start, stop)

    def enough_probes(self, recall: float) -> int:
        """Return the least number of probed lists that contain `recall` of the true neighbours of the sampled queries.

        The list of each true neighbour was recorded when its slot was covered.
        """
        nearest = self._centroids.nearest(self._queries, len(self._centroids)).lists  # [Q, L]
        places = torch.empty_like(nearest)
        places.scatter_(1, nearest, torch.arange(nearest.shape[1]).expand_as(nearest).contiguous())
        # A query's nearest entry is its own, which every search returns.
        nearby = self._near_lists[:, 1:]  # [Q, T - 1]
        needed = places.gather(1, nearby.clamp(min=0))[nearby >= 0].sort().values
        if len(needed) == 0:
            return 1
        return int(needed[min(int(recall * len(needed)), len(needed) - 1)]) + 1

    def _rows(self, numbers: Tensor) -> Tensor:
        """Return rows `numbers` [M] of the sample, which is spread evenly over the slots: [M, D] float32."""
        return self._entries[numbers * self._sampled_of // self._sampled].float()

    def _train(self, rows: int) -> None:
        vectors = self._rows(torch.arange(self._done, self._done + rows))
        lists = self._centroids.nearest(vectors, 1).lists[:, 0]
        self._sums.index_add_(0, lists, vectors)
        self._counts.index_add_(0, lists, torch.ones(rows))
        self._done += rows
        if self._done < self._sampled:
            return
        moved = normalize(self._sums, dim=1)
        empty = self._counts == 0
        if count := int(empty.sum()):
            spread = (torch.arange(count) * self._sampled // count + self._pass) % self._sampled
            moved[empty] = self._rows(spread)
        self._centroids = Centroids(moved)
        self._sums.zero_()
        self._counts.zero_()
        self._pass, self._done = self._pass + 1, 0

    def _begin(self, newest: Tensor) -> None:
        scale = code_scale(self._rows(torch.arange(min(self._sampled, _CHUNK))))
        self.lists = SegmentedLists(self._entries, self._centroids, scale, self._segment)
        self._queries = self._entries[newest].float()  # [Q, D]
        self._near = torch.full((len(newest), _NEIGHBORS + 1), -torch.inf)  # [Q, T] similarities, best first
        self._near_lists = torch.full(self._near.shape, -1)  # [Q, T]

    def _cover(self, lists: SegmentedLists, stop: int) -> None:
        start = lists.covered
        assigned = lists.extend(stop).expand(len(self._queries), -1)  # [Q, M]
        similarities = self._queries @ self._entries[start:stop].float().T  # [Q, M]
        every = torch.cat([self._near, similarities], dim=1)
        self._near, places = every.topk(self._near.shape[1], dim=1)
        self._near_lists = torch.cat([self._near_lists, assigned], dim=1).gather(1, places)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs besides the ring."""
        state = {
            "progress": torch.tensor([self._sampled_of, self._pass, self._done]),
            "centroids": self._centroids.vectors.clone(),  # `lists` shares them, and safetensors refuses shared memory
            "sums": self._sums,
            "counts": self._counts,
        }
        if self.lists is not None:
            state |= {"queries": self._queries, "noted": self._near, "noted_lists": self._near_lists}
            state |= {f"made.{name}": value for name, value in self.lists.state().items()}
        return state

    @classmethod
    def restore(cls, state: Mapping[str, Tensor], entries: Tensor, segment: int) -> IvfBuild:
        """Return the build that had this `state`, over the same ring.

        Raises:
            ValueError, KeyError: if the state is damaged.
        """
        sampled_of, passes, done = state["progress"].tolist()
        build = cls(entries, sampled_of, len(state["centroids"]), segment)
        build._pass, build._done = passes, done
        build._centroids = Centroids(state["centroids"].clone())
        build._sums, build._counts = state["sums"].clone(), state["counts"].clone()
        if "noted" in state:
            build._queries, build._near, build._near_lists = state["queries"], state["noted"], state["noted_lists"]
            made = {name.removeprefix("made."): value for name, value in state.items() if name.startswith("made.")}
            build.lists = SegmentedLists.restore(made, entries, segment)
        return build
