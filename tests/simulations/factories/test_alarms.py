"""Alarms: the true order of the publisher's windows, and no window that trains on what it validates on."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.alarms import (
    CODES,
    DAYS,
    FILE,
    GAP,
    NOTHING,
    ODDS,
    ONE,
    RARE,
    SEAM,
    UNKNOWN,
    USUAL,
    WEEKS,
    history,
    inputs_of,
    times,
)

pytestmark = pytest.mark.xdist_group("alarms")  # one worker: the windows are cut once

WINDOW, AHEAD, HOUR, WIDTH = 1720, 480, 60, 109  # minutes, minutes, minutes, codes a window holds at most


def log(days: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Minutes and codes of one machine: busy and quiet spells, a few codes that ring often."""
    rng = np.random.default_rng(seed)
    minute = np.cumsum(rng.exponential(60.0, days * 24) * rng.choice([0.5, 1.0, 3.0], days * 24))
    minute = minute[minute < days * 1440]
    often = rng.choice(CODES, 30, replace=False)
    return minute, rng.choice(often, len(minute), p=rng.dirichlet(np.ones(30)))


def cut(days: int, seed: int, drop: float = 0.05) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """As the publisher did: pass after pass, each an hour later; some windows left out. Codes, packed codes to come, start."""
    minute, code = log(days, seed)
    rng = np.random.default_rng(seed + 1000)
    x, y, start = [], [], []
    for offset in range(0, WINDOW, HOUR):
        for begin in np.arange(offset, days * 1440 - WINDOW - AHEAD, WINDOW):
            inside = code[(minute >= begin) & (minute < begin + WINDOW)]
            after = code[(minute >= begin + WINDOW) & (minute < begin + WINDOW + AHEAD)]
            if not len(inside) or rng.random() < drop:
                continue
            row = np.zeros(WIDTH, dtype=np.uint8)
            row[: len(inside[-WIDTH:])] = inside[-WIDTH:]
            bits = np.zeros(160, dtype=np.uint8)
            bits[after] = 1
            x, y, start = [*x, row], [*y, np.packbits(bits)], [*start, float(begin)]
    return np.array(x), np.array(y), np.array(start)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty machines as one npz: most with half a year, machine 4 with a few days."""
    folder = tmp_path_factory.mktemp("ieee") / "packaging_alarms"
    folder.mkdir()
    arrays = {}
    for part, seed in (("train", 0), ("test", 500)):
        tables = [cut(5 if machine == 4 else 40, seed + machine) for machine in range(20)]
        arrays[f"x_{part}"] = np.concatenate([x for x, _, _ in tables])
        arrays[f"y_multilabel_{part}"] = np.concatenate([y for _, y, _ in tables])
        arrays[f"stratify_{part}"] = np.repeat(np.arange(20), [len(x) for x, _, _ in tables]).astype(np.int16)
    np.savez_compressed(folder / FILE, **arrays)
    return folder


@pytest.fixture(scope="module")
def sites(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sites("alarms", tmp_path_factory.mktemp("out"), data=source.parent)


@pytest.mark.parametrize("seed", range(4))
def test_the_true_order_is_found_whatever_was_left_out(seed: int) -> None:
    x, _, start = cut(120, seed, drop=0.05 * seed)
    found, true = (np.argsort(np.argsort(one, kind="stable")) for one in (times(x), start))
    far = np.abs(found - true) > 0.05 * len(x)
    assert far.mean() < 0.02  # rows at the very ends, which share nothing with others
    assert np.corrcoef(found[~far], true[~far])[0, 1] > 0.999
    # the rows as they come are in no order of time at all
    assert abs(np.corrcoef(np.arange(len(x)), start)[0, 1]) < 0.4


def test_no_training_window_reaches_into_validation(sites: list[Path]) -> None:
    for machine, site in enumerate(sites):
        if machine == 4:  # five days: said in its site.toml
            continue
        train, validation = (begins(site, machine, part) for part in ("train", "validation"))
        assert reached(train, validation) < 0.06  # rows at the very ends, as above
        x, _, start = cut(40, machine)
        naive = int(0.85 * len(x))
        assert reached(start[:naive], start[naive:]) > 0.95  # what the last 15 % of the file would do


def reached(train: NDArray[np.float64], validation: NDArray[np.float64]) -> float:
    """Share of validation windows that see minutes which a training window sees or predicts."""
    apart = validation[:, None] - train
    return float(((apart > -WINDOW - AHEAD) & (apart < WINDOW + AHEAD)).any(axis=1).mean())


def begins(site: Path, machine: int, part: str) -> NDArray[np.float64]:
    """True minutes at which the windows of one part began, found again by their contents."""
    rows = pl.read_parquet(site / "train.parquet")
    share = read_site(site).data.split.validation
    kept = round((1.0 - share) * len(rows))
    rows = rows.sort("order").head(kept) if part == "train" else rows.sort("order").tail(len(rows) - kept)
    x, _, start = cut(5 if machine == 4 else 40, machine)
    inputs = inputs_of(x).to_numpy()
    known = {row.tobytes(): at for row, at in zip(inputs, start, strict=True)}
    wanted = rows.select(inputs_of(x).columns).to_numpy()
    return np.array([known[row.tobytes()] for row in np.ascontiguousarray(wanted)])


def test_all_machines_have_the_same_inputs_and_targets_in_one_order(sites: list[Path], tmp_path: Path) -> None:
    shapes = set()
    for site in sites:
        data, task = read_site(site).data, read_site(site).tasks["alarms"]
        assert (data.scale, data.clean.constant, data.group) == ("none", "keep", "group")
        shapes.add((data.channels, task.targets))
    assert len(shapes) == 1
    channels, targets = shapes.pop()
    assert (len(channels), len(targets)) == (612, 153)
    for site in (sites[3], sites[7]):
        one = open_data(site, tmp_path / site.name)
        raw = pl.read_parquet(site / "train.parquet").sort("order").select(channels).to_numpy()
        assert np.array_equal(
            one.train.values, raw[: len(one.train.values)]
        )  # as they are: comparable between machines


def test_every_published_test_window_is_scored_at_its_machine(source: Path, sites: list[Path]) -> None:
    with np.load(source / FILE) as file:
        bits, machine = np.unpackbits(file["y_multilabel_test"], axis=1), file["stratify_test"]
    for number, site in enumerate(sites):
        test = pl.read_parquet(site / "test.parquet")
        own = bits[machine == number][:, 1:154]
        assert len(test) == len(own)
        found = test.select(read_site(site).tasks["alarms"].targets).to_numpy()
        assert sorted(row.tobytes() for row in found.astype(np.uint8)) == sorted(row.tobytes() for row in own.copy())


def test_machine_4_is_used_as_far_as_it_goes(sites: list[Path], tmp_path: Path) -> None:
    opened = open_data(sites[4], tmp_path)
    assert len(opened.train) > 0
    assert len(opened.validation) > 0


@given(st.lists(st.lists(st.sampled_from(CODES), max_size=12), min_size=1, max_size=5))
@settings(max_examples=50)
def test_counts_and_recency_equal_the_slow_oracle(windows: list[list[int]]) -> None:
    x = np.zeros((len(windows), 12), dtype=np.uint8)
    for row, codes in enumerate(windows):
        x[row, : len(codes)] = codes
    table = inputs_of(x)
    for row, codes in enumerate(windows):
        for code in CODES:
            ago = codes[::-1].index(code) if code in codes else None
            assert table[f"n{code:03d}"][row] == pytest.approx(np.log(1 + codes.count(code)))
            assert table[f"r{code:03d}"][row] == pytest.approx(0.0 if ago is None else 1.0 / (1.0 + ago))


def machine_log(rows: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Windows of a few codes, and when each began."""
    draw = np.random.default_rng(seed)
    x = np.zeros((rows, 6), dtype=np.uint8)
    for row in x:
        codes = draw.choice(CODES[:8], draw.integers(0, 6))
        row[: len(codes)] = codes
    return x, np.concatenate([[0.0], np.sort(draw.uniform(0, rows / 4, rows - 1))]) if rows else np.zeros(0)


