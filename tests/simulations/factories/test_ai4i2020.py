"""AI4I 2020: the rules that break the machine, blocks that keep its random walk together, and no answer among the inputs."""

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.ai4i2020 import BLOCK, CHANNELS, FILE, MODES, QUALITIES, SENSORS

OVERSTRAIN = {"L": 11_000, "M": 12_000, "H": 13_000}  # min Nm, by quality (Matzka 2020)


def published(rows: int = 1500) -> pl.DataFrame:
    """A tiny machine with UCI's columns: temperatures walk, qualities are drawn."""
    rng = np.random.default_rng(0)
    air = 300.0 + np.cumsum(rng.normal(0.0, 0.1, rows))
    quality = rng.choice(QUALITIES, rows, p=[0.6, 0.3, 0.1])
    modes = {name: (rng.random(rows) < 0.05).astype(int) for name in (*MODES, "RNF")}
    return pl.DataFrame(
        {
            "UDI": np.arange(1, rows + 1),
            "Product ID": [f"{one}{place + 10_000}" for place, one in enumerate(quality)],
            "Type": quality,
            "Air temperature [K]": air,
            "Process temperature [K]": air + rng.normal(10.0, 0.5, rows),
            "Rotational speed [rpm]": rng.integers(1200, 2800, rows),
            "Torque [Nm]": rng.normal(40.0, 10.0, rows),
            "Tool wear [min]": np.arange(rows) % 220,
            "Machine failure": np.maximum.reduce([modes[name] for name in MODES]),
            **modes,
        }
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "uci"
    folder.mkdir()
    (folder / FILE).write_bytes(b"\xef\xbb\xbf" + published().write_csv(line_terminator="\r\n").encode())  # as UCI does
    return folder


def test_no_label_and_no_name_is_an_input(source: Path, tmp_path: Path) -> None:
    for site in write_sites("ai4i2020", tmp_path / "out", data=source):
        config = read_site(site)
        assert config.data.channels == CHANNELS
        assert not config.data.categorical
        held = set(pl.read_parquet_schema(site / "parts.parquet"))
        assert held == {*CHANNELS, "block", "row", "failure", *MODES}  # no UDI, no product, no RNF


@pytest.mark.parametrize("flag", ["HDF", "failure"])
def test_who_adds_a_flag_to_the_inputs_is_refused(source: Path, tmp_path: Path, flag: str) -> None:
    site = write_sites("ai4i2020", tmp_path / "out", data=source)[0]
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(text.replace('channels = ["air_k"', f'channels = ["{flag}", "air_k"'))
    with pytest.raises(ConfigError, match=f"`{flag}` is the target of task"):
        read_site(site)


def test_the_physics_of_every_row_equals_the_slow_oracle(source: Path, tmp_path: Path) -> None:
    raw = published()
    for site, quality in zip(write_sites("ai4i2020", tmp_path / "out", data=source), QUALITIES, strict=True):
        for row in pl.read_parquet(site / "parts.parquet").iter_rows(named=True):
            there = raw.row(row["row"], named=True)
            assert there["Type"] == quality
            assert row["block"] == f"block-{row['row'] // BLOCK:03d}"
            assert all(row[short] == pytest.approx(there[name]) for name, short in SENSORS.items())
            air, hot = there["Air temperature [K]"], there["Process temperature [K]"]
            assert row["excess_k"] == pytest.approx(hot - air)
            assert row["power_w"] == pytest.approx(
                there["Torque [Nm]"] * there["Rotational speed [rpm]"] / 60.0 * 2.0 * math.pi
            )
            assert row["strain_min_nm"] == pytest.approx(there["Tool wear [min]"] * there["Torque [Nm]"])
            assert row["failure"] == there["Machine failure"]


def test_every_part_is_at_exactly_one_plant(source: Path, tmp_path: Path) -> None:
    sites = write_sites("ai4i2020", tmp_path / "out", data=source)
    rows = [row for site in sites for row in pl.read_parquet(site / "parts.parquet")["row"]]
    assert sorted(rows) == list(range(1500))


def test_another_version_of_the_table_is_refused_by_its_column(source: Path, tmp_path: Path) -> None:
    published().rename({"Machine failure": "Target"}).write_csv(source / FILE)
    with pytest.raises(DataError, match="Machine failure"):
        write_sites("ai4i2020", tmp_path / "out", data=source)


@pytest.mark.realdata
def test_the_real_machine_breaks_by_the_published_rules_of_these_inputs(real_data: Path, tmp_path: Path) -> None:
    for site, quality in zip(write_sites("ai4i2020", tmp_path / "out", data=real_data), QUALITIES, strict=True):
        rows = pl.read_parquet(site / "parts.parquet")
        heat = (rows["excess_k"] < 8.6) & (rows["speed_rpm"] < 1380)
        power = (rows["power_w"] < 3500) | (rows["power_w"] > 9000)
        strain = rows["strain_min_nm"] > OVERSTRAIN[quality]
        for mode, rule in (("HDF", heat), ("PWF", power), ("OSF", strain)):
            assert (rows[mode] == rule.cast(pl.Int64)).all(), mode


@pytest.mark.realdata
def test_rows_side_by_side_are_nearly_alike_so_they_stay_on_one_side(real_data: Path, tmp_path: Path) -> None:
    from trunkline.client.data import open_data

    site = write_sites("ai4i2020", tmp_path / "out", data=real_data)[0]
    table = pl.read_parquet(site / "parts.parquet").sort("row")
    air = table["air_k"].to_numpy()
    assert np.abs(np.diff(air)).mean() < 0.1 * air.std()  # the walk: what a split of single rows would leak
    opened = open_data(site, tmp_path / "state")
    part = {}
    for name, rows in (("train", opened.train), ("validation", opened.validation), ("test", opened.test)):
        part |= {rows.group_names[code]: name for code in np.unique(rows.groups)}
    sides = np.array([part[block] for block in table["block"]])
    torn = float((sides[1:] != sides[:-1]).mean())
    by_row = np.random.default_rng(0).permutation(sides)  # the same shares, row by row
    assert torn < 0.02
    assert float((by_row[1:] != by_row[:-1]).mean()) > 0.4
