"""`refit`: settle by validation rows, then the same rounds again on all labelled rows. Through the real apps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from tests.loopback import WatchedGrid, events_of, federate, trunk_of
from trunkline.client.site import open_site
from trunkline.client.state.vault import Vault
from trunkline.flower.records import open_records
from trunkline.server.reporting.report import read_report

pytestmark = pytest.mark.xdist_group("refit")  # one worker: the undisturbed run is made once
SETTINGS: dict[str, Any] = {"refit": True, "report": {"baseline": True}}
TWICE = 6  # rounds in all: three, and three again


class PowerCut(BaseException):
    """Not an Exception, so that nothing in the code under test can catch it."""


def header_of(message: Message) -> dict[str, Any]:
    return dict(json.loads(open_records(message.content)[1]))


@pytest.fixture(scope="module")
def whole(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[WatchedGrid, Path]:
    out = tmp_path_factory.mktemp("refit")
    return federate(plants, out, **SETTINGS), out


def test_the_second_pass_starts_anew_and_sees_the_validation_rows(
    plants: list[Path], whole: tuple[WatchedGrid, Path]
) -> None:
    grid, out = whole
    served: dict[int, list[bytes]] = {}
    for kind, node, content in grid.down:
        arrays, header, _ = open_records(content)
        if kind == "train" and node == min(grid.get_node_ids()):
            served[json.loads(header)["round"]] = [array.tobytes() for array in arrays.values()]
    assert sorted(served) == list(range(1, TWICE + 1))
    assert served[4] == served[1] != served[3]
    weights = {}
    for kind, _, content in grid.up:
        if kind == "train":
            reply = json.loads(open_records(content)[1])
            weights[reply["site"], reply["round"]] = reply["weight"]
    for folder in plants:
        site = open_site({"site": str(folder), "state": str(out / "state" / folder.name)})
        train, both = len(site.resident("train")), len(site.resident("all"))
        assert train < both == train + len(site.data.validation.labelled())
        assert [weights[site.name, one] for one in (1, 3, 4, 6)] == [train, train, both, both]
    report = read_report(out)
    assert report["run"]["refit"] is True
    assert report["run"]["rounds"] == TWICE == len(report["rounds"])
    assert any("chosen by its validation rows" in one.get("text", "") for one in events_of(out))


def test_no_curve_is_drawn_on_rows_that_train(whole: tuple[WatchedGrid, Path]) -> None:
    rounds = read_report(whole[1])["rounds"]
    judged = {one["round"]: {name for told in one["curves"].values() for name in told} for one in rounds}
    assert "validation_loss" in judged[3]
    for round in (4, 5, 6):
        assert "train_loss" in judged[round]
        assert not {name for name in judged[round] if "validation" in name or name.endswith(("federated", "local"))}


def test_what_was_settled_in_the_first_pass_is_what_the_report_uses(
    plants: list[Path], whole: tuple[WatchedGrid, Path]
) -> None:
    _, out = whole
    rows = {(row["site"], row["task"]): row for row in read_report(out)["sites"]}
    seen = 0
    for folder in plants:
        state = out / "state" / folder.name
        (run,) = [path.name for path in (state / "vault").iterdir()]
        kept = Vault(state, run).decisions()
        assert kept is not None and set(kept["planned"]) == {"federated", "local"}
        name = open_site({"site": str(folder), "state": str(state)}).name
        for task, settled in kept["tasks"].items():
            assert rows[name, task]["chosen"] == settled["chosen"]
            assert set(rows[name, task]["candidates"]) == set(settled["versions"])
            import safetensors

            with safetensors.safe_open(state / "evaluation" / run / f"{task}.safetensors", "numpy") as file:
                about = json.loads(file.metadata()["about"])
            for who, state_of in about["states"].items():
                for key, value in settled["decisions"][who].items():
                    assert state_of[key] == value
                    seen += 1
    assert seen  # some task of these plants decides at a threshold


def test_the_first_pass_is_the_run_without_refit(
    plants: list[Path], tmp_path: Path, whole: tuple[WatchedGrid, Path]
) -> None:
    federate(plants, tmp_path, report={"baseline": True})
    plain, twice = read_report(tmp_path)["rounds"], read_report(whole[1])["rounds"]
    assert [one["curves"] for one in plain] == [one["curves"] for one in twice[:3]]
    assert trunk_of(tmp_path).digest() != trunk_of(whole[1]).digest()


def cut(when: Callable[[dict[str, Any]], bool], node: int) -> dict[int, Any]:
    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        if message.metadata.message_type != "query" and when(header_of(message)):
            raise PowerCut
        return honest()

    return {node: tamper}


@pytest.mark.parametrize(
    "when",
    [
        lambda request: request["kind"] == "decide",
        lambda request: request["round"] == 4 and request["kind"] != "decide",
        lambda request: request["round"] == 6,
    ],
    ids=["deciding", "first round again", "last round"],
)
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    plants: list[Path], tmp_path: Path, whole: tuple[WatchedGrid, Path], when: Callable[[dict[str, Any]], bool]
) -> None:
    with pytest.raises(PowerCut):
        federate(plants, tmp_path, tamper=cut(when, 3), **SETTINGS)
    federate(plants, tmp_path, resume=True, grid=WatchedGrid(plants, tmp_path), **SETTINGS)
    assert trunk_of(tmp_path).digest() == trunk_of(whole[1]).digest()
    assert read_report(tmp_path)["sites"] == read_report(whole[1])["sites"]


def test_a_site_that_missed_the_choice_says_so_and_is_scored_all_the_same(
    plants: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def deaf(message: Message, honest: Callable[[], Message]) -> Message | None:
        missed = message.metadata.message_type == "evaluate" and header_of(message)["kind"] == "decide"
        return None if missed else honest()

    cohort = {"min_sites": 1, "deadline_s": 1.0, "gather_s": 20.0}
    federate(plants, tmp_path, tamper={2: deaf}, **SETTINGS, cohort=cohort)
    name = open_site({"site": str(plants[0]), "state": str(tmp_path / "state" / plants[0].name)}).name
    assert any(
        name in record.message and "was absent when the sites chose" in record.message for record in caplog.records
    )
    assert name in {row["site"] for row in read_report(tmp_path)["sites"]}
    assert np.isfinite([row["federated"] for row in read_report(tmp_path)["sites"]]).all()


def test_nothing_private_is_carried_into_the_second_pass(
    plants: list[Path], tmp_path: Path, whole: tuple[WatchedGrid, Path]
) -> None:
    from trunkline.client.handlers import answer_train
    from trunkline.protocol.arrays import Arrays
    from trunkline.protocol.messages import TrainRequest

    grid, out = whole
    state = out / "state" / plants[0].name
    content = next(
        content
        for kind, node, content in grid.down
        if (kind, node) == ("train", 2) and json.loads(open_records(content)[1])["round"] == 4
    )
    arrays, header, _ = open_records(content)
    request = TrainRequest.model_validate_json(header)
    (sent,) = [
        open_records(content)[0]
        for kind, node, content in grid.up
        if (kind, node) == ("train", 2) and json.loads(open_records(content)[1])["round"] == 4
    ]
    stranger = open_site({"site": str(plants[0]), "state": str(tmp_path)})
    assert not (tmp_path / "vault").exists() and (state / "vault").exists()
    _, entry = answer_train(stranger, request, Arrays(arrays))
    assert {name: array.tobytes() for name, array in entry.delta.items()} == {
        name: array.tobytes() for name, array in sent.items()
    }
