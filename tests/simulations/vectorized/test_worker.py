"""Many small sites at once: stacks on workers, one sum back; beside the same run with every site alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.loopback import events_of, federate, trunk_of
from tests.simulations.vectorized.test_sites import WORN, write
from trunkline.config.run import parse_run
from trunkline.protocol.arrays import Arrays
from trunkline.server.reporting.report import read_report
from trunkline.simulations.simulate import simulate
from trunkline.simulations.vectorized.worker import FEWEST, SWITCH, VectorizedWorker

pytestmark = [
    pytest.mark.xdist_group("vectorized"),  # one worker: the reference is made once
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # files that Ray leaves open
]
SITES = 2 * FEWEST + 2
RUN: dict[str, Any] = {
    "name": "vectorized", "rounds": 4, "seed": 5, "lend": ["trunk"],
    "trunk": {"backbone": "mlp", "width": 64, "dropout": 0.1},
    "training": {"steps": 2, "batch_size": 32, "learning_rate": 0.002},
    "strategy": {"name": "fedper"}, "report": {"baseline": True}, "cohort": {"min_sites": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Alike but for their rows; the last one has a task that no other has, and so nobody to be stacked with."""
    root = tmp_path_factory.mktemp("many")
    made = [write(root, place, window="", more="", rows=6) for place in range(SITES - 1)]
    return sorted([*made, write(root, SITES, window="", more=WORN, rows=6)])


@pytest.fixture(scope="module")
def alone(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    federate(folders, out, **RUN)  # a loopback grid asks every site by a message of its own
    return out


def near(one: Arrays, other: Arrays) -> float:
    """How far apart two trunks are, in lengths of what four rounds moved, roughly."""
    flat = [np.concatenate([array.ravel() for array in arrays.values()]) for arrays in (one, other)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_in_stacks_the_run_is_the_same_but_for_rounding(
    folders: list[Path], tmp_path: Path, alone: Path, workers: int
) -> None:
    report = simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=workers)
    assert near(trunk_of(alone), trunk_of(tmp_path)) < 2e-3
    plain = read_report(alone)
    for mine, theirs in zip(report["rounds"], plain["rounds"], strict=True):
        assert mine["sites"] == theirs["sites"] and len(mine["sites"]) == SITES and not mine["refused"]
        assert (mine["bytes_up"], mine["bytes_down"]) == (theirs["bytes_up"], theirs["bytes_down"])
        assert mine["curves"].keys() == theirs["curves"].keys()
        assert mine["curves"].keys() and all(
            mine["curves"][one].keys() == theirs["curves"][one].keys() for one in mine["curves"]
        )
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=5e-3)
    assert [(row["site"], row["task"]) for row in report["sites"]] == [
        (row["site"], row["task"]) for row in plain["sites"]
    ]
    for mine, theirs in zip(report["sites"], plain["sites"], strict=True):
        for who in ("local", "federated"):
            assert mine[who] == pytest.approx(theirs[who], rel=0.02), (mine["site"], who)


