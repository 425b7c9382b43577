"""Unit vectors for benchmarks: two synthetic distributions, and embeddings of real images.

Shapes: M vectors, D dimensions, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

CLASSES, SUPER_CLASSES, WITHIN = 4096, 128, 32
HARD_DIMENSIONS, HARD_NOISE = 96, 0.1


class Source(Protocol):
    """A stream of unit vectors. It depends on its seed and on the sizes of earlier draws."""

    def draw(self, count: int) -> Tensor:
        """Return the next `count` vectors, [M, D] float32 of unit norm."""


class Clustered:
    """4,096 classes in 128 super-classes; each class varies in its own 32-dimensional subspace.

    Centres of a super-class have a cosine of about `sibling` with each other. Towards 1, the super-classes become the
    clusters, and classes differ only by their subspaces. A vector is its centre plus noise of energy `spread` in the
    subspace of its class. With D = 512 and 1,048,576 entries, the five nearest neighbours of a vector have cosines from
    .75 to .70 on average, and 99 % of them have its class.
    """

    def __init__(self, dim: int, seed: int, *, sibling: float = 0.7, spread: float = 0.95) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._sibling = sibling
        self.dim = dim
        self.centres = self.fresh_centres()  # [C, D]
        # Columns of one rotation span the subspaces, so that noise costs one matrix product.
        self._rotation = torch.linalg.qr(torch.randn(dim, dim, generator=self._generator))[0]  # [D, D]
        scores = torch.rand(CLASSES, dim, generator=self._generator)
        self._columns = scores.argsort(dim=1)[:, : min(WITHIN, dim)]  # [C, 32]
        self._spread = spread

    def draw(self, count: int) -> Tensor:
        return self.draw_labelled(count)[0]

    def draw_labelled(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the next vectors as `draw` does, and their classes, [M] int64."""
        labels = torch.randint(CLASSES, (count,), generator=self._generator)  # [M]
        columns = self._columns[labels]  # [M, 32]
        noise = torch.randn(columns.shape, generator=self._generator) * (self._spread / columns.shape[1]) ** 0.5
        within = torch.zeros(count, self._rotation.shape[0]).scatter_(1, columns, noise)  # [M, D]
        return normalize(self.centres[labels] + within @ self._rotation, dim=1), labels

    def fresh_centres(self) -> Tensor:
        """Return new centres of the same distribution, [C, D]."""
        families, own = (self._unit(count) for count in (SUPER_CLASSES, CLASSES))
        shared = families[torch.arange(CLASSES) % SUPER_CLASSES]
        return normalize(self._sibling**0.5 * shared + (1 - self._sibling) ** 0.5 * own, dim=1)

    def _unit(self, rows: int) -> Tensor:
        return normalize(torch.randn(rows, self.dim, generator=self._generator), dim=1)


class Hard:
    """No clusters: a Gaussian in a subspace of 96 dimensions, and noise in all D with a tenth of the energy.

    The energy of the i-th dimension of the subspace is proportional to 1 / i, since spectra of image embeddings fall
    too. With D = 512 and 131,072 entries, the five nearest neighbours of a vector have cosines from .61 to .57 on
    average, and an inverted file of 1,024 lists (8-bit codes) finds .93 of them in 32 lists and .98 in 64. With 96
    equal dimensions, it would find .30 and .43.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        rank = min(HARD_DIMENSIONS, dim)
        energies = 1 / torch.arange(1, rank + 1)
        deviations = ((1 - HARD_NOISE) * energies / energies.sum()).sqrt()
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=self._generator))[0]
        self._basis = deviations.unsqueeze(1) * rotation[:rank]  # [96, D]

    def draw(self, count: int) -> Tensor:
        rank, dim = self._basis.shape
        signal = torch.randn(count, rank, generator=self._generator) @ self._basis
        noise = torch.randn(count, dim, generator=self._generator) * (HARD_NOISE / dim) ** 0.5
        return normalize(signal + noise, dim=1)  # [M, D]


class Embeddings:
    """Rows of an .npy file in random order, read on demand and normalised.

    Args:
        path: [n, D], floating point.

    Raises:
        SystemExit: the file has another shape or dtype.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self._rows = np.load(path, mmap_mode="r")
        if self._rows.ndim != 2 or not np.issubdtype(self._rows.dtype, np.floating):
            raise SystemExit(f"{path} must have [n, D] floats, not {list(self._rows.shape)} {self._rows.dtype}")
        self._order = np.random.default_rng(seed).permutation(self._rows.shape[0])
        self._drawn = 0

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def draw(self, count: int) -> Tensor:
        """Return the next rows; none is returned twice.

        Raises:
            SystemExit: the file has too few rows.
        """
        chosen = self._order[self._drawn : self._drawn + count]
        if len(chosen) < count:
            raise SystemExit(f"the file has only {len(self):,} embeddings: pass smaller --sizes or fewer --rounds")
        self._drawn += count
        rows = np.asarray(self._rows[chosen], dtype=np.float32)
        return normalize(torch.from_numpy(rows), dim=1)  # [M, D]
