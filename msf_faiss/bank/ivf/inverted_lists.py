"""Inverted lists that are updated in place: entries assigned to their nearest centroid, as 8-bit codes in FAISS.

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

_LARGEST_CODE = 127
_HEADROOM = 1.1  # range of the codes, relative to the largest component of the sample
_ASSIGNED = 4096  # rows compared with all centroids at a time: [4096, L] is the largest temporary tensor


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities: Mapping[str, bool] = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


class Probes(NamedTuple):
    """The lists whose centroids are nearest to each vector, nearest first."""

    similarities: Tensor  # [M, P] float32
    lists: Tensor  # [M, P] int64


class Centroids:
    """The centroids of the lists, unit vectors.

    They decide only which entries become candidates, never their order, so bfloat16 products are precise enough where
    the processor has them.

    Args:
        vectors: [L, D] float32 of unit norm; modified in place.
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors  # [L, D] float32
        self._compared = vectors.bfloat16() if _multiplies_bfloat16() else vectors  # [L, D]

    def __len__(self) -> int:
        return self.vectors.shape[0]

    def copy(self) -> Centroids:
        return Centroids(self.vectors.clone())

    def nearest(self, vectors: Tensor, count: int) -> Probes:
        """Return the `count` nearest lists of each of `vectors` [M, D]."""
        parts = [self._nearest(part, count) for part in torch.split(vectors, _ASSIGNED)]
        return parts[0] if len(parts) == 1 else Probes(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _nearest(self, vectors: Tensor, count: int) -> Probes:
        if self._compared.dtype == torch.float32:
            nearest = faiss.knn(vectors.float().numpy(), self.vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
            return Probes(*(torch.from_numpy(each) for each in nearest))
        products = vectors.bfloat16() @ self._compared.T  # [M, L]
        top = products.max(dim=1, keepdim=True) if count == 1 else products.topk(count, dim=1)
        return Probes(top.values.float(), top.indices)

    def follow(self, vectors: Tensor, lists: Tensor, rate: float) -> None:
        """Move the centroids of `lists` [M] towards the mean of their new `vectors` [M, D].

        Args:
            vectors: the new entries.
            lists: of these entries.
            rate: of the moving average, for each entry.
        """
        touched, place, counts = torch.unique(lists, return_inverse=True, return_counts=True)
        sums = torch.zeros(len(touched), vectors.shape[1]).index_add_(0, place, vectors.float())  # [T, D]
        kept = ((1 - rate) ** counts.float()).unsqueeze(1)
        moved = normalize(kept * self.vectors[touched] + (1 - kept) * sums / counts.unsqueeze(1), dim=1)
        self.vectors[touched] = moved
        if self._compared is not self.vectors:
            self._compared[touched] = moved.bfloat16()


def code_scale(sample: Tensor) -> float:
    """Return the factor by which the components of `sample` [M, D] fit into 8-bit codes."""
    return _LARGEST_CODE / max(_HEADROOM * float(sample.abs().max()), 1e-6)


class InvertedLists:
    """Codes of n entries, each in one list. Overwriting an entry moves it to its new list.

    The caller assigns entries to lists (see `Centroids`); FAISS stores and scans the codes.

    Args:
        centroids: may be shared, and modified outside.
        scale: of the codes.
    """

    def __init__(self, centroids: Centroids, scale: float) -> None:
        self.centroids, self._scale = centroids, scale
        dim = centroids.vectors.shape[1]
        self._quantizer = faiss.IndexFlatIP(dim)  # unused, but the index keeps a pointer to it
        kind, metric = faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        self._index: Any = faiss.IndexIVFScalarQuantizer(self._quantizer, dim, len(centroids), kind, metric, False)
        self._index.is_trained = True
        self._index.set_direct_map_type(faiss.DirectMap.Array)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def imbalance(self) -> float:
        """How many times as many entries a search reads as with lists of equal length; 1 is best."""
        return float(self._index.invlists.imbalance_factor())

    def write(self, place: int, vectors: Tensor, lists: Tensor) -> None:
        """Write `vectors` [M, D] into the places from `place` <= n on, and into `lists` [M]."""
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
        """Return approximate similarities [B, C] and places [B, C] of the best entries in the probed lists.

        Args:
            queries: [B, D].
            probes: of these queries.
            count: C; missing ones have place -1 and similarity -inf.
            ranges: disjoint ranges [start, stop) of the places to search.
        """
        selector = _selector(ranges, len(self))
        places = torch.empty(queries.shape[0], count, dtype=torch.int64)  # [B, C]
        similarities = torch.empty(queries.shape[0], count)  # [B, C]
        # FAISS encodes the queries too, and does not clamp them.
        scaled, lists, nearness = self._scaled(queries), probes.lists.contiguous(), probes.similarities.contiguous()
        self._index.search_preassigned_c(  # the Python one takes no selector
            queries.shape[0],
            faiss.swig_ptr(scaled.numpy()),
            count,
            faiss.swig_ptr(lists.numpy()),
            faiss.swig_ptr(nearness.numpy()),
            faiss.swig_ptr(similarities.numpy()),
            faiss.swig_ptr(places.numpy()),
            False,
            faiss.SearchParametersIVF(sel=selector, nprobe=lists.shape[1]),
        )
        return similarities.div_(self._scale**2).masked_fill_(places < 0, -torch.inf), places

    def order(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return the places of the entries in the order of the lists [n], and the list lengths [L], int32.

        Among equally similar codes a search returns the first ones, so the order is part of a bank's state.

        Args:
            first: lowest place to include.
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
        """Fill empty lists in the order that `order` returned.

        Args:
            places: see `order`.
            sizes: see `order`.
            entries: [n, D], by place.

        Raises:
            ValueError: if the arguments do not fit each other.
        """
        if sizes.shape != (len(self.centroids),) or int(sizes.sum()) != len(places):
            raise ValueError(
                f"{list(sizes.shape)} sizes and {len(places)} places do not fit {len(self.centroids)} lists"
            )
        ordered = places.sort().values
        whole = torch.equal(ordered, torch.arange(len(places), dtype=ordered.dtype))
        if len(places) and (ordered[0] < 0 or ordered[-1] >= len(entries) or not bool((ordered.diff() > 0).all())):
            raise ValueError("the places of the lists are not those of the entries")
        lists = torch.repeat_interleave(torch.arange(len(self.centroids)), sizes.long())  # [n]
        self._index.set_direct_map_type(faiss.DirectMap.NoMap)  # accepts entries in any order
        for start in range(0, len(places), _ASSIGNED):
            part = places[start : start + _ASSIGNED].long()
            self._append(entries[part], lists[start : start + _ASSIGNED], part)
        if whole:  # otherwise the lists are only read from now on
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
        return (vectors.float() * self._scale).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)  # [M, D]


def _selector(ranges: Sequence[tuple[int, int]], count: int) -> Any:
    """Return FAISS's selector of one or two ranges of places, or None if they are all of the `count` places."""
    if list(ranges) == [(0, count)]:
        return None
    selectors = [faiss.IDSelectorRange(start, stop) for start, stop in ranges]
    if len(selectors) == 1:
        return selectors[0]
    either = faiss.IDSelectorOr(*selectors)
    either.parts = selectors  # FAISS only points to them
    return either
