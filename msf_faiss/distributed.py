"""Placeholder until the ranks arrive: one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Ranks:
    """One process."""

    rank, size, local_rank, local_size, is_main = 0, 1, 0, 1, True

    @classmethod
    def alone(cls) -> Ranks:
        return cls()

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_rows(self, rows: Tensor) -> Tensor:
        return rows

    @contextlib.contextmanager
    def agreed(self, counts: list[int]) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        yield

    def side_channel(self) -> Ranks:
        return self


def lost_peer(error: BaseException) -> bool:
    return False


def data_parallel(module: nn.Module, ranks: Ranks) -> nn.Module:
    return module


@contextlib.contextmanager
def joined(device_type: str) -> Iterator[Ranks]:
    yield Ranks.alone()
