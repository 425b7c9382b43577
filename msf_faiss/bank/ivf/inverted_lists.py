"""Inverted lists that follow a ring: entries divided by the nearest of many centroids, as 8-bit codes in FAISS.

Shapes: N slots, n entries, M vectors, B queries, L lists, P probed lists, C candidates, D dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from msf_faiss.search.faiss_setup import faiss

_LARGEST = 127  # of a code
_HEADROOM = 1.1  # codes reach beyond the largest component that was seen
_ASSIGNED = 4096  # rows that are compared with all centroids at a time: [4096, L] is the largest thing held


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities: Mapping[str, bool] = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


class Probes(NamedTuple):
    """The lists whose centroids are nearest to some vectors, nearest first."""

    similarities: Tensor  # [M, P] float32
    lists: Tensor  # [M, P] int64


class Centroids:
    """Where the lists are: unit vectors, and what finds the nearest.

    Which list an entry is in decides only whether it is found, never how it compares: where the processor multiplies
    bfloat16, that is precise enough.

    Args:
        vectors: [L, D] float32 of unit norm; kept, and moved in place.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors  # [L, D] float32
        self._compared = vectors.bfloat16() if _multiplies_bfloat16() else vectors  # [L, D]

    def __len__(self) -> int:
        return self.vectors.shape[0]

    def copy(self) -> Centroids:
        return Centroids(self.vectors.clone())

    def nearest(self, vectors: Tensor, count: int) -> Probes:
        """The `count` nearest lists of each of `vectors` [M, D]."""
        found = [self._nearest(part, count) for part in torch.split(vectors, _ASSIGNED)]
        return found[0] if len(found) == 1 else Probes(*(torch.cat(each) for each in zip(*found, strict=True)))

    def _nearest(self, vectors: Tensor, count: int) -> Probes:
        if self._compared.dtype == torch.float32:
            found = faiss.knn(vectors.float().numpy(), self.vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
            similarities, lists = (torch.from_numpy(each) for each in found)
            return Probes(similarities, lists.clamp_(min=0))  # a vector that is not a number is nearest to none
        products = vectors.bfloat16() @ self._compared.T  # [M, L]
        top = products.max(dim=1, keepdim=True) if count == 1 else products.topk(count, dim=1)
        return Probes(top.values.float(), top.indices)

    def follow(self, vectors: Tensor, lists: Tensor, rate: float) -> None:
        """Move the centroids of `lists` [M] towards the mean of their new `vectors` [M, D].

        Args:
            vectors: the new entries.
            lists: each one's list.
            rate: of a moving average, for each entry.
        """
        touched, place, counts = torch.unique(lists, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(touched), vectors.shape[1]).index_add_(0, place, vectors.float())  # [T, D]
        kept = ((1 - rate) ** counts.float()).unsqueeze(1)
        moved = normalize(kept * self.vectors[touched] + (1 - kept) * sums / counts.unsqueeze(1), dim=1)
        self.vectors[touched] = moved
        if self._compared is not self.vectors:
            self._compared[touched] = moved.bfloat16()


def code_scale(sample: Tensor) -> float:
    """What the components of entries are multiplied by, so that those of `sample` [M, D] fit into a code."""
    return _LARGEST / max(_HEADROOM * float(sample.abs().max()), 1e-6)


class InvertedLists:
    """Codes of the first n of a number of slots, divided among lists. An entry that is replaced changes its list.

    FAISS would compare new entries with the centroids in its own index of them; they are compared here instead (see
    `Centroids`), and FAISS keeps nothing but codes.

    Args:
        centroids: shared with whoever moves them.
        scale: of the codes.
    """

    def __init__(self, centroids: Centroids, scale: float) -> None:
        self.centroids, self._scale = centroids, scale
        dim = centroids.vectors.shape[1]
        self._quantizer = faiss.IndexFlatIP(dim)  # stays empty, but must live as long as the index
        kind, metric = faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        self._index: Any = faiss.IndexIVFScalarQuantizer(self._quantizer, dim, len(centroids), kind, metric, False)
        self._index.is_trained = True
        self._index.set_direct_map_type(faiss.DirectMap.Array)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def imbalance(self) -> float:
        """1 where all lists have equally many entries; a search reads so many times as much as it would then."""
        return float(self._index.invlists.imbalance_factor())

    def write(self, place: int, vectors: Tensor, lists: Tensor) -> None:
        """Put `vectors` [M, D] into the places from `place` <= n on, and each into its one of `lists` [M]."""
        replaced = min(max(len(self) - place, 0), vectors.shape[0])
        if replaced:
            places = np.arange(place, place + replaced)
            codes = (self._scaled(vectors[:replaced]) + 128).to(torch.uint8).numpy()  # as FAISS stores signed codes
            self._index.direct_map.update_codes(
                self._index.invlists,
                replaced,
                faiss.swig_ptr(places),
                faiss.swig_ptr(lists[:replaced].numpy()),
                faiss.swig_ptr(codes),
            )
        if replaced < vectors.shape[0]:
            self._append(vectors[replaced:], lists[replaced:])

    def search(
        self, queries: Tensor, probes: Probes, count: int, ranges: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Approximate similarities [B, C] and places [B, C] of the best entries in the probed lists.

        Args:
            queries: [B, D].
            probes: of these queries.
            count: C; where fewer are found the place is -1 and the similarity -inf.
            ranges: places [start, stop) that may be found; disjoint.
        """
        selector = _selector(ranges, len(self))
        found = torch.empty(queries.shape[0], count, dtype=torch.int64)  # [B, C]
        similarities = torch.empty(queries.shape[0], count)  # [B, C]
        # FAISS makes codes of queries too, without looking whether they fit.
        scaled, lists, nearness = self._scaled(queries), probes.lists.contiguous(), probes.similarities.contiguous()
        self._index.search_preassigned_c(  # the Python one takes no selector
            queries.shape[0],
            faiss.swig_ptr(scaled.numpy()),
            count,
            faiss.swig_ptr(lists.numpy()),
            faiss.swig_ptr(nearness.numpy()),
            faiss.swig_ptr(similarities.numpy()),
            faiss.swig_ptr(found.numpy()),
            False,
            faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1]),
        )
        return similarities.div_(self._scale**2).masked_fill_(found < 0, -torch.inf), found

    def order(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Places of the entries, list by list as they lie there, [n] int32; and each list's number of them, [L] int32.

        Of equally similar codes a search finds those that lie first, so their order belongs to a bank's state.

        Args:
            first: places before it are left out.
        """
        lists = self._index.invlists
        parts = []
        for number in range(len(self.centroids)):
            size = lists.list_size(number)
            places = faiss.rev_swig_ptr(lists.get_ids(number), size) if size else np.empty(0, np.int64)
            parts.append(places[places >= first].astype(np.int32))
        sizes = np.array([len(part) for part in parts], np.int32)
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(sizes)

    def restore(self, places: Tensor, sizes: Tensor, entries: Tensor) -> None:
        """Lay out empty lists as `order` found them.

        Args:
            places: see `order`.
            sizes: see `order`.
            entries: [n, D], by place.

        Raises:
            ValueError: if they do not fit.
        """
        if sizes.shape != (len(self.centroids),) or int(sizes.sum()) != len(places):
            raise ValueError(f"{len(self.centroids)} lists do not hold {list(sizes.shape)} sizes, {len(places)} places")
        ordered = places.sort().values
        whole = torch.equal(ordered, torch.arange(len(places), dtype=ordered.dtype))
        if len(places) and (ordered[0] < 0 or ordered[-1] >= len(entries) or not bool((ordered.diff() > 0).all())):
            raise ValueError("the places of the lists are not those of the entries")
        lists = torch.repeat_interleave(torch.arange(len(self.centroids)), sizes.long())  # [n]
        self._index.set_direct_map_type(faiss.DirectMap.NoMap)  # which entries may be added to in any order
        for start in range(0, len(places), _ASSIGNED):
            part = places[start : start + _ASSIGNED].long()
            self._append(entries[part], lists[start : start + _ASSIGNED], part)
        if whole:  # lists that lost entries are only read from now on
            self._index.set_direct_map_type(faiss.DirectMap.Array)

    def _append(self, vectors: Tensor, lists: Tensor, places: Tensor | None = None) -> None:
        codes = self._scaled(vectors).numpy()
        self._index.add_core(
            len(codes),
            faiss.swig_ptr(codes),
            None if places is None else faiss.swig_ptr(places.numpy()),
            faiss.swig_ptr(lists.contiguous().numpy()),
        )

    def _scaled(self, vectors: Tensor) -> Tensor:
        return (vectors.float() * self._scale).round_().clamp_(-_LARGEST, _LARGEST).nan_to_num_()  # [M, D]


def _selector(ranges: Sequence[tuple[int, int]], count: int) -> Any:
    """FAISS's selector of one or two ranges of places; None if they are all of the `count` places."""
    if list(ranges) == [(0, count)]:
        return None
    selectors = [faiss.IDSelectorRange(start, stop) for start, stop in ranges]
    if len(selectors) == 1:
        return selectors[0]
    either = faiss.IDSelectorOr(*selectors)
    either.parts = selectors  # FAISS only points to them
    return either
