"""Damage to the bytes of a file, drawn from a generator."""

import numpy as np

_INTERESTING = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four random changes: bits, bytes and words anywhere or in the header; cuts, copies and insertions."""
    damaged = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not damaged:
            break
        span = min(len(damaged), 64) if rng.random() < 0.5 else len(damaged)  # headers decide more than pixels
        at = int(rng.integers(span))
        length = int(rng.integers(1, 33))
        match int(rng.integers(7)):
            case 0:
                damaged[at] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[at] = int(rng.choice(_INTERESTING))
            case 2:
                damaged[at : at + 4] = bytes(rng.choice(_INTERESTING, 4).astype(np.uint8))
            case 3:
                del damaged[at:]
            case 4:
                del damaged[at : at + length]
            case 5:
                damaged[at:at] = rng.bytes(length)
            case _:
                damaged[at:at] = damaged[int(rng.integers(len(damaged))) :][: 8 * length]
    return bytes(damaged)
