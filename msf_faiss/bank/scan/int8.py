"""Approximate search by a scan in 8-bit integers after a random rotation.

Shapes: B queries, C candidates, K neighbours, N slots, D dimensions.
"""

import torch
from torch import Tensor

from msf_faiss.bank.scan.base import ApproximateScanBank, round_up
from msf_faiss.search.canonical import rescore
from msf_faiss.search.exact import unproven
from msf_faiss.search.neighbors import Neighbors
from msf_faiss.search.torch_engine import shortlist

_RANGE = 4.0  # standard deviations of a mixed component that code 127 stands for
_UNSURE = 1 / 64  # ratio of the queries that may end with too few groups
_SIGMAS = 6.0  # standard deviations of a product's rounding error in the bound
_LEAST_ROWS = 17  # that CUDA's integer product takes


class Int8ScanBank(ApproximateScanBank):
    """Approximate: scans a copy in 8-bit integers, in half the time and memory of bfloat16; rarely misses a neighbour.

    The copy is mixed first (see `_mix`), after which one scale suits all components of all entries, so their products
    stay integers until the best are selected. Groups of entries are compared, best first, until a query's k-th
    neighbour exceeds all other entries by six standard deviations of the rounding error of a product.
    """

    @staticmethod
    def extra_bytes(dim: int, dtype: torch.dtype) -> float:
        return round_up(dim, 8)

    def _allocate(self) -> None:
        super()._allocate()
        self._signs = _signs(self.dim).to(self.device)  # [2, D]
        self._scale = 127 / _RANGE * self.dim**0.5
        # CUDA's integer product takes a multiple of 8 dimensions.
        shape = (self.capacity + _LEAST_ROWS, round_up(self.dim, 8))
        self._codes = torch.zeros(shape, dtype=torch.int8, device=self.device)

    def _written(self, start: int, stop: int) -> None:
        self._codes[start:stop, : self.dim] = self._encode(self._entries[start:stop])

    def _index_state(self) -> dict[str, Tensor]:
        return {"int8.counters": torch.tensor([self._effort, self._last_push, self._groups, self._next_groups])}

    def _load_index(self, state: dict[str, Tensor]) -> None:
        self._encode_all()
        self._effort, self._last_push, *groups = state.get("int8.counters", torch.tensor([1, 0, 0, 0])).tolist()
        self._groups, self._next_groups = (max(number, self._fewest_groups) for number in groups)

    def _encode(self, vectors: Tensor) -> Tensor:
        """Return the codes of `vectors` [*, D], int8."""
        return _mix(vectors.float(), self._signs).mul_(self._scale).round_().clamp_(-127, 127).to(torch.int8)

    def _scan(self, queries: Tensor, k: int, newest: int) -> Neighbors:
        batch = queries.shape[0]
        coarse = self._codes.new_zeros(round_up(batch, 8), self._codes.shape[1])
        coarse[:batch, : self.dim] = self._encode(queries)

        def product(start: int, stop: int, out: Tensor) -> None:
            if stop - start < _LEAST_ROWS:
                out.copy_(torch._int_mm(self._codes[start : start + _LEAST_ROWS], coarse.T)[: stop - start])
            else:
                torch._int_mm(self._codes[start:stop], coarse.T, out=out)

        limits = self._limits
        older, groups = self._slots(newest, self.searchable), k + self._effort * self._groups
        listed = shortlist(product, torch.int32, older, groups, coarse, group=limits.group)
        bounds = torch.cat([listed.maxima, listed.bound.unsqueeze(1)], dim=1)[:batch].float() / self._scale**2
        # Rounding to integers has a standard deviation of 12 ** -0.5 in each component, of the query and of the entry.
        error = _SIGMAS * (2 / 12) ** 0.5 / self._scale
        slots, bound = self._compare(queries, listed.rows[:batch], bounds, k, error)
        neighbors = rescore(queries, self._entries, slots, self.age(slots), slots.shape[1])
        if self._groups < limits.most_groups and not queries.is_cuda:
            kth = neighbors.similarities[:, min(k, slots.shape[1]) - 1]
            if unproven(kth, bound, error).double().mean() > _UNSURE:
                self._next_groups = min(2 * self._groups, limits.most_groups)
        return neighbors


def _mix(vectors: Tensor, signs: Tensor) -> Tensor:
    """Rotate `vectors` [*, D] so that all components of any vector have about the same variance, 1/D.

    Two Walsh-Hadamard transforms with random signs, of the first and of the last dimensions, so that D can be any
    number. They consist of sums of pairs: the result does not depend on how many vectors are transformed at a time.
    """
    dim = vectors.shape[1]
    width = 1 << (dim.bit_length() - 1)
    first = torch.cat([_walsh_hadamard(vectors[:, :width] * signs[0, :width]), vectors[:, width:]], dim=1) * signs[1]
    return torch.cat([first[:, : dim - width], _walsh_hadamard(first[:, dim - width :])], dim=1)


def _walsh_hadamard(vectors: Tensor) -> Tensor:
    width = vectors.shape[1]
    for _ in range(width.bit_length() - 1):
        even, odd = vectors[:, 0::2], vectors[:, 1::2]
        vectors = torch.cat([even + odd, even - odd], dim=1)
    return vectors * float(width**-0.5)


def _signs(dim: int) -> Tensor:
    """Return [2, D] of 1 and -1, always the same."""
    drawn = torch.rand(2, dim, generator=torch.Generator().manual_seed(0))
    return torch.where(drawn < 0.5, -1.0, 1.0)