def log_odds(rate: float) -> float:
    rate = min(max(rate, RARE), 1.0 - RARE)
    return float(np.log(rate / (1.0 - rate)) / ODDS)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_log_of_the_past_equals_the_slow_oracle(before: int, rows: int, seed: int) -> None:
    """A part that follows another: the weeks go on from where the first ended, but for its last days."""
    old, old_when = machine_log(before, seed)
    x, when = machine_log(rows, seed + 1)
    _, past = history(old, old_when, NOTHING)
    table, _ = history(x, when, past)
    known = [
        (one, at - old_when[-1] + SEAM) for one, at in zip(old, old_when, strict=True) if at <= old_when[-1] - SEAM
    ]
    for row, now in enumerate(when):
        ended = [(one, now - 1.0 - at) for one, at in zip(x[:row], when[:row], strict=True) if at <= now - 1.0]
        weeks = [(one, np.exp(-ago / WEEKS)) for one, ago in ended]
        weeks += [(one, np.exp((at - now) / WEEKS)) for one, at in known]
        days = [(one, np.exp(-ago / DAYS)) for one, ago in ended]
        for code in CODES[:9]:
            usual = (sum(w for one, w in weeks if code in one) + ONE * UNKNOWN) / (sum(w for _, w in weeks) + ONE)
            lately = (sum(w for one, w in days if code in one) + USUAL * usual) / (sum(w for _, w in days) + USUAL)
            assert table[f"w{code:03d}"][row] == pytest.approx(log_odds(usual), abs=1e-5)
            assert table[f"d{code:03d}"][row] == pytest.approx(log_odds(lately), abs=1e-5)


