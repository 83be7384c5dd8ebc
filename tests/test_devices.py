"""Devices that are named, and chosen."""

from __future__ import annotations

import pytest
import torch

from gasnet_nnunet.devices import check_device, choose_device
from gasnet_nnunet.errors import UserError


def test_a_device_is_one_that_torch_can_use() -> None:
    check_device(None)
    check_device(choose_device(mps=True))
    assert choose_device("cpu") == "cpu"
    assert choose_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"The device is '{device}', but torch .* finds none here.* take cpu"):
            choose_device(device)
    with pytest.raises(UserError, match=r"nnU-Net knows cpu, cuda, mps\. Did you mean 'cuda'"):
        check_device("cdua")
