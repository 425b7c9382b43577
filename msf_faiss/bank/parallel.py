"""Placeholder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from msf_faiss.bank.base import Bank


class ShardedBank:
    def state_dict(self) -> dict[str, Tensor]:
        raise NotImplementedError


def load_shards(bank: Bank, count: int, read: Callable[[int], dict[str, Tensor]]) -> None:
    bank.load_state_dict(read(0))
