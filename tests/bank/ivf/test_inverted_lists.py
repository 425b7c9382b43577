"""Lists of 8-bit codes in FAISS, updated in place."""

import pytest
import torch
from clusters import DIM, Clusters
from torch import Tensor

from msf_faiss.bank.ivf.inverted_lists import Centroids, InvertedLists, code_scale


def assign(centroids: Centroids, vectors: Tensor) -> Tensor:
    return centroids.nearest(vectors, 1).lists[:, 0].contiguous()


@pytest.mark.parametrize("ranges", [[(100, 400)], [(0, 37), (390, 400)], [(5, 6)]], ids=str)
def test_search_within_ranges_equals_masked_search(ranges: list[tuple[int, int]]) -> None:
    source = Clusters()
    vectors, centroids = source.draw(400), Centroids(source.draw(8).contiguous())
    lists = InvertedLists(centroids, code_scale(vectors))
    lists.write(0, vectors, assign(centroids, vectors))
    queries = source.draw(50)
    probes = centroids.nearest(queries, 8)
    everything, places = lists.search(queries, probes, 400, [(0, 400)])
    selected, found = lists.search(queries, probes, 20, ranges)
    allowed = torch.zeros(400, dtype=torch.bool)
    for start, stop in ranges:
        allowed[start:stop] = True
    best, order = everything.masked_fill(~allowed[places], -torch.inf).topk(20, dim=1)
    there = ~best.isneginf()
    assert torch.equal(selected[there], best[there])
    assert torch.equal(found[there], places.gather(1, order)[there])
    assert (found[~there] == -1).all()


def test_overwritten_entries_decode_to_new_vectors() -> None:
    source = Clusters()
    centroids = Centroids(source.draw(8).contiguous())
    ring = source.draw(300)
    scale = code_scale(ring)
    lists = InvertedLists(centroids, scale)
    lists.write(0, ring, assign(centroids, ring))
    for start in (0, 100, 250, 30, 250):
        vectors = source.draw(50)
        ring[start : start + 50] = vectors
        lists.write(start, vectors, assign(centroids, vectors))
    assert len(lists) == 300
    # All lists are probed, so each entry finds its own code; half a step of 1/127 in each of 32 components.
    similarities, places = lists.search(ring, centroids.nearest(ring, 8), 1, [(0, 300)])
    assert (places[:, 0] == torch.arange(300)).float().mean() > 0.99
    torch.testing.assert_close(similarities[:, 0], torch.ones(300), rtol=0, atol=0.5 / scale * DIM**0.5)
