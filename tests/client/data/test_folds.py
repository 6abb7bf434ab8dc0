"""Group k-fold: every group tests once, each fold looks like the whole, and new groups move none of the old ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.data.sites import fleet, write_site
from tests.client.data.test_read import refused
from tests.client.data.test_split import PARTS, parts_of
from trunkline.client.check import check_site
from trunkline.client.data import open_data
from trunkline.config.site import DataConfig, SplitConfig

STAGE = {"stage": {"kind": "multiclass", "target": "stage"}}


def opened(
    folder: Path, frame: pl.DataFrame, split: dict[str, Any], tasks: dict[str, Any] | None = None
) -> dict[str, str]:
    return parts_of(open_data(write_site(folder, frame, tasks, split=split), folder / "state"))


def staged(stages: list[int], rows: int = 3) -> pl.DataFrame:
    """Units of one stage each."""
    frame = fleet(len(stages), rows=rows)
    return frame.with_columns(stage=pl.Series([str(stages[int(unit[1:])]) for unit in frame["unit"]]))


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(5, 30), folds=st.integers(2, 5), seed=st.integers(0, 3))
def test_every_group_tests_in_exactly_one_fold_and_folds_are_equal(
    tmp_path_factory: pytest.TempPathFactory, groups: int, folds: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("site")
    tests: list[set[str]] = []
    for fold in range(folds):
        parts = opened(folder / str(fold), fleet(groups, rows=3), {"folds": folds, "fold": fold, "seed": seed})
        assert set(parts.values()) == set(PARTS)
        assert len(parts) == groups
        tests.append({name for name, part in parts.items() if part == "test"})
    assert sum(map(len, tests)) == len(set().union(*tests)) == groups
    assert max(map(len, tests)) - min(map(len, tests)) <= 1


@settings(max_examples=15, deadline=None)
@given(stages=st.lists(st.integers(0, 2), min_size=12, max_size=40), seed=st.integers(0, 3))
def test_every_fold_holds_each_class_alike(
    tmp_path_factory: pytest.TempPathFactory, stages: list[int], seed: int
) -> None:
    stages = [0, 0, 0, 1, 1, 1, *stages]  # two classes that can be in all three parts
    folder = tmp_path_factory.mktemp("site")
    counts = []
    for fold in range(4):
        parts = opened(folder / str(fold), staged(stages), {"folds": 4, "fold": fold, "seed": seed}, STAGE)
        tested = [stages[int(name[1:])] for name, part in parts.items() if part == "test"]
        counts.append([tested.count(stage) for stage in range(3)])
    assert np.ptp(np.array(counts), axis=0).max() <= 1


def test_a_rare_class_of_one_task_is_dealt_out_before_the_common_ones_of_another(tmp_path: Path) -> None:
    """Five leaking units among forty: every fifth holds one, whatever the seed, beside even shares of the stages."""
    frame = staged([place % 3 for place in range(40)]).with_columns(
        leak=pl.col("unit").is_in([f"u{place:03d}" for place in (3, 4, 20, 21, 38)]).cast(pl.Int64)
    )
    tasks = {**STAGE, "leak": {"kind": "binary", "target": "leak"}}
    for seed in range(4):
        for fold in range(5):
            folder = tmp_path / f"{seed}-{fold}"
            opened(folder, frame, {"folds": 5, "fold": fold, "seed": seed}, tasks)
            test = open_data(folder, folder / "state").test
            assert len(np.unique(test.groups[test.labels["leak"] == 1])) == 1
            each = [len(np.unique(test.groups[test.labels["stage"] == stage])) for stage in range(3)]
            assert min(each) >= 2


def test_two_tasks_and_runs_of_any_length_are_balanced_at_once(tmp_path: Path) -> None:
    """Every fold has its share of the rows of each class of both tasks, and the same number of groups."""
    random = np.random.default_rng(3)
    lengths = random.integers(2, 13, 83)
    stage, valve = random.integers(0, 3, 83), random.integers(0, 4, 83)
    rows = {"stage": np.repeat(stage, lengths).astype(str), "valve": np.repeat(valve, lengths).astype(str)}
    frame = fleet(lengths.tolist()).with_columns(pl.Series(name, column) for name, column in rows.items())
    tasks = {name: {"kind": "multiclass", "target": name} for name in rows}
    shares: list[list[float]] = []
    groups = []
    for fold in range(4):
        folder = tmp_path / str(fold)
        groups.append(list(opened(folder, frame, {"folds": 4, "fold": fold}, tasks).values()).count("test"))
        test = open_data(folder, folder / "state").test
        shares.append(
            [
                float((test.labels[name] == one).sum() / (rows[name] == str(one)).sum())
                for name, classes in (("stage", 3), ("valve", 4))
                for one in range(classes)
            ]
        )
    assert sorted(groups) == [20, 21, 21, 21]
    assert np.abs(np.array(shares) - 0.25).max() < 0.1  # dealt by chance, one of these is off by .2


def test_a_class_of_two_groups_is_trained_on_in_every_fold(tmp_path: Path) -> None:
    stages = [0] * 10 + [1] * 10 + [2] * 2
    for fold in range(5):
        folder = tmp_path / str(fold)
        parts = opened(folder, staged(stages), {"folds": 5, "fold": fold}, STAGE)
        assert {stages[int(name[1:])] for name, part in parts.items() if part == "train"} == {0, 1, 2}


@settings(max_examples=15, deadline=None)
@given(before=st.integers(8, 20), more=st.integers(1, 20), fold=st.integers(0, 2))
def test_appended_groups_move_no_group_and_folds_stay_a_partition(
    tmp_path_factory: pytest.TempPathFactory, before: int, more: int, fold: int
) -> None:
    folder = tmp_path_factory.mktemp("site")
    tests = []
    for one in (fold, (fold + 1) % 3):
        split = {"folds": 3, "fold": one, "validation": 0.25}
        first = opened(folder / str(one), fleet(before, rows=3), split)
        grown = opened(folder / str(one), fleet(before + more, rows=3), split)
        assert {name: grown[name] for name in first} == first
        assert len(grown) == before + more
        tests.append({name for name, part in grown.items() if part == "test"})
        assert abs(len(tests[-1]) - len(grown) / 3) < 1
        assert abs(list(grown.values()).count("validation") - 0.25 * len(grown)) <= 2
    assert not tests[0] & tests[1]


def test_another_seed_is_another_partition(tmp_path: Path) -> None:
    tests = [
        {
            name
            for name, part in opened(tmp_path / str(seed), fleet(20), {"folds": 4, "seed": seed}).items()
            if part == "test"
        }
        for seed in range(3)
    ]
    assert len({frozenset(one) for one in tests}) == 3


def test_a_site_without_folds_writes_the_split_it_always_wrote(tmp_path: Path) -> None:
    opened(tmp_path, fleet(9), {})
    assert list(json.loads((tmp_path / "state" / "split.json").read_text())) == [
        "format", "by", "seed", "validation", "test", "assignment", "until", "labelled",
    ]  # fmt: skip


@pytest.mark.parametrize("changed", [{"folds": 5, "fold": 1}, {"folds": 4, "fold": 0}, {}])
def test_a_changed_fold_keeps_the_stored_split_and_says_so(tmp_path: Path, changed: dict[str, int]) -> None:
    before = opened(tmp_path, fleet(10), {"folds": 5, "fold": 0})
    after = open_data(write_site(tmp_path, fleet(10), split=changed), tmp_path / "state")
    assert parts_of(after) == before
    said = [note for note in after.notes if "stored split is kept" in note.what]
    assert len(said) == 1
    assert "fold" in said[0].what
    assert "Delete" in said[0].remedy


def test_the_check_says_which_fold_tests(tmp_path: Path) -> None:
    opened(tmp_path, fleet(10), {"folds": 5, "fold": 3})
    split = check_site(tmp_path, tmp_path / "state").survey.split  # type: ignore[union-attr]
    assert split is not None
    assert (split.folds, split.fold) == (5, 3)


@pytest.mark.parametrize(("groups", "folds"), [(4, 5), (3, 2), (2, 2)])
def test_too_few_groups_for_the_folds_are_refused(tmp_path: Path, groups: int, folds: int) -> None:
    folder = write_site(tmp_path, fleet(groups), split={"folds": folds})
    refused(folder, f"{groups} groups", f"`folds = {folds}`", "Lower `folds`")


@pytest.mark.parametrize(
    ("content", "words"), [({"share": {"u000": 7}}, "0 to 4"), ({"fold": 5}, "0 to 4"), ({"share": []}, "damaged")]
)
def test_damaged_folds_are_refused_not_replaced(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    opened(tmp_path, fleet(10), {"folds": 5})
    path = tmp_path / "state" / "split.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    before = path.read_bytes()
    refused(tmp_path, "split.json", "damaged", words)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"folds": 5, "fold": 5}, "numbered 0 to 4"),
        ({"fold": 1}, "without `folds`"),
        ({"folds": 5, "by": "time"}, "drop one of the two"),
    ],
)
def test_folds_that_cannot_be_meant_are_refused(split: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SplitConfig.model_validate(split)


@pytest.mark.parametrize(
    ("data", "words"), [({"group": None}, "`group`"), ({"test_files": "test.csv"}, "`test_files`")]
)
def test_folds_need_groups_and_no_other_test_data(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig.model_validate({"files": "a.csv", "channels": ["x"], "group": "unit", "split": {"folds": 5}, **data})
