"""Two kinds of benches whose physics are opposite: who belongs with whom, by updates and by validation loss."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flwr.app import Message

from tests.end_to_end.test_resume import PowerCut
from tests.loopback import WatchedGrid, arrays_in, events_of, federate
from tests.server.rounds.test_hostile import changed
from trunkline.flower.errors import error_reply
from trunkline.flower.records import open_records
from trunkline.release import COHORT_RELEASE, RELEASE, read_release
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.simulations.folders import prepare
from trunkline.strategies import StrategyState

SITES, ROUNDS, WARM = 8, 6, 2
ANSWER = np.array([2.0, -1.0, 0.5, 0.0, 1.0, -0.5])
SPLIT = {"name": "clustered", "count": 2, "warm_rounds": WARM}
ASKED = {**SPLIT, "assign": "validation", "every": 1}
KINDS = {f"bench-{number}": number % 2 for number in range(SITES)}


@pytest.fixture(scope="module", autouse=True)
def no_power_cuts():
    """Vault writes are not what is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every second bench answers the same inputs with the opposite sign; noise of 1 that nobody can predict."""
    root = tmp_path_factory.mktemp("benches")
    channels = ", ".join(f'"x{column}"' for column in range(len(ANSWER)))
    for name, kind in KINDS.items():
        rng = np.random.default_rng([3, int(name[-1])])
        x = rng.normal(size=(160, len(ANSWER)))
        y = (1.0, -1.0)[kind] * (x @ ANSWER) + rng.normal(size=len(x))
        folder = root / name
        folder.mkdir()
        columns = {f"x{column}": x[:, column] for column in range(len(ANSWER))}
        pl.DataFrame({**columns, "y": y}).write_parquet(folder / "log.parquet")
        (folder / "site.toml").write_text(
            f'name = "{name}"\n[data]\nfiles = "log.parquet"\nchannels = [{channels}]\n'
            '[tasks.y]\nkind = "regression"\ntarget = "y"\nloss = "mse"\n'
        )
    return sorted(root.iterdir())


def learn(benches: list[Path], out: Path, strategy: dict[str, object], **more: object) -> WatchedGrid:
    """Trunk and head are lent, so that a trunk has to be right about the sign."""
    return federate(
        benches, out, strategy=strategy, rounds=ROUNDS, lend=["trunk", "heads"],
        trunk={"backbone": "linear", "columns": len(ANSWER), "width": 4},
        training={"steps": 12, "batch_size": 32, "learning_rate": 5e-2, "keep": "last"}, **more,
    )  # fmt: skip


def errors(out: Path) -> dict[str, float]:
    return {row["site"]: row["federated"] for row in read_report(out)["sites"]}


def same(cohorts: dict[str, int], kinds: dict[str, int]) -> bool:
    """Whether the two say the same, whatever they call it."""
    return len({(cohorts[site], kinds[site]) for site in kinds}) == len(set(kinds.values()))


def ended(out: Path) -> StrategyState:
    found = Checkpoint(out).load()
    assert found is not None
    return found[0]


def all_of(state: StrategyState) -> tuple[object, ...]:
    return state.trunk.digest(), {name: one.digest() for name, one in state.moments.items()}, state.notes, state.round


def order_in(message: Message) -> dict[str, object]:
    order: dict[str, object] = json.loads(open_records(message.content)[1])
    return order


def misled(message: Message, honest: Callable[[], Message]) -> Message:
    """While all share a trunk, what the bench sends has its sign turned, so that it looks like the other kind."""
    reply = honest()
    if message.metadata.message_type != "train" or int(order_in(message)["round"]) > WARM:  # type: ignore[call-overload]
        return reply
    return changed(reply, message, arrays=lambda arrays: {name: -array for name, array in arrays.items()})


def lying(lie: Callable[[Message, Message], Message | None]) -> Callable[..., Message | None]:
    """Misled as above, and every fit query is answered by `lie` (message, honest reply)."""

    def tamper(message: Message, honest: Callable[[], Message]) -> Message | None:
        if message.metadata.message_type == "query" and order_in(message)["kind"] == "fit":
            return lie(message, honest())
        return misled(message, honest)

    return tamper


@pytest.fixture(scope="module")
def one_trunk(benches: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    out = tmp_path_factory.mktemp("one")
    learn(benches, out, {"name": "fedper"})
    return errors(out)


@pytest.mark.parametrize("strategy", [SPLIT, ASKED], ids=["similarity", "validation"])
def test_opposite_physics_end_in_two_cohorts_and_beat_one_trunk(
    benches: list[Path], tmp_path: Path, one_trunk: dict[str, float], strategy: dict[str, object]
) -> None:
    learn(benches, tmp_path, strategy)
    assert same(read_report(tmp_path)["cohorts"], KINDS)
    got = errors(tmp_path)
    assert all(got[site] < 0.6 * one_trunk[site] for site in KINDS)


def test_a_bench_among_the_wrong_ones_stays_by_similarity_and_moves_by_validation(
    benches: list[Path], tmp_path: Path
) -> None:
    wrong = "bench-3"
    looks = {**KINDS, wrong: 1 - KINDS[wrong]}
    for name, strategy, kinds in (("similarity", SPLIT, looks), ("validation", ASKED, KINDS)):
        learn(benches, tmp_path / name, strategy, tamper={5: misled})
        assert same(read_report(tmp_path / name)["cohorts"], kinds)
    stayed, moved = errors(tmp_path / "similarity"), errors(tmp_path / "validation")
    assert moved[wrong] < 0.5 * stayed[wrong]
    notes = [one["text"] for one in events_of(tmp_path / "validation") if one["event"] == "note"]
    (move,) = [text for text in notes if "Moved:" in text]
    assert move.startswith(f"Round {WARM + 1}: Cohorts: 0: ")
    assert move.endswith(("Moved: bench-3 from 0 to 1.", "Moved: bench-3 from 1 to 0."))


def test_a_fit_query_brings_one_number_trains_nothing_and_leaves_the_vault_alone(
    benches: list[Path], tmp_path: Path
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}

    def watched(message: Message, honest: Callable[[], Message]) -> Message:
        before = files() if order_in(message)["kind"] == "fit" else {}
        reply = honest()
        assert not before or files() == before
        return reply

    every = dict.fromkeys(range(2, 2 + SITES), watched)
    grid = learn(benches, tmp_path, {**ASKED, "every": 2}, tamper=every)
    queries = [
        (node, content) for kind, node, content in grid.down if json.loads(open_records(content)[1])["kind"] == "fit"
    ]
    rounds = [json.loads(open_records(content)[1])["round"] for _, content in queries]
    assert sorted(set(rounds)) == [WARM + 3, WARM + 5]  # asked after two rounds, as the sites enter the next
    assert len(queries) == 2 * SITES * 2
    answers = [content for kind, _, content in grid.up if kind == "query"][SITES:]
    assert len(answers) == len(queries)
    for content in answers:
        arrays, header, metrics = open_records(content)
        assert not arrays
        assert list(metrics) == ["validation_loss"]
        assert set(json.loads(header)) == {"protocol", "site", "run", "round", "contract", "weight"}
    node, question = queries[-1]
    told = []
    for _ in range(3):
        (message_id,) = grid.push_messages([Message(question, dst_node_id=node, message_type="query")])
        (reply,) = grid.pull_messages([message_id])
        told.append(open_records(reply.content)[2])
    last = next(
        open_records(content)[2]
        for kind, its, content in reversed(grid.up[: -len(told)])
        if kind == "query" and its == node
    )
    assert told == [last] * 3
    down = [one["bytes_down"] for one in read_report(tmp_path)["rounds"]]
    assert down[WARM + 1] == 3 * down[0]  # a round in which every bench also got both trunks


def test_a_site_enters_the_next_round_with_the_loss_it_told(plants: list[Path], tmp_path: Path) -> None:
    """Plants with stems and heads of their own: what they say of a trunk is said with these, as the last round left them."""
    grid = federate(plants, tmp_path, strategy={**SPLIT, "warm_rounds": 1, "assign": "validation", "every": 1})
    told: dict[int, list[float]] = {}
    entered = {}
    for (kind, node, content), (_, _, order) in zip(grid.up, grid.down, strict=True):
        asked = json.loads(open_records(order)[1])
        metrics = open_records(content)[2]
        if asked["kind"] == "fit" and asked["round"] == 3:
            told.setdefault(node, []).append(metrics["validation_loss"])
        if kind == "train" and asked["round"] == 3:
            entered[node] = metrics["validation_loss"]
    assert len(told) == len(plants)
    assert all(len(set(losses)) == 2 for losses in told.values())
    assert entered == {node: min(losses) for node, losses in told.items()}


LIES: dict[str, tuple[Callable[[Message, Message], Message | None], str]] = {
    "NaN": (
        lambda message, reply: changed(reply, message, metrics=lambda _: {"validation_loss": float("nan")}),
        "metric `validation_loss` is nan",
    ),
    "an array": (
        lambda message, reply: changed(reply, message, arrays=lambda _: {"trunk.matrix.weight": np.ones((4, 6))}),
        "`trunk.matrix.weight` is not in this run's contract",
    ),
    "another number": (
        lambda message, reply: changed(reply, message, metrics=lambda told: {**told, "train_loss": 1.0}),
        "metric `train_loss` is not in this run's contract",
    ),
    "no number": (lambda message, reply: changed(reply, message, metrics=lambda _: {}), "holds no `validation_loss`"),
    "another's name": (
        lambda message, reply: changed(reply, message, header=lambda _: {"site": "bench-1"}),
        "calls itself 'bench-1'",
    ),
    "an old round": (
        lambda message, reply: changed(reply, message, header=lambda table: {"round": table["round"] - 1}),
        "a late reply is never added",
    ),
    "an error": (lambda message, _: error_reply(message, "RuntimeError: out of memory"), "out of memory"),
    "silence": (lambda message, _: None, "no reply within 0.3 s"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_bad_answer_costs_a_site_its_vote_and_nobody_else_anything(
    benches: list[Path], tmp_path: Path, lie: str
) -> None:
    """Two benches are among the wrong ones: the honest one moves, the liar stays where it was put, and both train on."""
    tell, words = LIES[lie]
    cohort = {"min_sites": 1, "deadline_s": 0.3 if lie == "silence" else 20.0, "gather_s": 20.0}
    grid = learn(benches, tmp_path, {**ASKED, "every": 3}, tamper={5: misled, 8: lying(tell)}, cohort=cohort)
    assert same(read_report(tmp_path)["cohorts"], {**KINDS, "bench-6": 1 - KINDS["bench-6"]})
    notes = [one["text"] for one in events_of(tmp_path) if one["event"] == "note"]
    (said,) = [text for text in notes if "has no vote" in text]
    assert said.startswith(f"bench-6, round {WARM + 4}: ")
    assert words in said
    assert all(len(one["sites"]) == SITES and not one["refused"] for one in read_report(tmp_path)["rounds"])
    asked = [node for kind, node, content in grid.down if json.loads(open_records(content)[1])["kind"] == "fit"]
    assert asked.count(5) == 2
    assert lie == "silence" or asked.count(8) == 1  # whose answer for one trunk is missing is not asked for the other


@pytest.mark.parametrize("node", [2, 9])
def test_a_run_cut_while_sites_are_asked_and_resumed_equals_an_undisturbed_one(
    benches: list[Path], tmp_path: Path, node: int
) -> None:
    def cut(message: Message, honest: Callable[[], Message]) -> Message:
        order = order_in(message)
        if order["kind"] == "fit" and order["round"] == WARM + 2:  # the query that moves bench-3
            raise PowerCut
        return honest()

    learn(benches, tmp_path / "whole", ASKED, tamper={5: misled})
    with pytest.raises(PowerCut):
        learn(benches, tmp_path / "cut", ASKED, tamper={5: misled, node: cut})
    assert ended(tmp_path / "cut").round == WARM
    again = WatchedGrid(benches, tmp_path / "cut", {5: misled})
    learn(benches, tmp_path / "cut", ASKED, resume=True, grid=again)
    assert all_of(ended(tmp_path / "cut")) == all_of(ended(tmp_path / "whole"))
    assert errors(tmp_path / "cut") == errors(tmp_path / "whole")


def test_every_cohort_has_a_release_with_its_own_sites_on_the_card(benches: list[Path], tmp_path: Path) -> None:
    learn(benches, tmp_path, SPLIT)
    cohorts, state = read_report(tmp_path)["cohorts"], ended(tmp_path)
    for number in (0, 1):
        arrays, card = read_release(tmp_path / COHORT_RELEASE.format(number))
        assert card.sites == tuple(sorted(site for site in cohorts if cohorts[site] == number))
        assert arrays.digest() == state.moments[f"cohort-{number}"].digest()
    arrays, card = read_release(tmp_path / RELEASE)
    assert card.sites == tuple(sorted(cohorts))
    assert arrays.digest() == state.trunk.digest()
    assert len(list(tmp_path.glob("trunk*.safetensors"))) == 3
    prepare(tmp_path, resume=False, overwrite=True)
    assert not list(tmp_path.glob("trunk*.safetensors"))


def test_a_cohorts_release_holds_no_head_that_none_of_its_sites_has(plants: list[Path], tmp_path: Path) -> None:
    settings = {"strategy": {**SPLIT, "warm_rounds": 1}, "lend": ["trunk", "heads"], "rounds": 2}
    grid = federate(plants, tmp_path, **settings)
    heads = {
        plants[node - 2].name: {name for name in arrays_in(content) if name.startswith("head.")}
        for kind, node, content in grid.up
        if kind == "train"
    }
    found = []
    for number in (0, 1):
        arrays, card = read_release(tmp_path / COHORT_RELEASE.format(number))
        found.append({name for name in arrays if name.startswith("head.")})
        assert found[-1] == set().union(*(heads[site] for site in card.sites))
    assert found[0] != found[1]
