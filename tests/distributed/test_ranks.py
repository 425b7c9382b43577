import time

import pytest
import torch
from pool import RankPool
from torch import nn

from msf_faiss.distributed.ranks import ALONE, Ranks, data_parallel, is_peer_lost, join_ranks, no_gradient_sync
from msf_faiss.errors import PeerError, UserError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]


def drawn(count: int, *shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return (100 * torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def move_rows(ranks: Ranks, counts: list[int]) -> None:
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 5)):
            everyone = [drawn(count, *shape, dtype=dtype, seed=rank) for rank, count in enumerate(counts)]
            mine = everyone[ranks.rank]
            for known in (counts, None):
                with ranks.known_row_counts(known):
                    found = ranks.gather_rows(mine)
                assert found.dtype == dtype
                assert torch.equal(found, torch.cat(everyone))
            # Row i goes to rank i modulo W.
            sent = [len(mine[target :: ranks.size]) for target in range(ranks.size)]
            ordered = torch.cat([mine[target :: ranks.size] for target in range(ranks.size)])
            parts = [rows[ranks.rank :: ranks.size] for rows in everyone]
            assert torch.equal(ranks.exchange_rows(ordered, sent, [len(part) for part in parts]), torch.cat(parts))
    total = sum(counts)
    for dtype in (torch.float32, torch.int64):
        everyone = [drawn(total, 4, dtype=dtype, seed=10 + rank) for rank in range(ranks.size)]
        start = sum(counts[: ranks.rank])
        found = ranks.scatter_sums(everyone[ranks.rank], counts)
        # float32 sums of at most four numbers below 100, in whatever order
        torch.testing.assert_close(
            found, torch.stack(everyone).sum(dim=0)[start : start + counts[ranks.rank]], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("counts", [[3, 3], [0, 4], [1, 0, 5], [0, 0, 0], [2, 3, 4, 1]], ids=str)
def test_rows_arrive_bit_for_bit_and_in_order(pool: RankPool, counts: list[int]) -> None:
    pool.run(len(counts), move_rows, counts)


def exchange_objects(ranks: Ranks) -> None:
    assert ranks.gather_objects({"rank": ranks.rank}) == [{"rank": rank} for rank in range(ranks.size)]
    assert ranks.broadcast_object(f"from {ranks.rank}") == "from 0"
    mine = torch.tensor([ranks.rank, 1.0])
    assert ranks.sum(mine).tolist() == [sum(range(ranks.size)), ranks.size]
    assert mine.tolist() == [ranks.rank, 1.0]
    assert ranks.on_main(lambda: ("made by", ranks.rank)) == ("made by", 0)
    side = ranks.side_channel()
    assert (side.rank, side.size) == (ranks.rank, ranks.size)
    assert side.gather_objects(ranks.rank) == list(range(ranks.size))
    assert ranks.counts(ranks.rank) == tuple(range(ranks.size))


@pytest.mark.parametrize("size", [2, 4])
def test_objects_are_gathered_and_broadcast(pool: RankPool, size: int) -> None:
    pool.run(size, exchange_objects)


def fail_on_one(ranks: Ranks, way: str, failing: int) -> str:
    def work() -> None:
        if ranks.rank == failing:
            raise UserError("the disk is full")

    try:
        if way == "on_main":
            ranks.on_main(work)
        else:
            with ranks.main_first():
                work()
    except PeerError as error:
        return f"peer: {error}"
    except UserError as error:
        return f"own: {error}"
    return "nothing"


@pytest.mark.parametrize(("way", "failing"), [("on_main", 0), ("main_first", 0), ("main_first", 2)])
def test_user_error_on_one_rank_raises_on_all(pool: RankPool, way: str, failing: int) -> None:
    outcomes = pool.run(3, fail_on_one, way, failing)
    assert outcomes.pop(failing) == "own: the disk is full"
    assert outcomes == ["peer: the disk is full"] * 2


def take_turns(ranks: Ranks, two_hosts: bool) -> tuple[float, float]:
    if two_hosts:
        ranks.local_rank, ranks.local_size = ranks.rank % 2, 2
    with ranks.main_first():
        began = time.monotonic()
        time.sleep(0.1)
        return began, time.monotonic()


def test_main_first_runs_one_rank_per_host_before_the_rest(pool: RankPool) -> None:
    times = pool.run(4, take_turns, False)
    assert all(began > times[0][1] for began, _ in times[1:])
    times = pool.run(4, take_turns, True)  # rank 2 is the first of the second host
    assert times[2][0] > times[0][1]
    assert min(times[1][0], times[3][0]) > times[2][1]


def train_briefly(ranks: Ranks, restart_at: int | None) -> list[torch.Tensor]:
    """Gradients of some steps, with a new wrapper before step `restart_at`, as in a resumed run."""
    torch.manual_seed(0)
    net = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(60, 60), nn.BatchNorm1d(60), nn.ReLU())])
    wrapped = data_parallel(net, ranks, torch.zeros(2, 60))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net[1].num_batches_tracked == 0
    found = []
    for step in range(4):
        if step == restart_at:
            wrapped = data_parallel(net, ranks, torch.zeros(2, 60))
        inputs = torch.randn(8, 60, generator=torch.Generator().manual_seed(100 * step + ranks.rank))
        wrapped(inputs).square().mean().backward()
        found += [parameter.grad.clone() for parameter in net.parameters()]
        net.zero_grad(set_to_none=True)
    return found


