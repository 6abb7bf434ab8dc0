"""A run that is stopped and resumed, or asked twice, ends with the same bytes."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from flwr.app import Message

from tests.loopback import WatchedGrid, events_of, federate, trunk_of
from trunkline.errors import ConfigError
from trunkline.flower.records import open_records
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.server.rounds.update_journal import UpdateJournal

pytestmark = pytest.mark.xdist_group("resume")  # one worker: the undisturbed runs are made once
FEDREP = {"strategy": {"name": "fedrep"}}


class PowerCut(BaseException):
    """Not an Exception, so that nothing in the code under test can catch it."""


def cut_at(round: int, node: int):
    def tamper(message: Message, honest):
        if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] == round:
            raise PowerCut
        return honest()

    return {node: tamper}


@pytest.fixture(scope="module")
def undisturbed(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the run of a strategy ended that nothing happened to."""

    @cache
    def run(strategy: str) -> Path:
        out = tmp_path_factory.mktemp(strategy)
        federate(plants, out, strategy={"name": strategy})
        return out

    return run


@pytest.mark.parametrize("strategy", ["fedrep", "fedadam"])
@pytest.mark.parametrize(("round", "node"), [(1, 2), (2, 2), (3, 4)])
def test_a_resumed_run_equals_an_undisturbed_one(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path], strategy: str, round: int, node: int
) -> None:
    settings = {"strategy": {"name": strategy}}
    whole = undisturbed(strategy)
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "cut", tamper=cut_at(round, node), **settings)
    federate(plants, tmp_path / "cut", resume=True, grid=WatchedGrid(plants, tmp_path / "cut"), **settings)
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(whole).digest()
    one, other = read_report(tmp_path / "cut"), read_report(whole)
    assert one["sites"] == other["sites"]
    assert [record["curves"] for record in one["rounds"]] == [record["curves"] for record in other["rounds"]]


def test_asked_twice_a_site_answers_the_same_bytes_without_training(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.client import handlers as rounds

    grid = federate(plants, tmp_path, rounds=2)
    question = next(
        content
        for kind, node, content in grid.down
        if kind == "train" and node == 2 and json.loads(open_records(content)[1])["round"] == 2
    )
    answers = [content for kind, node, content in grid.up if kind == "train" and node == 2]

    def trains(*args: object, **kwargs: object) -> float:
        raise AssertionError("trained again")

    monkeypatch.setattr(rounds, "train_site", trains)
    (message_id,) = grid.push_messages([Message(question, dst_node_id=2, message_type="train")])
    (again,) = grid.pull_messages([message_id])
    assert not again.has_error()
    arrays, header, metrics = open_records(again.content)
    arrays_before, header_before, metrics_before = open_records(answers[1])
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: array.tobytes() for name, array in arrays_before.items()
    }
    assert (header, metrics) == (header_before, metrics_before)


def test_with_a_damaged_vault_the_round_before_is_used_and_the_bytes_are_the_same(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "cut", tamper=cut_at(3, 5), **FEDREP)
    newest = sorted((tmp_path / "cut" / "state" / plants[0].name / "vault").glob("*/round-*"))[-1]
    assert newest.name == "round-000003.safetensors"  # node 2 had answered when the power went
    newest.write_bytes(newest.read_bytes()[:-7])
    federate(plants, tmp_path / "cut", resume=True, grid=WatchedGrid(plants, tmp_path / "cut"), **FEDREP)
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(undisturbed("fedrep")).digest()


def test_with_a_damaged_checkpoint_the_run_goes_on_from_the_one_before_and_says_so(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "cut", tamper=cut_at(3, 2), **FEDREP)
    newest = sorted((tmp_path / "cut" / "checkpoint").iterdir())[-1]
    newest.write_bytes(b"\0" * 100)
    federate(plants, tmp_path / "cut", resume=True, grid=WatchedGrid(plants, tmp_path / "cut"), **FEDREP)
    assert any(
        "damaged" in event.get("text", "") and "Going back to round 1" in event["text"]
        for event in events_of(tmp_path / "cut")
    )
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(undisturbed("fedrep")).digest()


