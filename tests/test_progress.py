from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from gasnet_nnunet.progress import TrainingCurves, save_gallery, slice_with_most

NAN = float("nan")


def test_rows_survive_and_keep_columns_that_came_later(tmp_path: Path) -> None:
    TrainingCurves(tmp_path).append(0, {"L_lab": 0.5, "L_ps": NAN})
    TrainingCurves(tmp_path).append(1, {"L_lab": 0.25, "L_ps": 0.125, "of_my_own": 3})
    rows = pd.read_csv(tmp_path / "gasnet_progress.csv")
    assert list(rows.columns) == ["epoch", "L_lab", "L_ps", "of_my_own"]
    assert rows["epoch"].tolist() == [0, 1]
    assert rows["L_lab"].tolist() == [0.5, 0.25]
    assert rows["L_ps"].isna().tolist() == [True, False]
    assert rows["of_my_own"].isna().tolist() == [True, False]


def test_epoch_run_again_replaces_itself_and_what_followed(tmp_path: Path) -> None:
    curves = TrainingCurves(tmp_path)
    for epoch in range(4):
        curves.append(epoch, {"L_lab": float(epoch)})
    curves.append(2, {"L_lab": 20.0})
    assert curves.read()["epoch"].tolist() == [0, 1, 2]
    assert curves.read()["L_lab"].tolist() == [0.0, 1.0, 20.0]


@pytest.mark.parametrize(("first", "left"), [(0, []), (2, [0, 1]), (9, [0, 1, 2])])
def test_truncate_drops_from_the_given_epoch(tmp_path: Path, first: int, left: list[int]) -> None:
    curves = TrainingCurves(tmp_path)
    for epoch in range(3):
        curves.append(epoch, {"L_lab": 1.0, "M_healthy": NAN})
    curves.truncate(first)
    assert curves.read()["epoch"].tolist() == left
    curves.append(first, {"L_lab": 2.0})
    assert curves.read()["epoch"].tolist() == [*left, first]


def test_truncate_without_a_file_writes_none(tmp_path: Path) -> None:
    TrainingCurves(tmp_path).truncate(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_plot_is_drawn_for_any_number_of_epochs_and_leaves_global_style_alone(tmp_path: Path, epochs: int) -> None:
    curves = TrainingCurves(tmp_path)
    for epoch in range(epochs):
        curves.append(epoch, {"L_lab": 1.0 / (epoch + 1), "L_ps": NAN, "D_healthy": 0.5, "unknown": 1.0})
    before = dict(matplotlib.rcParams)
    curves.plot()
    assert dict(matplotlib.rcParams) == before
    assert imread(tmp_path / "gasnet_progress.png").std() > 0.01
    expected = {"gasnet_progress.png"} | ({"gasnet_progress.csv"} if epochs else set())
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_plot_draws_what_the_columns_hold(tmp_path: Path) -> None:
    images = []
    for value in (0.2, 0.9):
        curves = TrainingCurves(tmp_path)
        curves.append(0, {"D_healthy": value})
        curves.plot()
        images.append(imread(tmp_path / "gasnet_progress.png"))
    assert not np.array_equal(images[0], images[1])


def volume(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (5, 12, 14)).astype(np.float32)
    probability = np.zeros_like(image)
    probability[3, 2:8, 3:9] = 0.9
    return {"I_d": image, "M^": probability, "I_g": image * 0.5, "I_s": image * 0.7}


def test_gallery_with_and_without_pseudo_labels(tmp_path: Path) -> None:
    without, complete = volume(0), volume(1)
    complete["I_ps"] = complete["I_d"]
    complete["M_ps"] = np.where(complete["M^"] > 0.5, 1, 0)
    files = [tmp_path / f"{name}.png" for name in ("without", "with", "ignored")]
    save_gallery(files[0], [without, volume(1)], titles=["a", "b"])
    save_gallery(files[1], [without, complete], titles=["a", "b"])
    save_gallery(files[2], [without, {**complete, "M_ps": complete["M_ps"] * 2}], titles=["a", "b"])
    images = [imread(file) for file in files]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_gallery_takes_minus_one_and_two_for_ignored(tmp_path: Path) -> None:
    row = volume(0)
    images = []
    for value in (-1, 2):
        save_gallery(tmp_path / "g.png", [{**row, "M_ps": np.full((5, 12, 14), value)}], titles=["a"])
        images.append(imread(tmp_path / "g.png"))
    assert np.array_equal(images[0], images[1])


def test_gallery_shows_the_slice_with_most_lesion() -> None:
    probability = np.zeros((5, 4, 4))
    assert slice_with_most(probability) == 2
    probability[4, 0, 0] = 0.9
    probability[1] = 0.2
    assert slice_with_most(probability) == 1


def test_gallery_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="title"):
        save_gallery(tmp_path / "g.png", [volume(0)], titles=[])
    with pytest.raises(ValueError, match=r"a needs I_d and M\^"):
        save_gallery(tmp_path / "g.png", [{"I_d": np.zeros((2, 3, 4))}], titles=["a"])
    assert list(tmp_path.iterdir()) == []
