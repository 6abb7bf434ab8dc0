"""Nothing leaves a site but what the run names: held by recording whole runs, message by message."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.loopback import QUICK, arrays_in, federate, trunk_of
from trunkline.client.state.vault import Vault
from trunkline.config.run import parse_run
from trunkline.flower.records import open_records
from trunkline.models.trunk import first_trunk


@pytest.mark.parametrize("strategy", ["fedper", "fedrep", "fedprox", "fedadam"])
def test_a_recorded_run_carries_exactly_the_trunks_names_and_no_private_value(
    plants: list[Path], tmp_path: Path, strategy: str
) -> None:
    grid = federate(plants, tmp_path, strategy={"name": strategy})
    names = list(first_trunk(parse_run(dict(QUICK), "test").trunk, QUICK["seed"]))
    assert len(names) > 5
    trained_up = [content for kind, _, content in grid.up if kind == "train"]
    assert len(trained_up) == len(plants) * QUICK["rounds"]
    for content in trained_up:
        assert list(arrays_in(content)) == names
    for kind, _, content in grid.down + grid.up:
        if kind != "train":
            assert set(arrays_in(content)) <= set(names)
    private = _private_values(tmp_path)
    assert len(private) > 20
    for _, _, content in grid.up:
        arrays, header, metrics = open_records(content)
        flat = np.concatenate([array.ravel() for array in arrays.values()]) if arrays else np.zeros(0, np.float32)
        assert not np.isin(private, flat).any()
        for value in private[:50]:
            assert repr(float(value)) not in header
        assert not np.isin(private, np.array(list(metrics.values()), np.float32)).any()


def _private_values(out: Path) -> np.ndarray:
    """Trained weights of stems and heads as the vaults hold them, without the values that anybody could guess."""
    values = []
    for run in (out / "state").glob("*/vault/*"):
        entry = Vault(run.parent.parent, run.name).before(10**6)
        assert entry is not None
        assert not any(name.startswith("trunk") for name in entry.private)
        values += [array.ravel() for array in entry.private.values()]
    flat = np.concatenate(values).astype(np.float32)
    return flat[(flat != 0) & (flat != 1) & (np.abs(flat) > 1e-6)]


def test_sites_with_other_sensors_tasks_and_metrics_train_in_one_run(plants: list[Path], tmp_path: Path) -> None:
    """Any mix (design invariant 4): the four plants share neither sensor counts nor tasks."""
    from trunkline.server.reporting.report import read_report

    federate(plants, tmp_path, page=True)
    rows = read_report(tmp_path)["sites"]
    drawn = (tmp_path / "report.html").read_text()
    assert all(row["site"] in drawn and row["task"] in drawn for row in rows)
    by_site = {site: {row["task"] for row in rows if row["site"] == site} for site in {row["site"] for row in rows}}
    assert len(by_site) == 4
    assert len({frozenset(tasks) for tasks in by_site.values()}) >= 3
    assert len({row["kind"] for row in rows}) == 3


def test_a_lent_head_is_averaged_over_the_sites_that_have_it(plants: list[Path], tmp_path: Path) -> None:
    grid = federate(plants, tmp_path, lend=["trunk", "head.rul"])
    with_head = {node for kind, node, content in grid.up if kind == "train" and "head.rul.weight" in arrays_in(content)}
    without = {
        node for kind, node, content in grid.up if kind == "train" and "head.rul.weight" not in arrays_in(content)
    }
    assert with_head
    assert without
    assert not with_head & without
    assert "head.rul.weight" in trunk_of(tmp_path)
    assert not any(name.startswith("stem") for name in trunk_of(tmp_path))


def test_a_sites_own_policy_wins_over_the_run(plants: list[Path], tmp_path: Path) -> None:
    import shutil

    from tests.loopback import events_of

    folders = [Path(shutil.copytree(folder, tmp_path / "sites" / folder.name)) for folder in plants]
    config = folders[0] / "site.toml"
    config.write_text(config.read_text() + '\n[policy]\nlend = ["trunk"]\n')
    grid = federate(folders, tmp_path / "out", lend=["trunk", "head.rul"])
    assert not [content for kind, node, content in grid.up if node == 2]
    notes = [event["text"] for event in events_of(tmp_path / "out") if event["event"] == "note"]
    assert any("policy" in text and "head.rul" in text for text in notes)


def test_sites_whose_stems_cannot_be_averaged_are_told_so_at_once(plants: list[Path], tmp_path: Path) -> None:
    from trunkline.errors import QuorumError

    with pytest.raises(QuorumError, match=r"1 of 4 sites have joined.*has shape.*lend the trunk only"):
        federate(plants, tmp_path, strategy={"name": "fedavg"}, cohort={"min_sites": 4, "gather_s": 60.0})


def test_a_lent_head_tells_nobody_how_often_its_labels_are_positive(tmp_path: Path) -> None:
    """What leaves a plant before any round: heads that are lent start alike, however rare an alarm is at home."""
    shares = {"mill-1": (0.5, 0.1), "mill-2": (0.9, 0.3), "mill-3": (0.05, 0.6)}
    folders = [_alarm_site(tmp_path / "sites" / name, share) for name, share in shares.items()]
    settings = {"rounds": 1, "trunk": {"backbone": "mlp", "width": 8}, "training": {"steps": 1, "batch_size": 32}}
    grid = federate(folders, tmp_path / "lent", **settings, lend=["trunk", "head.alarms"], report={"baseline": True})
    offered = [arrays_in(content) for kind, _, content in grid.up if kind == "query"]
    assert len(offered) == len(shares)
    assert set(offered[0]) == {"head.alarms.weight", "head.alarms.bias"}
    for arrays in offered[1:]:
        assert {name: array.tobytes() for name, array in arrays.items()} == {
            name: array.tobytes() for name, array in offered[0].items()
        }
    federate(folders, tmp_path / "home", **settings, lend=["trunk"])
    at_home = {}
    for folder, share in zip(folders, shares.values(), strict=True):  # one step of training moves little
        shelf = tmp_path / "home" / "state" / folder.name
        entry = Vault(shelf, next((shelf / "vault").iterdir()).name).before(10**6)
        assert entry is not None
        at_home[folder.name] = entry.private["head.alarms.bias"]
        assert np.sign(at_home[folder.name][0] - at_home[folder.name][1]) == np.sign(share[0] - share[1])
        twin = Path(tmp_path / "lent" / "state" / folder.name)
        alone = Vault(twin, next((twin / "vault").iterdir()).name).before(10**6)
        assert alone is not None  # the twin lends nothing, so it may know its labels from the start
        np.testing.assert_allclose(alone.local["head.alarms.bias"], at_home[folder.name], atol=0.02)
    assert np.ptp(np.stack(list(at_home.values())), axis=0).min() > 1.0


def _alarm_site(folder: Path, share: tuple[float, float]) -> Path:
    """Rows of three sensors, and two alarms that ring in such shares of them."""
    rng = np.random.default_rng(len(folder.name))
    rows = 200
    folder.mkdir(parents=True)
    columns = {f"x{column}": rng.normal(size=rows) for column in range(3)}
    rings = {f"a{place}": (rng.uniform(size=rows) < part).astype(int) for place, part in enumerate(share)}
    pl.DataFrame({**columns, **rings}).write_parquet(folder / "log.parquet")
    (folder / "site.toml").write_text(
        f'name = "{folder.name}"\n[data]\nfiles = "log.parquet"\nchannels = ["x0", "x1", "x2"]\n'
        '[policy]\nlend = ["trunk", "heads"]\n'
        '[tasks.alarms]\nkind = "multilabel"\ntargets = ["a0", "a1"]\nclass_weights = "none"\n'
    )
    return folder
