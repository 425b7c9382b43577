"""Random numbers as a pure function of counters: stateless, independent of call order, the same in every process.

A SplitMix64 hash (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", 2014) over a chain of
counters: (seed, epoch, stream, id) alone reproduces the numbers drawn for that sample.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hash_counters(*counters: ArrayLike) -> NDArray[np.uint64]:
    """A 64-bit hash for each element of the broadcast `counters`, which are integers >= 0; scalars give [1]."""
    key = np.zeros(1, np.uint64)
    for counter in counters:
        key = _mix(key + _GAMMA * (np.atleast_1d(np.asarray(counter, np.uint64)) + np.uint64(1)))
    return key


def uniform(*counters: ArrayLike, count: int) -> NDArray[np.float64]:
    """[count, B] numbers, uniform in [0, 1), for `counters` that broadcast to [B].

    Each row is contiguous, because numpy may round a strided `exp` differently.
    """
    bits = hash_counters(*counters, np.arange(count, dtype=np.uint64)[:, None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
