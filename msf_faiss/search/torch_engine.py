"""Exact search by torch: a tiled matrix product, the maxima of groups of rows, and a closer look at the best groups.

Selecting among all rows costs more than the product itself; among the maxima of 16 rows it costs a sixteenth.

Shapes: B queries, C rows on a shortlist, G groups, T rows of a tile, n rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msf_faiss.search.exact import MARGIN, Proposal
from msf_faiss.search.faiss_setup import faiss

GROUP = 16  # rows: of 8, 16 and 32 the fastest
_FOLD = 8  # maxima of groups that share a maximum in turn
_CPU_PRODUCT = 1 << 20  # elements of a tile's product: it and the tile stay in the cache (4 times more: half as fast)
_CPU_TILE = 16_384  # rows at most, however few the queries
_GPU_PRODUCT = 1 << 24
_GPU_TILE = 1 << 20
_MAXIMA = 1 << 21  # elements among which the best are selected at a time: 8 MiB of float32
_CPU_GATHERED = 1 << 17  # elements of 16-bit rows gathered at a time
_GPU_GATHERED = 1 << 25

BFLOAT16_ROUNDING = 2.0**-8  # of a number that is rounded to bfloat16, relative to the result


class Shortlist(NamedTuple):
    """Rows that may be the most similar ones, and what is known of all others."""

    rows: Tensor  # [B, C] int64, none twice for one query: 16 of each group, best group first, then the others
    maxima: Tensor  # [B, G] of the product's dtype, each group's largest product
    bound: Tensor  # [B] of the product's dtype: no other row's product is above it; the least number if there is none


def shortlist(
    product: Callable[[int, int, Tensor], object],
    dtype: torch.dtype,
    ranges: Sequence[tuple[int, int]],
    count: int,
    queries: Tensor,
) -> Shortlist:
    """The rows of the `count` groups that hold the largest products, and those that are in no whole group.

    Args:
        product: writes the products of the rows [start, stop) and the queries into its third argument,
            [stop - start, B].
        dtype: of the products.
        ranges: [start, stop) each, disjoint.
        count: groups, at least 1. The best `count` rows are in as many groups at most.
        queries: [B, D].
    """
    batch, device = queries.shape[0], queries.device
    elements, most = (_GPU_PRODUCT, _GPU_TILE) if queries.is_cuda else (_CPU_PRODUCT, _CPU_TILE)
    longest = max(stop - start for start, stop in ranges)
    tile = min(_whole_groups(min(elements // batch, most)), _whole_groups(longest))
    block = max(tile, _whole_groups(_MAXIMA * GROUP // batch))
    # Made once: the system would clear its pages anew for every tile.
    scratch = torch.empty(tile, batch, dtype=dtype, device=device)
    maxima, starts, rest = [], [], []
    for start, stop in ranges:
        whole = stop - (stop - start) % GROUP
        rest.append(torch.arange(whole, stop, device=device))
        for first in range(start, whole, block):
            last = min(first + block, whole)
            every = torch.empty((last - first) // GROUP, batch, dtype=dtype, device=device)  # [G, B]
            for at in range(first, last, tile):
                size = min(tile, last - at)
                product(at, at + size, scratch[:size])
                place = slice((at - first) // GROUP, (at + size - first) // GROUP)
                torch.amax(scratch[:size].view(-1, GROUP, batch), dim=1, out=every[place])
            best, places = _largest(every, count + 1)
            maxima.append(best)
            starts.append(first + GROUP * places)
    others = torch.cat(rest).expand(batch, -1)  # [B, fewer than 16 a range]
    if not maxima:
        least = torch.full((batch, 1), _least(dtype), dtype=dtype, device=device)
        return Shortlist(others, least[:, :0], least[:, 0])
    best, places = torch.cat(maxima, dim=1).topk(min(count + 1, sum(part.shape[1] for part in maxima)), dim=1)
    groups = torch.cat(starts, dim=1).gather(1, places[:, :count])  # [B, count]
    members = groups.unsqueeze(2) + torch.arange(GROUP, device=device)  # [B, count, 16]
    bound = best[:, count] if best.shape[1] > count else torch.full_like(best[:, 0], _least(best.dtype))
    return Shortlist(torch.cat([members.flatten(1), others], dim=1), best[:, :count], bound)


def _largest(every: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The min(count, G) largest of each column of `every` [G, B]: values and rows, [B, *]."""
    groups, batch = every.shape
    even = groups - groups % _FOLD
    if even == 0:
        best, rows = every.T.topk(min(count, groups), dim=1)
        return best, rows
    # As with the rows themselves: the largest are among those that share their maximum with the largest maxima.
    folded = every[:even].view(-1, _FOLD, batch).amax(dim=1).T  # [B, G / 8]
    places = folded.topk(min(count, folded.shape[1]), dim=1).indices
    rows = (places.unsqueeze(2) * _FOLD + torch.arange(_FOLD, device=every.device)).flatten(1)
    rows = torch.cat([rows, torch.arange(even, groups, device=every.device).expand(batch, -1)], dim=1)
    best, order = every.T.gather(1, rows).topk(min(count, groups), dim=1)
    return best, rows.gather(1, order)


