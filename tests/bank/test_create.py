"""Banks created from configs."""

import pytest
import torch

from msf_faiss.bank import FlatBank, create_bank
from msf_faiss.config import FlatBankConfig, ReferenceBankConfig
from msf_faiss.search.faiss_setup import has_gpu


@pytest.mark.parametrize("config", [FlatBankConfig, ReferenceBankConfig])
def test_bank_has_capacity_dtype_and_max_age_of_config(config: type[FlatBankConfig | ReferenceBankConfig]) -> None:
    bank = create_bank(config(capacity="1MB", dtype="float16", k=3, max_age=5), dim=30)
    assert (bank.capacity, bank.dim, bank.dtype, bank.device.type) == (1_000_000 // 68, 30, torch.float16, "cpu")
    bank.push(torch.eye(30), torch.arange(30))
    assert bank.search(torch.eye(30), 30).slots.shape == (30, 6)


def test_engine_auto_times_the_engines_if_batch_is_known() -> None:
    config = FlatBankConfig(capacity=50, k=3)
    timed = create_bank(config, dim=16, batch=8)
    untimed = create_bank(config, dim=16)
    named = create_bank(FlatBankConfig(capacity=50, k=3, engine="torch"), dim=16, batch=8)
    assert isinstance(timed, FlatBank)
    assert isinstance(untimed, FlatBank)
    assert isinstance(named, FlatBank)
    assert timed.engine_ms.keys() == {"faiss", "torch"}
    assert timed.engine == next(iter(timed.engine_ms))
    assert (untimed.engine_ms, untimed.engine) == ({}, "faiss")
    assert (named.engine_ms, named.engine) == ({}, "torch")


def test_unavailable_engine_raises() -> None:
    with pytest.raises(ValueError, match="no engine streams on cpu; choose one of faiss, torch"):
        create_bank(FlatBankConfig(capacity=50, engine="streams"), dim=16)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")
def test_engine_auto_on_cuda_also_times_streams() -> None:
    bank = create_bank(FlatBankConfig(capacity=100_000, k=3), dim=16, device="cuda", batch=8)
    assert bank.engine_ms.keys() == {"faiss", "torch", "streams"}
    assert bank.state_dict()["embeddings"].numel() == 0
