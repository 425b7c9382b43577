import pytest
import torch

from msf_faiss.device import select_device
from msf_faiss.errors import UserError


def test_auto_selects_cuda_only_if_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == select_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="torch finds no CUDA device on this machine; use cpu or auto"):
        select_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda", 3)
