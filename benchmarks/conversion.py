"""Seconds a case and memory of a conversion, against a plain read and write of the same files.

    python benchmarks/conversion.py --images FOLDER [--cases 12]

takes CTs of a folder as healthy ones (and phantom lesions as the mask of one), converts them with one and with two
processes into a temporary folder, and prints a table. Ratios are what to compare: the machines are noisy.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from gasnet_nnunet.dataset_conversion.folders import convert_folders


def plain(paths: list[Path], out: Path) -> float:
    """Seconds for SimpleITK to read the files and to write them compressed."""
    start = time.monotonic()
    for path in paths:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(out / f"{path.name.split('.')[0]}.nii.gz"), True)
    return time.monotonic() - start


def converted(folder: Path, processes: int) -> float:
    """Seconds for the conversion of the same files."""
    start = time.monotonic()
    convert_folders(
        dataset_id=990 + processes,
        name="Benchmark",
        labelled=(folder / "labelled", folder / "masks"),
        healthy=folder / "healthy",
        num_processes=processes,
    )
    return time.monotonic() - start


def peak(who: int) -> float:
    """Most memory that this process or one of its children has held, in MiB."""
    return resource.getrusage(who).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="Folder of CTs.")
    parser.add_argument("--cases", type=int, default=12)
    arguments = parser.parse_args()
    paths = sorted(arguments.images.iterdir())[: arguments.cases]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["nnUNet_raw"] = str(root / "raw")
        for folder in ("raw", "labelled", "masks", "healthy", "plain"):
            (root / folder).mkdir()
        for path in paths[1:]:
            shutil.copy(path, root / "healthy")
        shutil.copy(paths[0], root / "labelled")
        image = sitk.ReadImage(str(paths[0]))
        mask = np.zeros(image.GetSize()[::-1], np.uint8)
        mask[len(mask) // 2, :9, :9] = 1
        label = sitk.GetImageFromArray(mask)
        label.CopyInformation(image)
        sitk.WriteImage(label, str(root / "masks" / paths[0].name), True)
        reference = plain(paths, root / "plain")
        voxels = sum(int(np.prod(sitk.ReadImage(str(path)).GetSize())) for path in paths) / len(paths)
        print(f"{len(paths)} CTs of {voxels / 1e6:.1f} million voxels on average")
        print(f"{'':28}{'s a case':>10}{'ratio':>8}")
        imported = peak(resource.RUSAGE_SELF)
        print(f"{'plain read and write':28}{reference / len(paths):10.2f}{1:8.2f}")
        for processes in (1, 2):
            seconds = converted(root, processes)
            print(f"{f'conversion, {processes} processes':28}{seconds / len(paths):10.2f}{seconds / reference:8.2f}")
        print(
            f"memory: {peak(resource.RUSAGE_SELF):.0f} MiB in the first process ({imported:.0f} before it converted), "
            f"{peak(resource.RUSAGE_CHILDREN):.0f} in the others; a volume of int16 has {voxels * 2 / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
