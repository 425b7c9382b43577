"""The capacity of a bank from its config, and the memory of an entry."""

import ctypes
import gc

import pytest
import torch

from msf_faiss.bank import Bank, create_bank
from msf_faiss.bank import capacity as sizing
from msf_faiss.bank.capacity import bytes_per_entry, resolve_capacity
from msf_faiss.config import (
    BankConfig,
    FlatBankConfig,
    IvfBankConfig,
    IvfConfig,
    ReferenceBankConfig,
    ScanBankConfig,
)
from msf_faiss.distributed.ranks import ALONE, Ranks
from msf_faiss.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the machine has 16 GiB."""
    monkeypatch.setattr(sizing, "total_memory", lambda device: 16 * 2**30)


@pytest.mark.parametrize(("dtype", "weight"), [("float32", 2056), ("float16", 1032), ("bfloat16", 1032)])
def test_entry_of_exact_bank_is_vector_and_id(dtype: str, weight: int) -> None:
    assert bytes_per_entry(FlatBankConfig(dtype=dtype), 512) == weight
    assert bytes_per_entry(ReferenceBankConfig(dtype=dtype), 512) == weight
    bank = create_bank(FlatBankConfig(capacity=100, dtype=dtype), dim=512, device=CPU)
    bank.push(torch.zeros(100, 512), torch.arange(100))
    state = bank.state_dict()
    assert sum(state[name].nbytes for name in ("embeddings", "ids")) == 100 * weight


class HeapInfo(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = (
        *((f"other_{number}", ctypes.c_size_t) for number in range(4)),
        ("mapped", ctypes.c_size_t),
        *((f"other_{number}", ctypes.c_size_t) for number in range(4, 6)),
        ("in_use", ctypes.c_size_t),
        *((f"other_{number}", ctypes.c_size_t) for number in range(6, 8)),
    )


def bytes_in_use() -> int:
    """Bytes that this process has allocated from the C library."""
    tell = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if tell is None:
        pytest.skip("needs glibc 2.33")
    tell.restype = HeapInfo
    gc.collect()
    info = tell()
    return info.mapped + info.in_use


def filled(config: BankConfig, dim: int, rotations: int) -> Bank:
    bank = create_bank(config, dim=dim, device=CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rotations * bank.capacity // 250):
        vectors = torch.nn.functional.normalize(torch.randn(250, dim, generator=generator), dim=1)
        bank.push(vectors, torch.arange(250))
    bank.search(vectors, 5)
    return bank


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        # Code books, and the last block of codes.
        pytest.param(FlatBankConfig(), 0.01, id="flat"),
        pytest.param(ScanBankConfig(scan="bf16"), 0.01, id="scan-bf16"),
        pytest.param(ScanBankConfig(scan="int8"), 0.01, id="scan-int8"),
        pytest.param(ScanBankConfig(scan="pq"), 0.01, id="scan-pq"),
        # The number of lists that have just doubled; centroids, one per 39 entries; and the probes of the last push,
        # which in so small a bank are most of the lists and 49 bytes per entry.
        pytest.param(IvfBankConfig(), 0.2, id="ivf"),
        pytest.param(IvfBankConfig(ivf=IvfConfig(segments=4)), 0.2, id="ivf-segments"),
    ],
)
def test_bytes_per_entry_matches_allocated_memory(kind: BankConfig, tolerance: float, dtype: str) -> None:
    config = kind.model_copy(update={"capacity": 20_000, "dtype": dtype})
    filled(config, 64, 1)  # allocates what libraries keep
    before = bytes_in_use()
    bank = filled(config, 64, 2)
    taken = (bytes_in_use() - before) / len(bank)
    assert taken == pytest.approx(bytes_per_entry(config, 64), rel=tolerance)


@pytest.mark.parametrize(
    ("capacity", "dtype", "entries"),
    [
        (1_024_000, "float32", 1_024_000),
        ("8GiB", "float32", 8 * 2**30 // 2056),
        ("8GiB", "float16", 8 * 2**30 // 1032),
        ("1.5GB", "bfloat16", 1_500_000_000 // 1032),
        ("0.5GiB", "float32", 2**29 // 2056),
        ("300MB", "float32", 300_000_000 // 2056),
        ("64MiB", "float32", 64 * 2**20 // 2056),
        ("0.01TB", "float32", 10_000_000_000 // 2056),
        ("0.01TiB", "float32", int(0.01 * 2**40) // 2056),
        ("dataset", "float32", 50_000),
    ],
)
def test_capacity_as_count_memory_or_dataset(capacity: int | str, dtype: str, entries: int) -> None:
    config = FlatBankConfig(capacity=capacity, dtype=dtype)
    assert resolve_capacity(config, dim=512, device=CPU, images=50_000) == entries


def test_capacity_dataset_needs_a_dataset() -> None:
    config = FlatBankConfig(capacity="dataset", k=3)
    with pytest.raises(UserError, match=r'bank.capacity: "dataset" needs a data set; set a number of entries instead'):
        resolve_capacity(config, dim=512, device=CPU)
    assert create_bank(config, dim=8, device=CPU, images=7).capacity == 7


def test_capacity_below_k_raises() -> None:
    with pytest.raises(UserError, match=r"bank.capacity: 0.01MB is 4 entries of 2,056 bytes, fewer than bank.k \(5\)"):
        resolve_capacity(FlatBankConfig(capacity="0.01MB"), dim=512, device=CPU)
    with pytest.raises(UserError, match=r"bank.capacity: dataset is 4 entries of 2,056 bytes, fewer than bank.k \(5\)"):
        resolve_capacity(FlatBankConfig(capacity="dataset"), dim=512, device=CPU, images=4)
    assert resolve_capacity(FlatBankConfig(capacity="dataset"), dim=512, device=CPU, images=5) == 5
    with pytest.raises(UserError, match="is 0 entries"):
        resolve_capacity(FlatBankConfig(capacity="0MB"), dim=512, device=CPU)


def test_capacity_beyond_memory_raises() -> None:
    config = FlatBankConfig(capacity=10_000_000)
    message = (
        r"bank.capacity: 10,000,000 entries of 2,056 bytes need 19.1 GiB, but cpu has 16.0 GiB; lower it, or choose "
        r"bank.dtype bfloat16"
    )
    with pytest.raises(UserError, match=message):
        resolve_capacity(config, dim=512, device=CPU)
    with pytest.raises(UserError, match=message):
        create_bank(config, dim=512, device=CPU)
    with pytest.raises(UserError, match=r"bank.capacity: 17,\d+,\d+ entries .* need 17.0 GiB"):
        resolve_capacity(FlatBankConfig(capacity="17GiB", dtype="bfloat16"), dim=512, device=CPU)
    assert resolve_capacity(FlatBankConfig(capacity=10_000_000, dtype="bfloat16"), dim=512, device=CPU) == 10_000_000


def test_unknown_memory_allows_any_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name: {name}")

    monkeypatch.setattr(sizing.os, "sysconf", unknown)
    assert resolve_capacity(FlatBankConfig(capacity=10**12), dim=512, device=CPU) == 10**12


def test_total_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    present = sizing.total_memory(CPU)
    assert present is None or 2**28 < present < 2**48


def test_capacity_as_memory_is_per_rank() -> None:
    one, four = ALONE, Ranks(0, 4, local_size=2)
    config = FlatBankConfig(capacity="1GiB")
    whole = resolve_capacity(config, dim=512, device=CPU, ranks=one)
    assert resolve_capacity(config, dim=512, device=CPU, ranks=four) == whole
    sharded = config.model_copy(update={"placement": "sharded"})
    assert resolve_capacity(sharded, dim=512, device=CPU, ranks=one) == whole
    assert resolve_capacity(sharded, dim=512, device=CPU, ranks=four) == 4 * whole
    assert resolve_capacity(FlatBankConfig(capacity=100, placement="sharded"), dim=512, device=CPU, ranks=four) == 100


def test_ranks_of_a_host_share_its_memory() -> None:
    config = FlatBankConfig(capacity="12GiB")
    resolve_capacity(config, dim=512, device=CPU, ranks=Ranks(0, 2))
    with pytest.raises(UserError, match=r"12.0 GiB, but cpu has 8.0 GiB per rank; .* or bank.placement sharded"):
        resolve_capacity(config, dim=512, device=CPU, ranks=Ranks(0, 2, local_size=2))
    entries = FlatBankConfig(capacity=12 * 2**30 // 2056, placement="sharded")
    resolve_capacity(entries, dim=512, device=CPU, ranks=Ranks(0, 2, local_size=2))
