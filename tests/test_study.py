"""Study files: what is read, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gasnet_nnunet.cli.study import study as command
from gasnet_nnunet.errors import UserError
from gasnet_nnunet.settings import load_preset
from gasnet_nnunet.study.file import load_study, segmenter_names, study_names, trainer_names

ADDED = {
    *("weight_outside", "pseudo_contrast", "pseudo_start"),
    *("pasted_share", "paste_strength", "lesion_threshold"),
}
"""Settings in which the defaults go beyond the paper."""
WHOLE = """
dataset: 501
masks: [4, 1, 4]
settings: {num_epochs: 7, seed: 1}
arms:
  supervised: {trainer: SupervisedBaselineTrainer}
  healthy: {title: With healthy, like: supervised, settings: {baseline_healthy: true}}
  longer: {like: healthy, equal_time_with: gasnet}
  gasnet: {settings: {num_epochs: 3}}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_reads_arms_and_what_they_take_from_each_other(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, WHOLE))
    assert study.masks == (1, 4)
    longer = study.arms["longer"]
    assert (longer.trainer, longer.settings, longer.title) == (
        "SupervisedBaselineTrainer",
        {"baseline_healthy": True},
        None,
    )
    # The arm's settings win over the study's, and those over the plans'.
    base = {"num_epochs": 100, "iterations_per_epoch": 9}
    settings = study.settings_of("gasnet", base)
    assert (settings.num_epochs, settings.iterations_per_epoch, settings.seed) == (3, 9, 1)
    assert study.ordered_arms().index("longer") > study.ordered_arms().index("gasnet")


def test_what_is_written_is_read_as_the_same_study(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, WHOLE))
    assert load_study(write(tmp_path, study.dump())) == study


def test_what_an_arm_sets_back_is_written(tmp_path: Path) -> None:
    text = WHOLE + "  back: {like: longer, trainer: GASNetTrainer, equal_time_with: null, settings: {}}\n"
    study = load_study(write(tmp_path, text))
    assert study.arms["back"].equal_time_with is None
    assert study.arms["back"].trainer == "GASNetTrainer"
    assert load_study(write(tmp_path, study.dump())) == study


def test_an_edit_of_what_was_written_reaches_the_arms_that_are_like_it(tmp_path: Path) -> None:
    text = load_study(write(tmp_path, WHOLE)).dump()
    assert text.count("baseline_healthy: true") == 1
    edited = load_study(write(tmp_path, text.replace("baseline_healthy: true", "baseline_healthy: false")))
    assert edited.arms["longer"].settings == {"baseline_healthy": False}


def test_a_dataset_may_be_planned_as_a_model_was(tmp_path: Path) -> None:
    (tmp_path / "model.pth").touch()
    text = WHOLE + "plan: {init_from: model.pth}\n"
    study = load_study(write(tmp_path, text))
    assert study.plan is not None
    assert study.plan.init_from == tmp_path / "model.pth"
    with pytest.raises(UserError, match="leave out preset"):
        load_study(write(tmp_path, WHOLE + "plan: {init_from: model.pth, preset: paper}\n"))
    with pytest.raises(UserError, match=r"nothing\.pth, and there is no such file"):
        load_study(write(tmp_path, WHOLE + "plan: {init_from: nothing.pth}\n"))


def test_command_line_wins_over_the_file(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, WHOLE), {"dataset": 777, "settings": {"num_epochs": 2}})
    assert study.dataset == 777
    assert study.settings == {"num_epochs": 2, "seed": 1}


@pytest.mark.parametrize("name", study_names())
def test_studies_of_the_package_can_be_read(name: str) -> None:
    study = load_study(name, {} if name == "phantom" else {"dataset": 501})
    assert study.arms


def test_package_has_the_papers_tables() -> None:
    assert set(study_names()) >= {"paper-table-3", "paper-table-4", "paper-table-5", "paper-fig-11"}
    ablation = load_study("paper-table-5", {"dataset": 501})
    off = [sum(value == 0 for value in arm.settings.values()) for arm in ablation.arms.values()]
    assert off == [5, 4, 3, 2, 1, 0]


def test_papers_studies_have_plans_of_their_own_by_its_preset() -> None:
    for name in study_names():
        if name.startswith("paper"):
            study = load_study(name, {"dataset": 501})
            assert study.plan is not None
            assert (study.plan.preset, study.plans) == ("paper", "PaperPlans")


@pytest.mark.parametrize("name", ["one-mask", "paper-table-3", "paper-table-4"])
def test_plain_multiple_instance_learning_has_no_other_terms(name: str) -> None:
    study = load_study(name, {"dataset": 501})
    plans = load_preset("default" if study.plan is None else study.plan.preset).settings.to_dict()
    settings = study.settings_of("mil", plans).to_dict()
    on = {key for key, value in settings.items() if key.startswith("weight_") and value}
    assert on - {"weight_decay_s"} == {"weight_labelled", "weight_healthy", "weight_mil"}
    assert settings["pasted_share"] == 0
    assert settings["lesion_threshold"] == 0.5