def test_gradients_do_not_depend_on_a_restart(pool: RankPool) -> None:
    """The order of three or more summands depends on where in a bucket a gradient lies."""
    whole = pool.run(4, train_briefly, None)
    for restart_at in (1, 2):
        again = pool.run(4, train_briefly, restart_at)
        for rank in range(4):
            assert all(torch.equal(*pair) for pair in zip(whole[0], whole[rank], strict=True))
            assert all(torch.equal(*pair) for pair in zip(whole[rank], again[rank], strict=True))


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_slices_cover_everything_evenly(count: int) -> None:
    for size in (1, 2, 3, 5):
        parts = [list(range(count))[Ranks(rank, size).slice_of(count)] for rank in range(size)]
        assert [place for part in parts for place in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_single_rank_needs_no_process_group() -> None:
    alone, rows = ALONE, torch.arange(3)
    with alone.main_first(), alone.known_row_counts([3]):
        assert alone.gather_rows(rows) is rows
        assert alone.scatter_sums(rows, [3]) is rows
        assert alone.side_channel() is alone
        assert alone.on_main(lambda: 5) == 5
        assert torch.equal(alone.sum(rows), rows)
    module = nn.Linear(2, 2)
    assert data_parallel(module, alone, torch.zeros(2, 2)) is module


def test_join_ranks_without_environment_is_a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is missing; start all ranks with torchrun"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "rank 1 of 2 cannot join the others: .*MASTER_ADDR"),
    ],
    ids=str,
)
def test_join_ranks_reports_incomplete_environment(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, str], complaint: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint), join_ranks("cpu"):
        pass


def test_is_peer_lost_ignores_other_errors() -> None:
    assert is_peer_lost(RuntimeError("[.../gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1"))
    assert not is_peer_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_peer_lost(KeyError("gloo"))


def gradient_of_two_parts(ranks: Ranks) -> list[float]:
    network = torch.nn.Linear(3, 1, bias=False)
    parallel = data_parallel(network, ranks, torch.zeros(2, 3))
    with no_gradient_sync(parallel):
        parallel(torch.full((2, 3), float(ranks.rank))).sum().backward()
        before_sync = network.weight.grad
    assert before_sync is None or not (before_sync - 2 * ranks.rank).any()
    parallel(torch.full((2, 3), 10.0)).sum().backward()
    assert network.weight.grad is not None
    return network.weight.grad.flatten().tolist()


def test_no_gradient_sync_defers_the_average(pool: RankPool) -> None:
    """Two rows of the rank's number, and two of 10: the mean over ranks 0 and 1 is 2 * 0.5 + 2 * 10."""
    assert pool.run(2, gradient_of_two_parts) == [[21.0] * 3] * 2
    assert gradient_of_two_parts(ALONE) == [20.0] * 3
