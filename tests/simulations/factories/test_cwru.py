"""Bearing vibration: records are cut in time with a gap, and the gain of a recording says nothing."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from tests.windows import batch_of
from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.cwru import BANDS, FILE, FRAMES, RECORDS, STRETCH, spectra, stretches

LENGTH = 60_000


def write_raw(folder: Path, rate: int = 12_000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.int16]] = {}
    rows = []
    for damage, size in (("IR", 7), ("IR", 14), ("B", 7), ("B", 28), ("OR", 21), ("OR", 7)):
        for load in range(4):
            name = f"{damage}{size:03d}_{load}hp"
            length = LENGTH + 517 * load
            arrays[f"{name}|DE"] = np.round(random.normal(0, 900, length)).astype(np.int16)
            arrays[f"{name}|FE"] = arrays[f"{name}|DE"] + np.int16(1)
            rows.append({"record": name, "cls": damage, "size_mil": size, "load_hp": load, "fs_hz": rate})
    np.savez(folder / FILE, **arrays)
    pl.DataFrame(rows).write_csv(folder / RECORDS)
    return folder


@pytest.fixture
def bearings(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "case" / "cwru")


@pytest.mark.parametrize("length", [LENGTH, 63_788, 119_808, 121_265, 122_571, 491_446])
def test_parts_of_a_record_follow_each_other_with_a_gap_of_a_whole_sample(length: int) -> None:
    parts = stretches(length)
    assert list(parts) == ["train", "validation", "test"]
    train, validation, test = parts.values()
    for before, after in ((train, validation), (validation, test)):
        assert after[0] - (before[-1] + STRETCH) >= STRETCH
    for part in parts.values():
        assert (np.diff(part) == STRETCH).all()  # no reading in two samples
    assert test[-1] + STRETCH <= length < test[-1] + 3 * STRETCH
    assert len(train) == 3 * len(validation)  # what `validation` in site.toml cuts to the row
    assert 0.25 < len(test) / sum(map(len, parts.values())) < 0.4


def slow_spectra(stretch: NDArray[np.int16]) -> NDArray[np.float64]:
    """One band at a time, by the sum that defines a Fourier transform."""
    values = (stretch - stretch.mean()) / stretch.std()
    rows = []
    for frame in range(FRAMES):
        piece = values[128 * frame : 128 * frame + 256] * np.hanning(256)
        power = [abs(np.sum(piece * np.exp(-2j * np.pi * k * np.arange(256) / 256))) ** 2 for k in range(1, 129)]
        rows.append([np.log10(np.mean(power[4 * band : 4 * band + 4]) + 1e-6) for band in range(BANDS)])
    return np.array(rows)


def test_a_sample_is_the_spectra_of_its_stretch_in_its_part(bearings: Path, tmp_path: Path) -> None:
    site = write_sites("cwru", tmp_path / "out", data=bearings.parent)[2]
    data = open_data(site, tmp_path / "state")
    with np.load(bearings / FILE) as file:
        readings = {name.removesuffix("|DE"): file[name] for name in file.files if name.endswith("2hp|DE")}
    mean, std = data.scaler.mean[0], data.scaler.std[0]
    for part, samples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert len(samples) == sum(len(stretches(len(record))[part]) for record in readings.values())
        for code in np.unique(samples.groups):
            record, _, end = samples.group_names[code].rpartition("-")
            assert end == ("tail" if part == "test" else "head")
            own = np.flatnonzero(samples.groups == code)
            starts = stretches(len(readings[record]))[part]
            assert len(own) == len(starts)
            for place in (0, len(starts) - 1):
                start = starts[place]
                expected = (slow_spectra(readings[record][start : start + STRETCH]) - mean) / std
                assert np.allclose(batch_of(samples, own[[place]])[0].T, expected, atol=2e-3)
            words = [data.tasks[task].classes[int(samples.labels[task][own[0]])] for task in ("damage", "size")]  # type: ignore[attr-defined]
            assert record == f"{words[0]}{int(words[1]):03d}_2hp"


def test_the_gain_of_a_recording_leaves_no_trace() -> None:
    stretch = np.random.default_rng(0).integers(-800, 800, STRETCH).astype(np.int16)
    assert np.allclose(spectra(stretch), spectra(stretch * np.int16(5) + np.int16(40)), atol=1e-4)


def test_loads_are_plants_and_undamaged_bearings_are_left_out(bearings: Path, tmp_path: Path) -> None:
    sites = write_sites("cwru", tmp_path / "out", data=bearings)
    assert [site.name for site in sites] == ["load-0", "load-1", "load-2", "load-3"]
    for site in sites:
        for end in ("head", "tail"):
            table = pl.read_parquet(site / f"{end}.parquet")
            assert table["record"].str.contains(f"_{site.name[-1]}hp-{end}").all()
            assert set(table["damage"]) == {"IR", "B", "OR"}
        assert {task.metric for task in read_site(site).tasks.values()} == {"accuracy"}


def test_records_of_another_rate_absent_and_damaged_files_are_refused(bearings: Path, tmp_path: Path) -> None:
    for wish in ({"plants": 2}, {"groups": 2}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wish))} "):
            write_sites("cwru", tmp_path / "out", data=bearings, **wish)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Bearing Data Center"):
        write_sites("cwru", tmp_path / "out", data=tmp_path)
    with pytest.raises(DataError, match="B007_0hp is not sampled at 12 kHz"):
        write_sites("cwru", tmp_path / "out", data=write_raw(tmp_path / "fast", rate=48_000))
    with np.load(bearings / FILE) as file:
        np.savez(bearings / FILE, **{name: file[name] for name in file.files if not name.startswith("OR")})
    with pytest.raises(DataError, match="OR007_0hp"):
        write_sites("cwru", tmp_path / "out", data=bearings)
    with pytest.raises(DataError, match="equal readings"):
        spectra(np.zeros(STRETCH, dtype=np.int16))


@pytest.mark.realdata
def test_the_real_records_are_fifteen_a_load(real_data: Path, tmp_path: Path) -> None:
    for site in write_sites("cwru", tmp_path / "out", data=real_data):
        data = open_data(site, tmp_path / "state" / site.name)
        for part in (data.train, data.validation, data.test):
            assert len(np.unique(part.groups)) == 15
            assert set(part.labels["size"].tolist()) == {0.0, 1.0, 2.0, 3.0}
        assert min(map(len, (data.train, data.validation, data.test))) >= 150