def test_pasting_alone_learns_nothing_from_diseased_volumes() -> None:
    settings = load_study("one-mask", {"dataset": 501}).settings_of("pasting", {}).to_dict()
    on = {key for key, value in settings.items() if key.startswith("weight_") and value}
    assert on == {"weight_labelled", "weight_healthy", "weight_decay_s"}
    assert settings["pasted_share"] == 2
    assert settings["lesion_threshold"] == 0.5


def test_ablation_changes_one_thing_at_a_time() -> None:
    study = load_study("ablation", {"dataset": 501})
    settings = {key: study.settings_of(key, {}).to_dict() for key in study.arms}
    whole = settings["gasnet"]
    changed = {key: {name for name in whole if whole[name] != mine[name]} for key, mine in settings.items()}
    adversary = {"weight_adversarial", "weight_generated", "weight_diseased", "weight_reconstruction"}
    assert changed.pop("gasnet") == set()
    assert changed.pop("paper") == ADDED
    assert changed.pop("no-adversary") == adversary
    assert {name for names in changed.values() for name in names} == {
        *ADDED,
        *("averaged_iterations", "weight_mil", "weight_pseudo", "weight_suspicion"),
    }
    assert all(len(names) == 1 for names in changed.values())
    papers = load_preset("paper").settings
    assert study.settings_of("paper", papers.to_dict()) == papers


