"""The ranks of a run: processes that train together, and the collectives that they use.

The only module that imports torch.distributed. Shapes: W ranks, b rows of this rank, B rows of all ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msf_faiss.errors import PeerError, UserError

# Long, because others wait while rank 0 unpacks a data set. Dead peers are noticed at once, hangs by the watchdog.
_TIMEOUT = datetime.timedelta(hours=6)

# torch 2.14 renamed these and deprecates the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_DDP: Any = nn.parallel.DistributedDataParallel
_SYNC_BUFFERS = next(
    name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(_DDP).parameters
)

_START_RANKS = (
    "start all ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each"
)

T = TypeVar("T")


class Ranks:
    """This process and the others that train with it. All ranks must call each method, in the same order.

    Args:
        rank: number of this process, 0..size - 1.
        size: number of ranks.
        local_rank: number of this process on its host.
        local_size: ranks on this host.
        group: torch's process group of all ranks; None: the default group.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        local_size: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._group = group
        self._counts: tuple[int, ...] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files for all."""
        return self.rank == 0

    def slice_of(self, count: int) -> slice:
        """This rank's slice of `count` items. The slices cover all items; their lengths differ by at most one."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def gather_objects(self, value: T) -> list[T]:
        """The `value` of every rank, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """The `value` of rank 0."""
        if self.size == 1:
            return value
        holder: list[Any] = [value]
        dist.broadcast_object_list(holder, group_src=0, group=self._group)
        return holder[0]  # type: ignore[no-any-return]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; return its result on all ranks.

        Raises:
            UserError: on rank 0, if `work` raised it; on the others it is a `PeerError`.
        """
        outcome: T | UserError | None = None
        if self.is_main:
            try:
                outcome = work()
            except UserError as error:
                self.broadcast_object(error)
                raise
        outcome = self.broadcast_object(outcome)
        if isinstance(outcome, UserError):
            raise PeerError(str(outcome)) from outcome
        return outcome  # type: ignore[return-value]

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; return this rank's result once all ranks have succeeded.

        Raises:
            UserError: if `work` raised it here; a `PeerError` if it did so on another rank only.
        """
        error: UserError | None = None
        try:
            result = work()
        except UserError as raised:
            error = raised
        errors = self.gather_objects(error)
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise PeerError(str(other)) from other
        return result

    @contextlib.contextmanager
    def report_on_main(self) -> Iterator[None]:
        """For a block that raises the same `UserError` on all ranks: only rank 0 reports it.

        Raises:
            PeerError: in place of the `UserError`, on all ranks but 0.
        """
        try:
            yield
        except UserError as error:
            if self.is_main:
                raise
            raise PeerError(str(error)) from error

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on one rank of every other host, then on the rest.

        The first rank downloads and caches what the others then find.

        Raises:
            PeerError: if the block raised a `UserError` on another rank.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        self._meet(turn, None)
        try:
            yield
        except UserError as error:
            self._meet(1, error)
            raise
        self._meet(1, None)
        self._meet(2 - turn, None)

    def _meet(self, times: int, error: UserError | None) -> None:
        for _ in range(times):
            for rank, other in enumerate(self.gather_objects(error)):
                if other is not None and rank != self.rank:
                    raise PeerError(str(other)) from other

    @contextlib.contextmanager
    def known_row_counts(self, counts: Sequence[int] | None) -> Iterator[None]:
        """Inside the block, rank r passes `counts[r]` rows to each collective; `counts`: [W].

        If the counts are not known (None, or outside the block), every collective over rows first exchanges them, which
        makes the host wait for the device.
        """
        before, self._counts = self._counts, None if counts is None else tuple(counts)
        try:
            yield
        finally:
            self._counts = before

    def counts(self, mine: int) -> tuple[int, ...]:
        """The number of rows of each rank, [W]; `mine` is this rank's."""
        if self.size == 1:
            return (mine,)
        if self._counts is not None:
            assert self._counts[self.rank] == mine, "not the number of rows that known_row_counts says"
            return self._counts
        return tuple(self.gather_objects(mine))

    def first_row(self, mine: int) -> int:
        """The row of `gather_rows` where the `mine` rows of this rank begin."""
        return sum(self.counts(mine)[: self.rank])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, as a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order: [b, ...] -> [B, ...]."""
        if self.size == 1:
            return rows
        counts = self.counts(rows.shape[0])
        most, mine = max(counts), as_bytes(rows)
        padded = mine if len(mine) == most else torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])])
        everyone = mine.new_empty(self.size * most, mine.shape[1])
        _all_gather(everyone, padded, group=self._group)
        if min(counts) < most:
            parts = everyone.view(self.size, most, -1)
            everyone = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return as_rows(everyone, rows)

    def exchange_rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send sent[0] of `rows` to rank 0, the next sent[1] to rank 1 and so on; return the received rows [n, ...].

        These are ordered by sender: the first received[0] come from rank 0.
        """
        if self.size == 1:
            return rows
        mine = as_bytes(rows)
        output = mine.new_empty(sum(received), mine.shape[1])
        dist.all_to_all_single(output, mine, list(received), list(sent), group=self._group)
        return as_rows(output, rows)

    def scatter_sums(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum `rows` over the ranks and return this rank's part: [B, ...] -> [b, ...], B = sum(counts)."""
        if self.size == 1:
            return rows
        most, mine = max(counts), counts[self.rank]
        if min(counts) < most:
            padded, done = rows.new_zeros(self.size, most, *rows.shape[1:]), 0
            for place, count in zip(padded, counts, strict=True):
                place[:count] = rows[done : done + count]
                done += count
            rows = padded.flatten(0, 1)
        summed = rows.new_empty(most, *rows.shape[1:])
        _reduce_scatter(summed, rows.contiguous(), group=self._group)
        return summed[:mine]

    def side_channel(self) -> Ranks:
        """The same ranks with a process group of their own, for use by another thread."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "this rank is a member of the group"
        return Ranks(self.rank, self.size, local_rank=self.local_rank, local_size=self.local_size, group=group)


ALONE = Ranks()
"""A single process."""


@contextlib.contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """Connect the ranks that torchrun started (or whatever else set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT).

    Tensors on a GPU travel by NCCL, others by gloo. Each rank's current CUDA device becomes that of its local number.
    Without these variables the process is alone.

    Args:
        device: the config's `train.device`: auto, cpu or cuda.

    Raises:
        UserError: if the environment is incomplete, a rank cannot be reached, or a host has fewer GPUs than ranks.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    rank, size = _from_environment("RANK"), _from_environment("WORLD_SIZE")
    local_rank, local_size = _from_environment("LOCAL_RANK", rank), _from_environment("LOCAL_WORLD_SIZE", size)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} is local rank {local_rank}, but its host has {torch.cuda.device_count()} GPUs; start at"
                " most one process per GPU, or set train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    if size == 1:
        yield Ranks(local_rank=local_rank)
        return
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=_TIMEOUT))  # type: ignore[attr-defined]
        # torchrun keeps its store when it restarts ranks, with the addresses of the dead ones in it (torch 2.14).
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-of-{size}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"rank {rank} of {size} cannot join the others: {error}; {_START_RANKS}") from error
    # Not after an error: the other ranks may be gone, and destroying the group would wait for them.
    yield Ranks(rank, size, local_rank=local_rank, local_size=local_size)
    dist.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error of a collective means that another rank is gone."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def data_parallel(module: nn.Module, ranks: Ranks, example: Tensor) -> nn.Module:
    """Wrap `module` so that its backward averages gradients over the ranks; it starts from rank 0's weights.

    Args:
        module: parameters without gradients and all buffers stay each rank's own.
        ranks: the ranks that train together.
        example: an input of the module, [b, ...] on its device, b >= 2.
    """
    if ranks.size == 1:
        return module
    devices = [example.device] if example.is_cuda else None
    parallel: nn.Module = _DDP(module, device_ids=devices, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False})
    # DDP rebuilds its buckets after the first backward, and the order in which three or more summands are added depends
    # on them: without this backward a resumed run would differ in the last bits from an uninterrupted one.
    buffers = [buffer.clone() for buffer in module.buffers()]
    eagerly = torch.compiler.set_stance("force_eager")  # do not compile for a shape that never comes back
    with ranks.known_row_counts([len(example)] * ranks.size), warnings.catch_warnings(), eagerly:
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        parallel(example).sum().backward()
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(before)
    parallel.zero_grad(set_to_none=True)
    return parallel


def no_gradient_sync(parallel: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside the block, backwards through a `data_parallel` module accumulate this rank's gradients only.

    The next backward outside of it averages the accumulated gradients over the ranks.
    """
    return parallel.no_sync() if isinstance(parallel, _DDP) else contextlib.nullcontext()


def as_bytes(rows: Tensor) -> Tensor:
    """Rows [b, ...] of any dtype as [b, n] uint8, which every backend moves, bit for bit."""
    width = rows.shape[1:].numel() * rows.itemsize
    return rows.detach().contiguous().flatten().view(torch.uint8).view(rows.shape[0], width)


def as_rows(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_bytes`: rows with the shape and dtype of those of `like`."""
    return flat.contiguous().flatten().view(like.dtype).view(len(flat), *like.shape[1:])


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UserError(
            f"the environment variable {name} {'is missing' if text is None else f'is {text!r}, not a number'}; "
            f"{_START_RANKS}"
        )
    return int(text)
