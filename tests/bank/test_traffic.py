"""What ranks send each other in a step, counted where it is sent, against the formulas of docs/scale.md."""

import pytest
import torch
import torch.distributed as dist
from pool import RankPool

from msf_faiss.bank import Bank, FlatBank, ReplicatedBank, ShardedBank, shard_capacity
from msf_faiss.distributed import ranks as distributed
from msf_faiss.distributed.ranks import Ranks

D, K, B, N = 32, 5, 24, 480  # dimensions, neighbours, rows of each rank, slots; N and B W are multiples of W


def counted_step(ranks: Ranks, placement: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that this rank received from others, by what they were for."""
    received: dict[str, int] = {}
    share = (ranks.size - 1) / ranks.size

    def counting(name: str, function: object, bytes_of: object) -> object:
        def call(out: torch.Tensor, given: torch.Tensor, *args: object, **kwargs: object) -> object:
            received[name] = received.get(name, 0) + bytes_of(out, given, *args)  # type: ignore[operator]
            return function(out, given, *args, **kwargs)  # type: ignore[operator]

        return call

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an exchange that nobody counts")

    with pytest.MonkeyPatch.context() as patch:
        gathered = counting("gather", distributed._all_gather, lambda out, given: round(out.numel() * share))
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
        bank: Bank
        if placement == "replicated":
            bank = ReplicatedBank(FlatBank(N, D, dtype), ranks)
        else:
            bank = ShardedBank(FlatBank(shard_capacity(N, ranks), D, dtype), N, ranks)
        embeddings = torch.nn.functional.normalize(torch.randn(B, D), dim=1)
        told = {}
        with ranks.known_row_counts([B] * ranks.size):
            for name, work in {
                "push": lambda: bank.push(embeddings, torch.arange(B)),
                "search": lambda: bank.search(embeddings, K),
                "mean": lambda: bank.mean_of(torch.zeros(B, K, dtype=torch.int64)),
                "ids": lambda: bank.ids(torch.zeros(B, K, dtype=torch.int64)),
            }.items():
                received.clear()
                work()
                told[name] = sum(received.values())
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_the_traffic_of_a_step_is_what_the_formulas_say(pool: RankPool, size: int, dtype: torch.dtype) -> None:
    s, others = dtype.itemsize, size - 1
    for told in pool.run(size, counted_step, "replicated", dtype):
        assert told == {"push": B * others * (D * s + 8), "search": 0, "mean": 0, "ids": 0}
    for told in pool.run(size, counted_step, "sharded", dtype):
        assert told == {
            "push": B * others // size * (D * s + 8),
            "search": B * others * D * s + B * others * K * 12,
            "mean": B * others * K * 8 + B * others * D * 4,
            "ids": B * others * K * 8 + B * others * K * 8,
        }
