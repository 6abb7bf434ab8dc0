"""`trunkline check`: every problem at once, by file, line and remedy, and not a byte written."""

import io
import time
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from tests.client.data.preprocess.test_scale import cmapss_site
from tests.client.data.sites import fleet, write_site, write_toml
from trunkline.client.check import CheckReport, check_site, render
from trunkline.client.data import open_data

TASKS = {
    "rul": {"kind": "regression", "target": "rul", "unit": "cycles"},
    "failing": {"kind": "binary", "target": "failing", "weight": 0.5},
    "wear": {"kind": "multiclass", "target": "wear"},
}


def page(report: CheckReport, width: int = 220) -> str:
    console = Console(file=io.StringIO(), width=width)
    render(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def everything(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def worn(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(wear=pl.when(pl.col("rul") > 4).then(pl.lit("fresh")).otherwise(pl.lit("worn")))


def test_a_sound_site_is_described_and_nothing_is_written(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "press-07", worn(fleet(10, rows=12)), TASKS, regime=["c1"])
    before = everything(tmp_path)
    report = check_site(folder)
    assert report.ok
    text = page(report)
    assert everything(tmp_path) == before
    assert "press-07 is ready to train." in text
    for words in (
        "data.csv", "120", "windows of 4 rows: train 72, validation 24, test 24", "train 6, validation 2, test 2", "by group", "seed 0",
        "rul (cycles)", "0 to 11", "fresh 58.3%, worn 41.7%", "0 66.7%, 1 33.3%", "1 regime of c1", "no separate levels",
    ):  # fmt: skip
        assert words in text, (words, text)
    line = next(line for line in text.splitlines() if line.startswith("c0"))
    assert f"{pl.read_csv(folder / 'data.csv')['c0'].min():.6g}" in line


def test_every_problem_is_collected_at_once(tmp_path: Path) -> None:
    frame = (
        fleet(10).with_columns(c1=pl.lit(3.0), quiet=pl.lit(None, dtype=pl.Float64), failing=0).cast({"c0": pl.String})
    )
    frame = frame.with_columns(pl.Series("c0", ["1", "2", "broken", *frame["c0"][3:]]))
    data = {"channels": ["c0", "c1", "quiet", "cO"], "regime": ["settng"], "clean": {"valid": {"c7": [0.0, 1.0]}}}
    folder = write_site(tmp_path, frame, TASKS, **data)
    report = check_site(folder)
    assert not report.ok
    expected = {
        "names `c7`": "Channels: c0", "'broken'": "Mend", "channel `cO`": "Columns there", "regime column `settng`": "Correct",
        "target of task 'wear' `wear`": "Correct", "`c1` is constant": "Take `c1` out", "`quiet` has no value": "Take `quiet` out",
    }  # fmt: skip
    said = [str(problem) for problem in report.problems]
    for what, remedy in expected.items():
        assert [remedy in one for one in said if what in one] == [True], (what, said)
    assert len(said) == len(expected)
    assert any("data.csv, line 4:" in one for one in said)
    (aside,) = (note for note in report.notes if note.where == "task failing")
    assert "is set aside, and the others go on" in aside.what
    assert "training labels of column `failing` are '0'" in aside.what
    assert "take [tasks.failing] out" in aside.what
    text = page(report)
    assert "7 problems to mend before press-07 can train." in text
    for problem in report.problems:
        assert problem.what.split(". ")[0] in text


def test_every_mistake_in_site_toml_is_listed(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"chanels": ["c0"], "window": 0, "split": {"validation": 2.0}})
    report = check_site(folder)
    said = [str(problem) for problem in report.problems]
    assert len(said) == 3
    for words in ("`data.chanels`; did you mean 'channels'", "`data.window`", "`data.split.validation`"):
        assert sum(words in one and str(folder / "site.toml") in one for one in said) == 1
    assert "3 problems" in page(report)


@pytest.mark.parametrize("make", ["nothing", "empty", "toml"])
def test_a_folder_that_is_no_site_is_a_problem_not_a_traceback(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "site"
    if make != "nothing":
        folder.mkdir()
    if make == "toml":
        (folder / "site.toml").write_text("name = [unclosed")
    report = check_site(folder)
    assert not report.ok
    assert str(folder) in page(report)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "h5", "npz"])
def test_random_bytes_for_data_are_a_problem_not_a_traceback(tmp_path: Path, suffix: str) -> None:
    folder = write_toml(tmp_path, {"files": f"d.{suffix}"})
    for content in (
        b"",
        b"\x00" * 100,
        bytes(range(256)) * 20,
        b"PAR1" + bytes(50) + b"PAR1",
        b"PK\x03\x04" + bytes(99),
        b"\x89HDF\r\n\x1a\n" + bytes(99),
    ):
        (folder / f"d.{suffix}").write_bytes(content)
        report = check_site(folder)
        assert not report.ok, content
        assert f"d.{suffix}" in page(report)


def test_check_finds_what_open_refuses_and_nothing_else(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(2))
    assert not check_site(folder).ok
    write_site(tmp_path, fleet(3))
    assert check_site(folder).ok
    open_data(folder, folder / "state")
    report = check_site(folder, folder / "state")
    assert report.ok
    (folder / "state" / "split.json").write_text("{")
    assert not check_site(folder, folder / "state").ok
    assert check_site(folder).ok  # without the state the stored split is not looked at


def test_words_in_brackets_are_shown_as_written(tmp_path: Path) -> None:
    """`[data.split]` in a remedy is no colour of the terminal."""
    report = check_site(write_site(tmp_path, fleet(2)))
    assert "[data.split]" in page(report)


def test_a_narrow_terminal_and_a_thousand_channels_fit(tmp_path: Path) -> None:
    names = [f"c{place}" for place in range(300)]
    folder = write_site(tmp_path, fleet(4, 300), channels=names)
    text = page(check_site(folder), width=80)
    assert "240 further channels" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.realdata
def test_the_largest_turbofan_set_is_checked_in_seconds(tmp_path: Path, real_data: Path) -> None:
    folder = cmapss_site(tmp_path, real_data, 4)
    started = time.perf_counter()
    report = check_site(folder)
    text = page(report)
    assert time.perf_counter() - started < 10.0
    assert report.ok
    assert "train 199, validation 50, test 248" in text
    assert "6 regimes" in text
