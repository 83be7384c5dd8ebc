"""What nnU-Net finds of us: it imports every module of the folders in `nnUNet_extTrainer` and asks for a class by name.

nnU-Net forgets this module after each look-up, so nothing is defined here: the classes live in
`gasnet_nnunet.trainers`, where pickling and worker processes find them again. Only our own names import anything, so
that a look-up of somebody else's trainer never meets our code, and a failing import of ours is raised as it is.
"""

__all__ = ["GASNetTrainer", "SupervisedBaselineTrainer", "VanillaTrainer"]  # noqa: F822 (resolved by __getattr__)


def __getattr__(name: str) -> type:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gasnet_nnunet import trainers
    except AttributeError as error:
        # nnU-Net asks with hasattr(), which would take this one for "no such trainer" and hide it.
        raise ImportError(f"gasnet_nnunet.trainers cannot be imported: {error}") from error
    return getattr(trainers, name)
