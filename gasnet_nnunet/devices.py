"""What a model runs on: nnU-Net's `-device`, checked before anything that takes long."""

from __future__ import annotations

from gasnet_nnunet.errors import UserError, hint

DEVICES = ("cpu", "cuda", "mps")


def check_device(device: str | None) -> None:
    """Check a device that the user has named.

    Args:
        device: "cpu", "cuda", "cuda:1" or "mps"; `None` if none was named.

    Raises:
        UserError: It is none that nnU-Net knows, or torch cannot use it here.
    """
    if device in (None, "cpu"):
        return
    assert device is not None
    kind = device.partition(":")[0]
    if kind not in DEVICES:
        raise UserError(f"The device is '{device}', but nnU-Net knows {', '.join(DEVICES)}.{hint(kind, DEVICES)}")
    import torch

    if not _usable(kind):
        raise UserError(
            f"The device is '{device}', but torch {torch.__version__} finds none here. `gasnet-nnunet doctor` says "
            "why; without one take cpu."
        )


def choose_device(device: str | None = None, *, mps: bool = False) -> str:
    """The device that was named, or the quickest that torch can use.

    Args:
        device: As for `check_device`.
        mps: Whether mps may be chosen where none was named, which not all of nnU-Net's layers run on.

    Raises:
        UserError: As `check_device`.
    """
    check_device(device)
    return device or next(kind for kind in ("cuda", "mps", "cpu") if (mps or kind != "mps") and _usable(kind))


def _usable(kind: str) -> bool:
    import torch

    return kind == "cpu" or (torch.cuda if kind == "cuda" else torch.backends.mps).is_available()
