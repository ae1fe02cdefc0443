"""Which files of a folder are which split: the plainest names count, and none is merged unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core import ConfigError
from nested_core.data.data_settings import DataSettings
from nested_core.data.sources.split_files import open_splits


def find(folder: Path, *names: str, data: str | None = None) -> dict[str, str]:
    """The name of each split of a folder with these files."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text("prompt,completion\na,b\n")
    (folder.parent / "spool").mkdir()
    splits = open_splits(DataSettings(data or str(folder)), folder.parent / "spool")
    return {split: file.name for split, file in splits.items()}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train.csv valid.csv test.csv notes.csv", "train.csv valid.csv test.csv"),
        ("train.csv dev.csv", "train.csv dev.csv"),
        ("training.csv validation.csv testing.csv", "training.csv validation.csv testing.csv"),
        ("Train.csv VAL.csv", "Train.csv VAL.csv"),
        ("train.csv valid.csv eval.csv", "train.csv valid.csv"),
        ("train-1.csv train-2.csv eval-1.csv", "train-1.csv + train-2.csv eval-1.csv"),
        ("faq_train.csv faq_dev.csv faq-test.csv", "faq_train.csv faq_dev.csv faq-test.csv"),
        ("train_faq.csv test_faq.csv", "train_faq.csv - test_faq.csv"),
        ("a_train.csv b_train.csv a_test_2.csv", "a_train.csv + b_train.csv - a_test_2.csv"),
        ("train.csv faq_test.csv", "train.csv"),
        ("faq.csv contest.csv latest.csv", ""),
        ("faq.csv faq_test.csv", "- - faq_test.csv"),
        ("faq.csv faq-held-out.csv", "- - faq-held-out.csv"),
        ("trainset.csv evaluation.csv testset.csv", "trainset.csv evaluation.csv testset.csv"),
        ("traindata.csv testdata.csv", "traindata.csv - testdata.csv"),
        ("FAQTrain.csv FAQTest.csv Contest.csv", "FAQTrain.csv - FAQTest.csv"),
        ("train.csv held_out.csv evaluation.csv testset.csv", "train.csv"),
    ],
)
def test_files_are_the_splits_that_they_are_named_after(
    names: str, splits: str, tmp_path: Path
) -> None:
    expected = dict(
        zip(("train", "valid", "test"), splits.replace(" + ", "+").split(), strict=False)
    )
    found = find(tmp_path / "data", *names.split())
    assert found == {s: n.replace("+", " + ") for s, n in expected.items() if n != "-"}


def test_two_other_words_for_one_split_are_refused_by_name(tmp_path: Path) -> None:
    said = "dev.csv and validation.csv; each would be the valid split"
    with pytest.raises(ConfigError, match=said):
        find(tmp_path / "data", "train.csv", "dev.csv", "validation.csv")


@pytest.mark.parametrize("name", ["faq_train.csv", "faq.csv"])
def test_a_pattern_does_not_train_on_a_file_named_after_test(name: str, tmp_path: Path) -> None:
    pattern = str(tmp_path / "data" / "*.csv")
    with pytest.raises(ConfigError, match="named after different splits, and all that a pattern"):
        find(tmp_path / "data", name, "faq_test.csv", data=pattern)


def test_a_pattern_of_one_split_is_trained_on(tmp_path: Path) -> None:
    found = find(tmp_path / "data", "a.csv", "test.csv", data=str(tmp_path / "data" / "t*.csv"))
    assert found == {"train": "test.csv"}
