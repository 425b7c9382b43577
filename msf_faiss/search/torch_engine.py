"""Exact search with torch: a tiled matrix product, the maxima of groups of rows, and exact products in the best groups.

Selecting among all rows costs more than the product itself; among the maxima of 16 rows it costs a sixteenth.

Shapes: B queries, C rows on a shortlist, G groups, T rows of a tile, n rows, D dimensions.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msf_faiss.search.exact import MARGIN, Engine, Proposal
from msf_faiss.search.faiss_setup import faiss

GROUP = 16  # rows; the fastest of 8, 16 and 32
_FOLD = 8  # maxima of groups that share a maximum in turn
_CPU_PRODUCT = 1 << 20  # elements of a tile's product: it and the tile stay in the cache (4 times more: half as fast)
_CPU_TILE = 16_384  # rows at most, however few queries
_GPU_PRODUCT = 1 << 24
_GPU_TILE = 1 << 20
_MAXIMA = 1 << 21  # maxima selected from at a time: 8 MiB of float32
_CPU_GATHERED = 1 << 17  # elements of 16-bit rows gathered at a time
_GPU_GATHERED = 1 << 25

_BFLOAT16_ROUNDING = 2.0**-8  # error of rounding to bfloat16, relative to the result


class _Shortlist(NamedTuple):
    """Rows that may be the most similar ones, and a bound on the products of all others."""

    rows: Tensor  # [B, C] int64, distinct for a query: those of each group, best group first, then those in no group
    maxima: Tensor  # [B, G] of the product's dtype, largest product in each group
    bound: Tensor  # [B] of the product's dtype, largest product of another row; the least number if there is none


def shortlist(
    product: Callable[[int, int, Tensor], object],
    dtype: torch.dtype,
    ranges: Sequence[tuple[int, int]],
    count: int,
    queries: Tensor,
    *,
    group: int = GROUP,
) -> _Shortlist:
    """List the rows of the `count` groups with the largest products, and the rows that are in no whole group.

    The best `count` rows are in at most as many groups.

    Args:
        product: writes the products of the rows [start, stop) and the queries into its third argument,
            [stop - start, B].
        dtype: of the products.
        ranges: disjoint ranges [start, stop) of rows.
        count: number of groups, at least 1.
        queries: [B, D].
        group: rows in a group.
    """
    batch, device = queries.shape[0], queries.device
    elements, most = (_GPU_PRODUCT, _GPU_TILE) if queries.is_cuda else (_CPU_PRODUCT, _CPU_TILE)
    longest = max(stop - start for start, stop in ranges)
    tile = min(_round_down(min(elements // batch, most), group), _round_down(longest, group))
    block = max(tile, _round_down(_MAXIMA * group // batch, group))
    # Allocated once: the system would clear the pages for every tile.
    scratch = torch.empty(tile, batch, dtype=dtype, device=device)
    maxima, starts, rest = [], [], []
    for start, stop in ranges:
        whole = stop - (stop - start) % group
        rest.append(torch.arange(whole, stop, device=device))
        for first in range(start, whole, block):
            last = min(first + block, whole)
            every = torch.empty((last - first) // group, batch, dtype=dtype, device=device)  # [G, B]
            for at in range(first, last, tile):
                size = min(tile, last - at)
                product(at, at + size, scratch[:size])
                place = slice((at - first) // group, (at + size - first) // group)
                torch.amax(scratch[:size].view(-1, group, batch), dim=1, out=every[place])
            best, places = _largest(every, count + 1)
            maxima.append(best)
            starts.append(first + group * places)
    others = torch.cat(rest).expand(batch, -1)  # [B, less than a group per range]
    if not maxima:
        least = torch.full((batch, 1), _least(dtype), dtype=dtype, device=device)
        return _Shortlist(others, least[:, :0], least[:, 0])
    best, places = torch.cat(maxima, dim=1).topk(min(count + 1, sum(part.shape[1] for part in maxima)), dim=1)
    groups = torch.cat(starts, dim=1).gather(1, places[:, :count])  # [B, count]
    members = groups.unsqueeze(2) + torch.arange(group, device=device)  # [B, count, group]
    bound = best[:, count] if best.shape[1] > count else torch.full_like(best[:, 0], _least(best.dtype))
    return _Shortlist(torch.cat([members.flatten(1), others], dim=1), best[:, :count], bound)


def _largest(every: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the min(count, G) largest of each column of `every` [G, B]: values and rows, [B, *]."""
    groups, batch = every.shape
    even = groups - groups % _FOLD
    if even == 0:
        best, rows = every.T.topk(min(count, groups), dim=1)
        return best, rows
    # As with the rows: the largest are in the groups with the largest maxima.
    folded = every[:even].view(-1, _FOLD, batch).amax(dim=1).T  # [B, G / 8]
    places = folded.topk(min(count, folded.shape[1]), dim=1).indices
    rows = (places.unsqueeze(2) * _FOLD + torch.arange(_FOLD, device=every.device)).flatten(1)
    rows = torch.cat([rows, torch.arange(even, groups, device=every.device).expand(batch, -1)], dim=1)
    best, order = every.T.gather(1, rows).topk(min(count, groups), dim=1)
    return best, rows.gather(1, order)


def compare(queries: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the similarities of each query and its own chosen rows: [B, C] float32.

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


class TorchEngine(Engine):
    """A tiled matrix product over the ring in place; on CUDA it does not synchronize with the host."""

    name = "torch"

    def propose(self, queries: Tensor, rows: Tensor, count: int) -> Proposal:
        product, dtype = products(queries, rows)
        groups = count + MARGIN if dtype == torch.bfloat16 else count  # rounding changes which are the best
        listed = shortlist(product, dtype, [(0, rows.shape[0])], groups, queries)
        similarities = compare(queries, rows, listed.rows)  # [B, C]
        best, places = similarities.topk(count, dim=1)
        slots = listed.rows.gather(1, places)
        bound = unrounded(listed.bound)  # the CPU rounds products of bfloat16
        if count < listed.rows.shape[1]:
            bound = bound.maximum(best[:, -1])
        return Proposal(slots, bound)


def products(queries: Tensor, rows: Tensor) -> tuple[Callable[[int, int, Tensor], object], torch.dtype]:
    """Return the function with which `shortlist` multiplies `rows` [n, D] and `queries` [B, D], and its dtype.

    Both have the same dtype: float32, float16 or bfloat16. Products are float32, but rounded to bfloat16 for bfloat16
    on the CPU.
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
    """Return the greatest value, in float32, of a number before it was rounded to at most `bound` in its dtype."""
    if bound.dtype != torch.bfloat16:
        return bound
    bound = bound.float()
    return bound * torch.where(bound > 0, 1 + _BFLOAT16_ROUNDING, 1 - _BFLOAT16_ROUNDING)


def _round_down(rows: int, group: int) -> int:
    """Return the rows in whole groups, of at least one group."""
    return max(group, rows - rows % group)


def _least(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min
