"""Rescoring of candidates."""

import torch

from msf_faiss.search.canonical import rescore


def test_rescored_bits_do_not_depend_on_batch_or_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    base, queries = (
        torch.nn.functional.normalize(torch.randn(rows, 512, generator=generator), dim=1) for rows in (300, 64)
    )
    every = torch.arange(300).expand(64, -1)
    whole = rescore(queries, base, every, every, 10)
    for row in (0, 31, 63):
        query, best = queries[row : row + 1], whole.slots[row : row + 1]
        for candidates in (every[:1], best.flip(1)):
            alone = rescore(query, base, candidates, candidates, 10)
            assert torch.equal(alone.slots[0], whole.slots[row])
            assert torch.equal(alone.similarities[0], whole.similarities[row])
