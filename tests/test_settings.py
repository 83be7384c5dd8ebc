"""Settings: what is accepted, what is refused and how."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gasnet_nnunet.errors import UserError
from gasnet_nnunet.settings import NOT_YET, GASNetSettings, load_preset, parse_assignments, preset_names

SHARES = st.floats(0, 1)
WINDOWS = st.lists(st.floats(-1e3, 1e3).map(lambda low: (low, low + 1.0)), min_size=1, max_size=3).map(tuple)
SETTINGS = st.builds(
    GASNetSettings,
    num_epochs=st.integers(1, 5000),
    seed=st.none() | st.integers(0, 2**31),
    learning_rate_s=st.floats(1e-9, 1),
    lambda_s=st.floats(1e-3, 1e6),
    weight_mil=st.floats(0, 1e9),
    pseudo_start=SHARES,
    pseudo_margin=st.floats(0, 0.49),
    healthy_outside=SHARES,
    restore_within_organ=st.booleans(),
    mirror_axes=st.none() | st.lists(st.integers(0, 2), unique=True).map(tuple),
    window=st.none() | WINDOWS,
)

FIRST = """
num_epochs iterations_per_epoch validation_iterations_per_epoch seed save_every_minutes gallery_every_epochs optimizer_s
learning_rate_s weight_decay_s segmentation_loss learning_rate_g learning_rate_d generator_features
generator_downsamplings generator_residual_blocks discriminator_features discriminator_layers discriminator_norm
discriminator_steps lambda_s weight_labelled weight_healthy weight_mil weight_pseudo weight_adversarial
weight_generated weight_diseased weight_reconstruction reconstruction_loss restore_within_organ pseudo_start
pseudo_margin pseudo_ignore_above patches bag_size volumes_per_step labelled_as_diseased healthy_outside centre_jitter
watch_volumes baseline_healthy organ rotation_degrees mirror_axes window
"""
"""The settings that every training ever had; a new one belongs into `NOT_YET`, not here."""

IMPOSSIBLE = [
    ({"num_epochs": 0}, "num_epochs"),
    ({"num_epochs": 2.5}, "num_epochs"),
    ({"num_epochs": "many"}, "num_epochs"),
    ({"iterations_per_epoch": None}, "iterations_per_epoch"),
    ({"seed": -1}, "seed"),
    ({"learning_rate_g": 0.0}, "learning_rate_g"),
    ({"lambda_s": 0.0}, "lambda_s"),
    ({"weight_pseudo": -0.1}, "weight_pseudo"),
    ({"pseudo_start": 1.1}, "pseudo_start"),
    ({"pseudo_margin": 0.5}, "pseudo_margin"),
    ({"pseudo_margin": 0.3, "pseudo_ignore_above": 0.25}, "pseudo_ignore_above is 0.25"),
    ({"organ": "lung"}, "organ"),
    ({"optimizer_s": "adamw"}, "optimizer_s"),
    ({"patches": "bag", "bag_size": 3}, "bag_size is 3"),
    ({"mirror_axes": [3]}, "mirror_axes"),
    ({"mirror_axes": [1, 1]}, r"mirror_axes names an axis twice: \[1, 1\]"),
    ({"paste_strength": [0.8, 0.5]}, "paste_strength must rise"),
    ({"window": [[1.0, 1.0]]}, "window must rise"),
    ({"window": [[2.0, 1.0]]}, "window must rise"),
    ({f"weight_{n}": 0 for n in ("labelled", "healthy", "mil", "pseudo", "adversarial")}, "nothing trains S"),
    ({"window": []}, "window names no channel"),
    ({"window": [[0.0, 1.0, 2.0]]}, "window"),
]


def test_the_paper_preset_has_the_numbers_of_the_paper_and_nothing_else() -> None:
    settings = load_preset("paper").settings
    assert (settings.lambda_s, settings.discriminator_steps, settings.pseudo_margin) == (100, 5, 0.3)
    assert settings.pseudo_start == 7_000 / 14_000
    assert settings.reconstruction_loss == "mse"
    weights = {name: getattr(settings, name) for name in GASNetSettings.names() if name.startswith("weight_")}
    assert weights.pop("weight_decay_s") == 0
    assert weights.pop("weight_outside") == 0
    assert weights.pop("weight_suspicion") == GASNetSettings().weight_suspicion == 0
    assert set(weights.values()) == {1.0}
    assert (settings.pasted_share, settings.paste_strength) == (0, (1, 1))
    assert (settings.pseudo_contrast, settings.averaged_iterations) == (0, 1)
    assert not settings.restore_within_organ


def test_every_setting_is_documented() -> None:
    documented = re.findall(r"^        (\w+): ", GASNetSettings.__doc__ or "", flags=re.MULTILINE)
    assert documented == list(GASNetSettings.names())


@given(SETTINGS)
def test_settings_survive_a_json_file(settings: GASNetSettings) -> None:
    text = json.dumps(settings.to_dict(), allow_nan=False)
    assert GASNetSettings.from_dict(json.loads(text)) == settings


@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE)
def test_the_impossible_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^Impossible setting in my plans: .*{message}"):
        GASNetSettings.from_dict(values, source="my plans")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", GASNetSettings.names())
def test_no_number_may_be_infinite_or_nan(name: str, value: float) -> None:
    entry: Any = [[value, 1.0]] if name == "window" else value
    with pytest.raises(UserError, match=name):
        GASNetSettings.from_dict({name: entry})


def test_an_unknown_setting_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UserError) as error:
        GASNetSettings.from_dict({"weigth_mil": 1.0}, source="configurations.3d_fullres.gasnet of GASNetPlans.json")
    message = str(error.value)
    assert "'weigth_mil' in configurations.3d_fullres.gasnet of GASNetPlans.json" in message
    assert "Did you mean 'weight_mil'?" in message
    assert all(name in message for name in GASNetSettings.names())


@pytest.mark.parametrize("values", [None, [], "num_epochs", 3])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match="my plans"):
        GASNetSettings.from_dict(values, source="my plans")


def test_a_copy_is_validated_and_leaves_the_original() -> None:
    settings = GASNetSettings()
    assert settings.replace(num_epochs=7).num_epochs == 7
    assert settings == GASNetSettings()
    with pytest.raises(UserError, match="lambda_s"):
        settings.replace(lambda_s=-1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.num_epochs = 7  # type: ignore[misc]


def test_differences_name_every_changed_setting() -> None:
    mine = GASNetSettings()
    assert mine.differences(mine) == []
    theirs = mine.replace(num_epochs=7, mirror_axes=None)
    assert mine.differences(theirs) == ["num_epochs: 100 -> 7", "mirror_axes: [2] -> None"]


@given(SETTINGS)
def test_what_json_writes_can_be_given_on_the_command_line(settings: GASNetSettings) -> None:
    words = [f"{name}={json.dumps(value)}" for name, value in settings.to_dict().items()]
    assert GASNetSettings.from_dict(parse_assignments(words)) == settings


def test_words_of_the_command_line() -> None:
    assert parse_assignments([]) == {}
    assert parse_assignments(["organ=body", "a= 1", " b =x=y"]) == {"organ": "body", "a": 1, "b": "x=y"}
    with pytest.raises(UserError, match="found 'num_epochs'"):
        parse_assignments(["num_epochs"])


def test_presets_exist() -> None:
    assert {"default", "paper", "small"} <= set(preset_names())
    assert load_preset("default").settings == GASNetSettings()


def test_every_setting_that_came_later_tells_how_it_was_before() -> None:
    assert set(GASNetSettings.names()) - set(FIRST.split()) == set(NOT_YET)
    older = GASNetSettings.of_training({"num_epochs": 7}, source="an older log")
    assert {name: getattr(older, name) for name in NOT_YET} == NOT_YET
    # What came later goes beyond the paper.
    paper = load_preset("paper").settings
    assert paper.differences(paper.replace(**NOT_YET)) == []


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_described(name: str) -> None:
    preset = load_preset(name)
    assert preset.name == name
    assert preset.description
    assert set(preset.planning) <= {"patch_size", "base_features", "max_features", "batch_size", "hu_window"}


def test_the_paper_preset_is_the_paper() -> None:
    preset = load_preset("paper")
    settings = preset.settings
    assert settings.num_epochs * settings.iterations_per_epoch == 14_000
    assert preset.planning["patch_size"] == [40, 160, 160]
    assert preset.planning["hu_window"] == [-1250, 250]
    assert preset.planning["batch_size"] == 4
    assert settings.segmentation_loss == "ce"
    assert preset.deviations


def test_an_unknown_preset_is_refused_with_the_existing_ones() -> None:
    with pytest.raises(UserError, match=r"'papers'.*default.*paper.*small"):
        load_preset("papers")


def test_a_model_depends_on_nothing_of_a_term_that_is_off() -> None:
    whole = GASNetSettings()
    assert {"pseudo_start", "learning_rate_d", "generator_features"} <= set(whole.decisive())
    baseline = GASNetSettings(baseline_healthy=True).supervised()
    assert baseline.decisive()["weight_healthy"] == 1
    for name, value in (("discriminator_steps", 9), ("pseudo_margin", 0.2), ("paste_strength", (0.1, 0.2))):
        assert whole.replace(**{name: value}).decisive() != whole.decisive()
        assert baseline.replace(**{name: value}).decisive() == baseline.decisive()
    assert whole.replace(gallery_every_epochs=7, save_every_minutes=1).decisive() == whole.decisive()
    assert baseline.replace(num_epochs=7).decisive() != baseline.decisive()
    # A setting that trains as was done before it was there is not asked for.
    assert "discriminator_gain" not in whole.replace(discriminator_gain=1.0).decisive()
