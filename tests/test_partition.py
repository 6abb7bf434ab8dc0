"""Nothing leaves a site but what the run names: held by recording whole runs, message by message."""

from pathlib import Path

import numpy as np
import pytest

from tests.loopback import QUICK, arrays_in, federate, trunk_of
from trunkline.client.vault import Vault
from trunkline.config import parse_run
from trunkline.flower import open_records
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
    from trunkline.server.report import read_report

    federate(plants, tmp_path)
    rows = read_report(tmp_path)["sites"]
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