@given(st.integers(2, 40), st.integers(0, 1000), st.data())
@settings(max_examples=30, deadline=None)
def test_the_log_of_the_past_knows_nothing_of_what_comes(rows: int, seed: int, data: st.DataObject) -> None:
    x, when = machine_log(rows, seed)
    row = data.draw(st.integers(0, rows - 1))
    other = x.copy()
    other[when > when[row] - 1.0] = 7  # the window itself, all that overlap it, and all that follow
    mine, theirs = (history(one, when)[0][row] for one in (x, other))
    assert mine.equals(theirs)


def test_every_code_has_its_own_channels_among_the_skip_channels(sites: list[Path]) -> None:
    config = read_site(sites[0])
    task = config.tasks["alarms"]
    assert len(task.skip_channels) == 4
    for names in task.skip_channels:
        assert [name[1:] for name in names] == [name[1:] for name in task.targets]
    assert sorted(name for names in task.skip_channels for name in names) == sorted(config.data.channels)


def test_a_damaged_file_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((source / FILE).read_bytes()[:2000])
    with pytest.raises(DataError, match=FILE):
        write_sites("alarms", tmp_path / "out", data=tmp_path)


def shared(one: NDArray[np.uint8], other: NDArray[np.uint8], least: int = 12) -> float:
    """Share of the windows of `other` whose alarms end or begin with `least` or more that a window of `one` begins or ends with."""
    hit = np.zeros(len(other), dtype=bool)
    for ends, starts, of_other in ((one, other, False), (other, one, True)):
        begins_with: dict[bytes, list[int]] = {}
        for place, row in enumerate(starts):
            begins_with.setdefault(row[:least].tobytes(), []).append(place)
        for place, row in enumerate(ends):
            length = int((row > 0).sum())
            for at in range(length - least + 1):
                for match in begins_with.get(row[at : at + least].tobytes(), ()):
                    if np.array_equal(row[at:length], starts[match][: length - at]):
                        hit[place if of_other else match] = True
    return float(hit.mean())


@pytest.mark.realdata
def test_on_the_real_machines_the_order_of_the_file_leaks_and_the_order_of_time_does_not(real_data: Path) -> None:
    with np.load(real_data / "packaging_alarms" / FILE) as file:
        x, machine = file["x_train"], file["stratify_train"]
    for number, naive, honest in ((5, 0.9, 0.05), (8, 0.5, 0.05)):
        own = x[machine == number]
        when = times(own)
        first = np.quantile(when, 0.85)
        assert shared(own[: int(0.85 * len(own))], own[int(0.85 * len(own)) :]) > naive
        assert shared(own[when < first - GAP], own[when >= first]) < honest


@pytest.mark.realdata
def test_the_real_machines_are_written_whole(real_data: Path, tmp_path: Path) -> None:
    sites = write_sites("alarms", tmp_path / "out", data=real_data)
    rows = [
        [pl.scan_parquet(site / f"{part}.parquet").select(pl.len()).collect().item() for part in ("train", "test")]
        for site in sites
    ]
    assert sum(test for _, test in rows) == 17_955
    assert 0.95 * 41_045 < sum(train for train, _ in rows) < 41_045  # what is missing was left out before validation
    opened = open_data(sites[11], tmp_path / "state")
    assert len(opened.channels) == 612