@pytest.mark.slow
def test_most_sites_go_in_stacks_and_the_odd_one_by_message(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked: list[int] = []
    singly: list[str] = []
    answer, train = VectorizedWorker.answer, "trunkline.client.app.answer_train"

    def watched(self: VectorizedWorker, order: Any, arrays: Any, nodes: Any) -> Any:
        stacked.append(len(nodes))
        return answer(self, order, arrays, nodes)

    from trunkline.client.handlers import answer_train

    def message(site: Any, order: Any, arrays: Any) -> Any:
        singly.append(site.name)
        return answer_train(site, order, arrays)

    monkeypatch.setattr(VectorizedWorker, "answer", watched)
    monkeypatch.setattr(train, message)
    simulate(parse_run(dict(RUN), "test"), folders, tmp_path / "stacks", workers=0)
    assert stacked == [SITES - 1] * 4
    assert singly == [f"plant-{SITES}"] * 4
    stacked.clear()
    monkeypatch.setenv(SWITCH, "0")
    simulate(parse_run(dict(RUN), "test"), folders, tmp_path / "singly", workers=0)
    assert not stacked
    monkeypatch.delenv(SWITCH)
    robust = {**RUN, "strategy": {"name": "median"}}
    simulate(parse_run(robust, "test"), folders, tmp_path / "median", workers=0)
    assert not stacked  # a median needs every update by itself


def test_without_stacks_it_is_the_run_of_a_loopback_to_the_byte(
    folders: list[Path], tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=0)
    assert trunk_of(tmp_path).digest() == trunk_of(alone).digest()


@pytest.mark.slow
def test_a_worker_that_dies_takes_the_run_back_to_its_checkpoint(
    folders: list[Path], tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.simulations.vectorized.driver import VectorizedDriver

    killed: list[int] = []
    answer = VectorizedDriver.answer

    def deadly(self: VectorizedDriver, order: Any, arrays: Any, nodes: Any) -> Any:
        if order.round == 3 and not killed:  # before it can answer, and with what two rounds have taught its sites
            import ray

            killed.append(1)
            ray.kill(next(iter(self.actor_of.values())), no_restart=True)
        yield from answer(self, order, arrays, nodes)

    monkeypatch.setattr(VectorizedDriver, "answer", deadly)
    report = simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=2)
    told = [one["text"] for one in events_of(tmp_path) if one["event"] == "note"]
    assert killed
    (back,) = [text for text in told if "Going back to round" in text]
    assert "Round 3" in back and "worker" in back and "died" in back and "out of memory" in back
    assert [one["round"] for one in report["rounds"]] == [1, 2, 3, 4]
    assert all(len(one["sites"]) == SITES for one in report["rounds"])
    assert near(trunk_of(alone), trunk_of(tmp_path)) < 2e-3


def test_a_diverging_site_costs_the_round_one_site(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.simulations.vectorized.sites import VectorizedSites

    def poisoned(
        self: VectorizedSites, places: list[int], order: Any, arrays: Any, whole: Any = VectorizedSites._answer_stack
    ) -> Any:
        stack = whole(self, places, order, arrays)
        if order.round == 2 and "plant-3" in stack.names:
            for rows in stack.changes.values():
                rows[stack.names.index("plant-3")] = np.nan
        return stack

    monkeypatch.setattr(VectorizedSites, "_answer_stack", poisoned)
    report = simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=0)
    (refusal,) = report["rounds"][1]["refused"]
    assert refusal["site"] == "plant-3" and "NaN" in refusal["cause"] and "round 2" in refusal["cause"]
    assert "plant-3" not in report["rounds"][1]["sites"] and "plant-3" in report["rounds"][2]["sites"]
    assert all(np.isfinite(array).all() for array in trunk_of(tmp_path).values())


def test_a_round_asks_the_share_that_was_drawn_for_it(folders: list[Path], tmp_path: Path) -> None:
    settings = {**RUN, "cohort": {"min_sites": 1, "share": 0.3}}
    asked: list[list[list[str]]] = []
    for name in ("one", "other"):
        report = simulate(parse_run(dict(settings), "test"), folders, tmp_path / name, workers=0)
        asked.append([one["sites"] for one in report["rounds"]])
    assert asked[0] == asked[1]
    assert {len(sites) for sites in asked[0]} == {-(-SITES * 3 // 10)}
    assert len({tuple(sites) for sites in asked[0]}) > 1


def test_stopped_and_resumed_it_ends_where_it_would_have(
    folders: list[Path], tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints come with the vaults of all sites, so a resumed run goes on from one moment."""
    monkeypatch.setattr("trunkline.server.rounds.run.CHECKPOINT_S", 0.0)

    class Stop(BaseException):
        pass

    answer = VectorizedWorker.answer

    def stopped(self: VectorizedWorker, order: Any, arrays: Any, nodes: Any) -> Any:
        if order.round == 3:
            raise Stop
        return answer(self, order, arrays, nodes)

    with monkeypatch.context() as patch:
        patch.setattr(VectorizedWorker, "answer", stopped)
        with pytest.raises(Stop):
            simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=0)
    report = simulate(parse_run(dict(RUN), "test"), folders, tmp_path, workers=0, resume=True)
    assert len(report["rounds"]) == 4
    assert near(trunk_of(alone), trunk_of(tmp_path)) < 2e-3
    assert os.environ.get(SWITCH) != "0"