def test_volumes_of_the_study_are_those_of_the_arms_that_name_none(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(WHOLE.replace("gasnet: {", 'gasnet: {volumes: ["b_*"], '), encoding="utf-8")
    everything, some = load_study(str(file)), load_study(str(file), {"volumes": ["a_*"]})
    assert [study.volumes_of("healthy") for study in (everything, some)] == [None, ("a_*",)]
    assert [study.volumes_of("gasnet") for study in (everything, some)] == [("b_*",), ("b_*",)]


def test_command_line_narrows_the_numbers_of_masks() -> None:
    study = load_study("one-mask", {"dataset": 501, "masks": [1]})
    assert all(study.masks_of(arm) == (1,) for arm in study.arms)


def test_command_line_assigns_entries_of_the_study_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("gasnet_nnunet.study.prepare.prepare", lambda study, *_, **__: seen.append(study) or 1 / 0)
    (tmp_path / "patients.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    words = ["folds=5", "seed=3", "num_epochs=2", 'groups={"file": "patients.json", "key": "anatomy"}']
    with pytest.raises(ZeroDivisionError):
        command("one-mask", dataset="501", set_=words)
    (study,) = seen
    assert (study.folds, study.settings) == (5, {"seed": 3, "num_epochs": 2})
    assert study.groups.file == tmp_path / "patients.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: 1\narms: {}\n", "arms (line 2)"),
        ("dataset: 1\nmask: [1]\narms: {a: {}}\n", r"mask (line 2): there is no such entry. Did you mean 'masks'?"),
        (
            "dataset: 1\narms: {a: {trainr: X}}\n",
            "arms.a.trainr (line 2): there is no such entry. Did you mean 'trainer'?",
        ),
        (
            "dataset: 1\narms:\n  a:\n    trainer: GasNetTrainer\n",
            "arms.a.trainer (line 4): nnU-Net has no trainer 'GasNetTrainer'. Did you mean 'GASNetTrainer'?",
        ),
        (
            "dataset: 1\narms:\n  a: {settings: {weight_mill: 0}}\n",
            "arms.a.settings.weight_mill (line 3): there is no such setting. Did you mean 'weight_mil'?",
        ),
        ("dataset: 1\narms:\n  a: {settings: {pseudo_margin: 3}}\n", "pseudo_margin: Input should be less than 0.5"),
        ("dataset: 1\narms: {a: {like: gasnett}, gasnet: {}}\n", "there is no arm 'gasnett'. Did you mean 'gasnet'?"),
        ("dataset: 1\narms: {a: {like: b}, b: {like: a}}\n", "in a circle"),
        ("dataset: 1\narms: {a: {like: [b]}, b: {}}\n", "arms.a.like (line 2): Input should be a valid string"),
        ("dataset: 1\narms: {a: {like: b}, b: {settings: num_epochs=3}}\n", "arms.b.settings (line 2)"),
        ("dataset: 1\narms: {a: {like: b, settings: [x]}, b: {}}\n", "arms.a.settings (line 2)"),
        ("dataset: 1\narms:\n  a: {}\n  a: {}\n", "arms.a (line 4): is there twice."),
        ("dataset: 1\narms: {a: {segmenter: vnet}}\n", "Did you mean 'vbnet'?"),
        ("dataset: 1\narms: {a__b: {}}\n", "no '__'"),
        (
            "dataset: 1\narms: {a: {pseudo_labels: {}}, a-round1: {}}\n",
            "arms.a-round1 (line 2): the study itself makes files of that name",
        ),
        ("dataset: 1\narms: {a: {}, b: {init_from: a}, b-fold3: {}}\n", "arms.b-fold3 (line 2): the study itself"),
        ("dataset: 1\narms: {dataset: {}}\n", "the study itself makes files of that name"),
        (
            "dataset: 1\narms: {a: {}, b: {trainer: VanillaTrainer, init_from: a}}\n",
            "arms.b.init_from (line 2): VanillaTrainer knows no init_from and would train from scratch.",
        ),
        (
            "dataset: 1\narms: {b: {trainer: nnUNetTrainer, settings: {init_from: x.pth}}}\n",
            "nnUNetTrainer knows no init_from",
        ),
        ("dataset: 1\nmasks: [1]\narms: {a: {masks: [2]}}\n", "2 is none of the study's numbers"),
        ("dataset: 1\narms: {a: {equal_time_with: b}, b: {}}\n", "has to be `like` another one"),
        ("dataset: 1\narms: {a: {init_from: b}, b: {init_from: a}}\n", "which waits for it"),
        ("dataset: 1\nreference: b\narms: {a: {}}\n", "reference (line 2): there is no arm 'b'."),
        ("dataset: 1\narms: {a: {title: A}, b: {title: A}}\n", "more than one arm is called 'A'"),
        ("dataset: 1\nplan: {preset: pape}\narms: {a: {}}\n", "Did you mean 'paper'?"),
        ("dataset: 1\ntest: 2\nfolds: 5\narms: {a: {}}\n", "give either"),
        ("dataset: 1\nmasks: [0]\narms: {a: {}}\n", "masks"),
        ("arms: {a: {}}\n", "name a dataset"),
        ("dataset: 1\narms: [a\n", "no readable YAML"),
        ("dataset: 1\ntruth: nowhere\narms: {a: {}}\n", "there is no such folder"),
    ],
)
def test_refuses_what_cannot_be_run(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as problem:
        load_study(write(tmp_path, text))
    assert message in str(problem.value)


def test_a_mistake_of_the_command_line_is_said_to_be_one(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: 501\nmasks: [1]\nsettings: {num_epochs: 3}\narms: {a: {}}\n")
    with pytest.raises(UserError, match=r"masks \(of the command line\): Input should be a list \(found 1\)"):
        load_study(path, {"masks": 1})
    with pytest.raises(UserError, match=r"settings\.num_epoch \(of the command line\): .* Did you mean 'num_epochs'"):
        load_study(path, {"settings": {"num_epoch": 1}})


def test_settings_that_are_no_mapping_are_refused_with_those_of_the_command_line_too(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: 501\nsettings: [a]\narms: {a: {}}\n")
    with pytest.raises(UserError, match=r"settings \(line 2\): Input should be a valid dictionary"):
        load_study(path, {"settings": {"num_epochs": 1}})


def test_paths_of_the_command_line_are_found_from_where_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, WHOLE)
    (tmp_path / "here" / "lungs").mkdir(parents=True)
    for name in ("model.pth", "patients.json"):
        (tmp_path / "here" / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    changes: dict[str, Any] = {"plan": {"init_from": "model.pth"}, "groups": {"file": "patients.json"}}
    monkeypatch.chdir(tmp_path / "here")
    study = load_study(path, {**changes, "lungs": "~/lungs"})
    assert study.plan is not None
    assert study.groups is not None
    found = (study.plan.init_from, study.groups.file, study.lungs)
    assert found == tuple(tmp_path / "here" / name for name in ("model.pth", "patients.json", "lungs"))


def test_a_model_to_go_on_from_is_found_from_the_studys_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: 501\narms: {a: {settings: {init_from: model.pth}}}\n")
    with pytest.raises(UserError, match=r"init_from .*model\.pth, and there is no such file"):
        load_study(path)
    (tmp_path / "model.pth").touch()
    assert load_study(path).arms["a"].settings["init_from"] == str(tmp_path / "model.pth")


def test_nnunets_search_for_a_trainer_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with pytest.raises(UserError, match=r"no trainer 'GASNetTrainr'.*Did you mean 'GASNetTrainer'"):
        load_study(write(tmp_path, "dataset: 501\narms: {a: {trainer: GASNetTrainr}}\n"))
    assert capsys.readouterr().out == ""


def test_names_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as problem:
        load_study(write(tmp_path, "dataset: 1\narms:\n  a: {trainer: X, masks: [9]}\n  b: {settings: {y: 1}}\n"))
    assert str(problem.value).count("\n  - ") == 3


def test_a_misspelt_study_names_the_close_one() -> None:
    with pytest.raises(UserError, match="Did you mean 'one-mask'"):
        load_study("one-masks")


def test_trainers_are_found_without_importing_them() -> None:
    assert {"nnUNetTrainer", "GASNetTrainer", "VanillaTrainer", "nnUNetTrainer_250epochs"} <= set(trainer_names())
    assert "vbnet" in segmenter_names()
