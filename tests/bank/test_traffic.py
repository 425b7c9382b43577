"""The bytes that ranks receive from each other in a step, against the formulas of docs/scale.md."""

import pytest
import torch
import torch.distributed as dist
from pool import RankPool

from msf_faiss.bank import Bank, FlatBank, RingSpec
from msf_faiss.bank.parallel import ReplicatedBank, ShardedBank
from msf_faiss.distributed import ranks as distributed
from msf_faiss.distributed.ranks import Ranks

D, K, B, N = 32, 5, 24, 480  # dimensions, neighbours, rows of each rank, slots; N and B W are multiples of W


def counted_step(ranks: Ranks, placement: str, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that this rank received from others, by operation."""
    received: dict[str, int] = {}
    ratio = (ranks.size - 1) / ranks.size

    def counting(name: str, function: object, bytes_of: object) -> object:
        def call(out: torch.Tensor, given: torch.Tensor, *args: object, **kwargs: object) -> object:
            received[name] = received.get(name, 0) + bytes_of(out, given, *args)  # type: ignore[operator]
            return function(out, given, *args, **kwargs)  # type: ignore[operator]

        return call

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an exchange that is not counted")

    with pytest.MonkeyPatch.context() as patch:
        gathered = counting("gather", distributed._all_gather, lambda out, given: round(out.numel() * ratio))
        reduced = counting(
            "reduce", distributed._reduce_scatter, lambda out, given: out.numel() * out.itemsize * (ranks.size - 1)
        )
        exchanged = counting(
            "exchange",
            dist.all_to_all_single,
            lambda out, given, came, sent: out.shape[1] * (sum(came) - came[ranks.rank]),
        )
        patch.setattr(distributed, "_all_gather", gathered)
        patch.setattr(distributed, "_reduce_scatter", reduced)
        patch.setattr(dist, "all_to_all_single", exchanged)
        for name in ("all_reduce", "broadcast", "all_gather_object", "broadcast_object_list", "all_gather"):
            patch.setattr(dist, name, refuse)
        spec = RingSpec(N, D, dtype)
        bank: Bank
        if placement == "replicated":
            bank = ReplicatedBank(FlatBank(spec), ranks)
        else:
            bank = ShardedBank(FlatBank, spec, ranks)
        embeddings = torch.nn.functional.normalize(torch.randn(B, D), dim=1)
        traffic = {}
        with ranks.known_row_counts([B] * ranks.size):
            for name, work in {
                "push": lambda: bank.push(embeddings, torch.arange(B)),
                "search": lambda: bank.search(embeddings, K),
                "mean": lambda: bank.mean_of(torch.zeros(B, K, dtype=torch.int64)),
                "ids": lambda: bank.ids(torch.zeros(B, K, dtype=torch.int64)),
            }.items():
                received.clear()
                work()
                traffic[name] = sum(received.values())
    return traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_traffic_of_a_step_matches_formulas(pool: RankPool, size: int, dtype: torch.dtype) -> None:
    s, others = dtype.itemsize, size - 1
    for traffic in pool.run(size, counted_step, "replicated", dtype):
        assert traffic == {"push": B * others * (D * s + 8), "search": 0, "mean": 0, "ids": 0}
    for traffic in pool.run(size, counted_step, "sharded", dtype):
        assert traffic == {
            "push": B * others // size * (D * s + 8),
            "search": B * others * D * s + B * others * K * 12,
            "mean": B * others * K * 8 + B * others * D * 4,
            "ids": B * others * K * 8 + B * others * K * 8,
        }
