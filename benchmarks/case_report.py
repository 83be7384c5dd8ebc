"""Size of the page of a large and noisy CT, and what writing it costs.

    python benchmarks/case_report.py

The CT is a phantom patient brought to 512 x 512 x 600 voxels with noise of 35 HU, which compresses badly.
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from time import process_time
from typing import Annotated

import numpy as np
import SimpleITK as sitk
import typer

from gasnet_nnunet.case_report import write_case_report
from gasnet_nnunet.phantom import make_phantom

NOISE_HU = 35.0


def main(
    size: Annotated[tuple[int, int, int], typer.Option(help="Voxels (X Y Z).")] = (512, 512, 600),
) -> None:
    """Write a page to a temporary folder and print its size, the CPU time and the memory."""
    patient = make_phantom(np.random.default_rng(0), "diseased", (60, 112, 112), (5.0, 3.0, 3.0))
    ct, mask = (_enlarged(array, patient.spacing, size) for array in (patient.ct, patient.lesion))
    values = sitk.GetArrayFromImage(ct)
    rng = np.random.default_rng(0)
    for plane in values:
        plane += rng.normal(0, NOISE_HU, plane.shape).astype(np.int16)
    restored = values.copy()
    restored[sitk.GetArrayViewFromImage(mask) > 0] = -850
    images = {"ct": values, "restored": restored, "difference": values - restored}
    made = {name: sitk.GetImageFromArray(array) for name, array in images.items()}
    for image in made.values():
        image.CopyInformation(ct)
    del ct, images, values, restored
    before, start = _peak(), process_time()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_case_report(page, case="phantom", mask=mask, burden={}, model={}, warnings=[], **made)
        megabytes = page.stat().st_size / 1e6
    print(f"{' x '.join(map(str, size))}: {megabytes:.1f} MB in {process_time() - start:.1f} s of a CPU core,")
    print(f"{max(0.0, _peak() - before):.2f} GB beyond the {before:.2f} GB that making the CT took at its peak")


def _enlarged(array: np.ndarray, spacing: tuple[float, ...], size: tuple[int, int, int]) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    target = [edge * (n - 1) / (m - 1) for edge, n, m in zip(image.GetSpacing(), image.GetSize(), size, strict=True)]
    interpolation = sitk.sitkLinear if array.dtype == np.int16 else sitk.sitkNearestNeighbor
    origin, direction = image.GetOrigin(), image.GetDirection()
    return sitk.Resample(image, size, sitk.Transform(), interpolation, origin, target, direction)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    typer.run(main)