def compare(queries: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Similarities of each query and its own chosen rows: [B, C] float32.

    Args:
        queries: [B, D].
        rows: [n, D], of the same dtype.
        chosen: [B, C] int64.
    """
    similarities = torch.empty(chosen.shape, dtype=torch.float32, device=queries.device)
    if rows.dtype == torch.float32 and not rows.is_cuda:
        chosen = chosen.contiguous()
        pointers = (faiss.swig_ptr(each.numpy()) for each in (similarities, queries, rows, chosen))
        faiss.fvec_inner_products_by_idx(*pointers, queries.shape[1], *chosen.shape)
        return similarities
    gathered = _GPU_GATHERED if queries.is_cuda else _CPU_GATHERED
    step = max(1, gathered // max(1, chosen.shape[1] * queries.shape[1]))
    for start in range(0, queries.shape[0], step):
        part = slice(start, start + step)
        own = rows.index_select(0, chosen[part].flatten()).view(*chosen[part].shape, -1)  # [b, C, D]
        similarities[part] = torch.bmm(own.float(), queries[part].float().unsqueeze(2)).squeeze(2)
    return similarities


class TorchEngine:
    """A tiled matrix product over the ring in place; on CUDA without waiting for the device."""

    name = "torch"

    def error(self, dim: int) -> float:
        # As FAISS's: products are summed in float32. That the CPU rounds those of bfloat16 is part of the bound.
        return 4 * math.sqrt(dim) * 2.0**-24

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        product, dtype = products(queries, rows)
        groups = count + MARGIN if dtype == torch.bfloat16 else count  # rounding blurs which are the best
        found = shortlist(product, dtype, [(0, rows.shape[0])], groups, queries)
        similarities = compare(queries, rows, found.rows)  # [B, C]
        best, places = similarities.topk(count, dim=1)
        slots = found.rows.gather(1, places)
        bound = unrounded(found.bound)
        if count < found.rows.shape[1]:
            bound = bound.maximum(best[:, -1])
        return Proposal(slots, bound)


def products(queries: Tensor, rows: Tensor) -> tuple[Callable[[int, int, Tensor], object], torch.dtype]:
    """How `shortlist` multiplies some of `rows` [n, D] with `queries` [B, D], and the dtype of that.

    Both of one dtype: float32, float16 or bfloat16. Products are float32 but for bfloat16 on the CPU, where they are
    rounded.
    """
    if rows.dtype == torch.float32 or (rows.dtype == torch.bfloat16 and not rows.is_cuda):
        return lambda start, stop, out: torch.mm(rows[start:stop], queries.T, out=out), rows.dtype
    if rows.is_cuda:
        return (
            lambda start, stop, out: torch.mm(rows[start:stop], queries.T, out_dtype=torch.float32, out=out),
            torch.float32,
        )
    exact = queries.float().T  # a product of float16 is slow on a CPU
    return lambda start, stop, out: torch.mm(rows[start:stop].float(), exact, out=out), torch.float32


def unrounded(bound: Tensor) -> Tensor:
    """The largest that numbers of at most `bound` can have been before they were rounded to its dtype: float32."""
    if bound.dtype != torch.bfloat16:
        return bound
    bound = bound.float()
    return bound * torch.where(bound > 0, 1 + BFLOAT16_ROUNDING, 1 - BFLOAT16_ROUNDING)


def _whole_groups(rows: int) -> int:
    return max(GROUP, rows - rows % GROUP)


def _least(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
