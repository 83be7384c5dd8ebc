"""The page of a case and the index over all cases; what they do in a browser is in end_to_end/test_reports.py."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

from gasnet_nnunet import case_report
from gasnet_nnunet.case_report import (
    DIFFERENCE_LEVELS,
    HU_LEVELS,
    IndexRow,
    as_text,
    burden_tables,
    reduction,
    report_name,
    write_case_report,
    write_index,
)

SIZE, SPACING = (6, 10, 12), (4.0, 2.0, 1.5)
NASTY = '<script>alert("x")</script> & co'


def image_of(array: NDArray[Any]) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-20.0, 5.0, 100.0))
    return image


def scan() -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """A CT in which every voxel differs along all axes, and a lesion in slices 1 and 2 counted from below."""
    z, y, x = np.indices(SIZE)
    ct = (-1000 + 150 * z + 20 * y + 7 * x).astype(np.int16)
    mask = np.zeros(SIZE, np.uint8)
    mask[1:3, 2:5, 7:11] = 1
    mask[1, 2, 7] = 0
    return ct, mask


def write(path: Path, *, turned: str = "LPS", restored: NDArray[Any] | None = None, **changes: Any) -> str:
    """Write the report of the scan, stored in another orientation if asked, and return the page."""
    ct, mask = scan()
    images: dict[str, sitk.Image | None] = {"ct": image_of(ct), "mask": image_of(mask)}
    images["restored"] = None if restored is None else image_of(restored)
    images["difference"] = None if restored is None else image_of(ct - restored)
    images = {name: image and sitk.DICOMOrient(image, turned) for name, image in images.items()}
    content = {"case": "a", "burden": {}, "model": {}, "warnings": [], **images, **changes}
    write_case_report(path, **content)  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def volume_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="volume">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def planes_of(volume: dict[str, Any], name: str) -> NDArray[np.uint8]:
    """Planes (Z, Y, X) as viewer.js unpacks them."""
    planes = np.empty(volume["shape"], np.uint8)
    for plane, text in zip(planes, volume["planes"][name], strict=True):
        residual = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(plane.shape).astype(int)
        padded = np.zeros((plane.shape[0] + 1, plane.shape[1] + 1), int)
        for y, x in np.ndindex(plane.shape):
            left, up, corner = padded[y + 1, x], padded[y, x + 1], padded[y, x]
            expected = max(min(left, up), min(max(left, up), left + up - corner))
            padded[y + 1, x + 1] = (residual[y, x] + expected) % 256
        plane[:] = padded[1:, 1:]
    return planes


@pytest.mark.parametrize("turned", ["LPS", "RAS", "ASL", "IPR"])
def test_slices_are_shown_in_radiological_convention_whatever_the_direction(turned: str, tmp_path: Path) -> None:
    volume = volume_of(write(tmp_path / "a.html", turned=turned))
    ct, mask = scan()
    # The highest slice first; rows from front to back and columns from right to left are those of LPS.
    shown = np.array(volume["levels"])[planes_of(volume, "ct")]
    np.testing.assert_allclose(shown, ct[::-1], atol=5)
    np.testing.assert_array_equal(planes_of(volume, "mask"), mask[::-1])
    assert volume["spacing"] == pytest.approx(SPACING)
    assert volume["top"] == pytest.approx(100 + 5 * SPACING[0])
    assert volume["start"] == 3
    assert volume["areas"] == [0, 0, 0, 12, 11, 0]


def test_oblique_scan_is_shown_by_its_own_slices_and_says_so(tmp_path: Path) -> None:
    ct, mask = (image_of(array) for array in scan())
    angle = math.radians(20)
    tilted = (1, 0, 0, 0, math.cos(angle), -math.sin(angle), 0, math.sin(angle), math.cos(angle))
    for image in (ct, mask):
        image.SetDirection(tilted)
    page = write(tmp_path / "a.html", ct=ct, mask=mask)
    assert "tilted by 20 degrees" in page
    np.testing.assert_array_equal(planes_of(volume_of(page), "mask"), scan()[1][::-1])


def test_restored_ct_and_difference_are_shown_and_cost_nothing_where_the_ct_is_kept(tmp_path: Path) -> None:
    ct, mask = scan()
    restored = np.where(mask > 0, -900, ct).astype(np.int16)
    volume = volume_of(write(tmp_path / "a.html", restored=restored))
    codes = planes_of(volume, "ct")
    change = planes_of(volume, "restored")
    assert not change[mask[::-1] == 0].any()
    np.testing.assert_allclose(HU_LEVELS[(codes + change).astype(np.uint8)][mask[::-1] > 0], -900, atol=5)
    difference = DIFFERENCE_LEVELS[planes_of(volume, "difference")]
    np.testing.assert_allclose(difference, (ct - restored)[::-1], atol=5)
    assert not difference[mask[::-1] == 0].any()


def test_without_a_restored_ct_there_are_two_pictures(tmp_path: Path) -> None:
    page = write(tmp_path / "a.html")
    assert re.findall(r'data-panel="(\w+)"', page) == ["ct", "contour"]
    assert set(volume_of(page)["planes"]) == {"ct", "mask"}


def test_large_ct_is_averaged_and_no_lesion_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_report, "MOST_VOXELS", 2 * 5 * 6)
    ct, _ = scan()
    lonely = np.zeros(SIZE, np.uint8)
    lonely[5, 9, 11] = 1
    images = {"ct": image_of(ct), "mask": image_of(lonely)}
    for image in images.values():
        image.SetSpacing((1.5, 2.0, 1.0))
    page = write(tmp_path / "a.html", **images)
    volume = volume_of(page)
    assert volume["shape"] == [2, 5, 6]
    assert volume["spacing"] == pytest.approx([3.0, 4.0, 3.0])
    assert "3 slices and 2 x 2 pixels are averaged" in page
    assert planes_of(volume, "mask").tolist()[0][4][5] == 1
    assert volume["areas"] == [1, 0]
    mean = ct[::-1].reshape(2, 3, 5, 2, 6, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(HU_LEVELS[planes_of(volume, "ct")], mean, atol=11)


@pytest.mark.parametrize("size", [(600, 512, 512), (1500, 512, 512), (80, 1024, 1024), (300, 768, 768)])
@pytest.mark.parametrize("thickness", [0.5, 1.0, 5.0])
def test_every_ct_fits_a_page(size: tuple[int, int, int], thickness: float) -> None:
    factors = reduction(size, (thickness, 0.7, 0.7))
    shown = math.prod(math.ceil(n / factor) for n, factor in zip(size, factors, strict=True))
    assert shown <= case_report.MOST_VOXELS
    assert factors[0] == 1 or factors[0] * thickness <= case_report.THICKEST


def test_ct_that_is_not_in_hu_gets_no_hu_windows(tmp_path: Path) -> None:
    bytes_ = (np.arange(np.prod(SIZE)).reshape(SIZE) % 256).astype(np.int16)
    page = write(tmp_path / "a.html", ct=image_of(bytes_))
    volume = volume_of(page)
    assert not volume["windows"]
    assert "not HU" in page
    np.testing.assert_array_equal(np.array(volume["levels"])[planes_of(volume, "ct")], bytes_[::-1])


def test_images_on_different_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask"):
        write(tmp_path / "a.html", mask=image_of(np.zeros((6, 10, 11), np.uint8)))
    assert not list(tmp_path.iterdir())


def test_names_and_warnings_are_escaped(tmp_path: Path) -> None:
    content = {"case": NASTY, "warnings": [NASTY], "model": {NASTY: NASTY}, "burden": {NASTY: NASTY}}
    page = write(tmp_path / "a.html", **content)
    write_index(tmp_path / "report.html", [IndexRow(NASTY, {"lesion_ml": 1.0}, [NASTY], NASTY)])
    for text in (page, (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "<script>alert" not in text
        assert html.escape(NASTY, quote=False) in text.replace("&#34;", '"')


def test_page_asks_for_nothing(tmp_path: Path) -> None:
    page = write(tmp_path / "a.html")
    assert "default-src 'none'" in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert addresses
    assert all((one or other).startswith("data:") for one, other in addresses)


def test_page_says_what_it_is_not_and_what_made_it(tmp_path: Path) -> None:
    page = write(tmp_path / "a.html", model={"Model": "Dataset501_X", "Version": "9.8"}, warnings=["No lungs found."])
    assert "Not a medical device" in page
    for text in ("Dataset501_X", "9.8", "No lungs found."):
        assert text in page
    assert page.index("No lungs found.") < page.index('id="viewer"')


def test_burden_is_shown_whole() -> None:
    burden = {"lesion_ml": 12.34, "lesion_percent": None, "left_percent": 3.0, "components": 2, "made_up_ml": 0.26}
    tables = {table["caption"]: dict(table["rows"]) for table in burden_tables(burden)}
    assert tables["Where"] == {"Both lungs": ["12.3", "-", ""], "Left": ["", "3.0", ""]}
    assert tables["Lesions"] == {"Number": ["2"]}
    assert tables["Other"] == {"made up (ml)": ["0.3"]}
    assert burden_tables({}) == []
    assert as_text("lesion_ml", math.nan) == "-"
    assert as_text("note", "odd") == "odd"
    assert as_text("left", {"lesion_ml": 1.0}) == "lesion (ml) 1.0"


def cells(page: str) -> list[list[str]]:
    body = re.search(r"<tbody>(.*)</tbody>", page, re.DOTALL)
    assert body is not None
    rows = re.findall(r"<tr>(.*?)</tr>", body[1], re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]


def test_index_links_to_reports_and_shows_the_worst_first(tmp_path: Path) -> None:
    for case in ("b 1#", "c"):
        write(tmp_path / report_name(case), case=case)
    rows = [
        IndexRow("lost", problem="lost.nii.gz is damaged."),
        IndexRow("b 1#", {"lesion_ml": 9.0, "components": 1}),
        IndexRow("c", {"lesion_ml": 10.0, "components": 12}, ["Odd spacing."]),
    ]
    write_index(tmp_path / "report.html", rows)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cells(page) == [
        ["", "c", "10.0", "12", "Odd spacing."],
        ["", "b 1#", "9.0", "1", ""],
        ["", "lost", "-", "-", "lost.nii.gz is damaged."],
    ]
    assert 'href="b%201%23_report.html"' in page
    assert "lost_report.html" not in page
    assert "3 cases, 1 with a problem" in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).size == (240, round(240 * 10 * 2 / (12 * 1.5)))


def test_index_of_nothing_known_shows_what_there_is(tmp_path: Path) -> None:
    write_index(tmp_path / "report.html", [IndexRow("a", {"new_thing": 3, "note": "x"})])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cells(page) == [["", "a", "3", ""]]
    assert "new thing" in page
    write_index(tmp_path / "report.html", [])
    assert "0 cases" in (tmp_path / "report.html").read_text(encoding="utf-8")