def test_resuming_with_another_run_file_is_refused_by_key(plants: list[Path], tmp_path: Path) -> None:
    federate(plants, tmp_path)
    with pytest.raises(ConfigError, match=r"different: training"):
        federate(plants, tmp_path, resume=True, training={"steps": 4, "batch_size": 32})


def test_a_site_given_another_trunk_says_so(plants: list[Path], tmp_path: Path) -> None:
    from trunkline.client.handlers import answer_train
    from trunkline.client.site import open_site
    from trunkline.errors import ContractError
    from trunkline.models.trunk import first_trunk
    from trunkline.protocol.messages import TrainRequest
    from trunkline.protocol.plan import LocalPlan, TrunkSpec

    site = open_site({"site": str(plants[0]), "state": str(tmp_path)})
    request = TrainRequest(
        run="r", seed=1, round=1, rounds=2, trunk=TrunkSpec(width=16), plan=LocalPlan(steps=1), lend=("trunk",)
    )
    with pytest.raises(ContractError, match=r"should have shape .*same trunk"):
        answer_train(site, request, first_trunk(TrunkSpec(width=32), 1))
    assert not (tmp_path / "vault").exists()


def asked(grid: WatchedGrid, round: int) -> list[int]:
    return [
        node
        for kind, node, content in grid.down
        if kind == "train" and json.loads(open_records(content)[1])["round"] == round
    ]


def test_an_update_that_was_received_is_not_asked_for_again(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "cut", tamper=cut_at(2, 4), **FEDREP)
    again = federate(plants, tmp_path / "cut", resume=True, grid=WatchedGrid(plants, tmp_path / "cut"), **FEDREP)
    assert asked(again, 2) == [4, 5]  # 2 and 3 had answered
    assert asked(again, 3) == [2, 3, 4, 5]
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(undisturbed("fedrep")).digest()
    assert not (tmp_path / "cut" / "journal").exists()
    rounds = [read_report(one)["rounds"] for one in (tmp_path / "cut", undisturbed("fedrep"))]
    for record in [*rounds[0], *rounds[1]]:
        record.pop("seconds")
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("harm", ["cut short", "another question", "a flipped bit"])
def test_what_the_journal_holds_counts_only_as_the_answer_to_this_very_question(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path], harm: str
) -> None:
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "cut", tamper=cut_at(2, 4), **FEDREP)
    (kept,) = (tmp_path / "cut" / "journal" / plants[0].name).iterdir()
    data = bytearray(kept.read_bytes())
    if harm == "another question":  # the reply of the round before, put where this one's should be
        journal = UpdateJournal(tmp_path / "cut")
        shelf = journal._shelf(plants[0].name)
        tensors, meta = shelf.get(2)
        shelf.put(2, tensors, {**meta, "question": "0" * 64})
    else:
        data[-9] ^= 1
        kept.write_bytes(data[:-7] if harm == "cut short" else data)
    again = federate(plants, tmp_path / "cut", resume=True, grid=WatchedGrid(plants, tmp_path / "cut"), **FEDREP)
    assert asked(again, 2) == [2, 4, 5]
    assert trunk_of(tmp_path / "cut").digest() == trunk_of(undisturbed("fedrep")).digest()


def test_a_site_that_is_away_when_a_run_is_taken_up_again_is_a_member_still_and_what_it_sent_counts(
    plants: list[Path], tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    class Without(WatchedGrid):
        def get_node_ids(self) -> list[int]:
            return [node for node in super().get_node_ids() if node != 2]

    settings = {**FEDREP, "cohort": {"min_sites": 4, "quorum": 0.5, "deadline_s": 3.0, "gather_s": 20.0}}
    with pytest.raises(PowerCut):
        federate(plants, tmp_path / "away", tamper=cut_at(3, 4), **settings)
    federate(plants, tmp_path / "away", resume=True, grid=Without(plants, tmp_path / "away"), **settings)
    assert trunk_of(tmp_path / "away").digest() == trunk_of(undisturbed("fedrep")).digest()
    assert plants[0].name in read_report(tmp_path / "away")["rounds"][2]["sites"]
    found = Checkpoint(tmp_path / "away").load()
    assert found is not None
    counted = [one["admitted"] for one in found[1]["records"]]
    assert [sorted(one) for one in counted] == [sorted(path.name for path in plants)] * 3
    assert len({digest for one in counted for digest in one.values()}) == 12
