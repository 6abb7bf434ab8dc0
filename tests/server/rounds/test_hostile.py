"""A bad site costs itself the round, and nobody else anything (design invariant 3)."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from tests.loopback import WatchedGrid, events_of, federate, refusals_of, trunk_of
from trunkline.errors import QuorumError
from trunkline.flower.records import open_records, to_records
from trunkline.server.reporting.report import read_report

LIAR = 3  # node ids count from 2, so this is the second plant by name


def changed(
    reply: Message,
    message: Message,
    arrays: Callable | None = None,
    header: Callable | None = None,
    metrics: Callable | None = None,
) -> Message:
    """The honest reply with one thing changed, made as a hostile site would make it."""
    honest_arrays, honest_header, honest_metrics = open_records(reply.content)
    copies = {name: array.copy() for name, array in honest_arrays.items()}
    table = json.loads(honest_header)
    if arrays:
        copies = arrays(copies)
    if header:
        table.update(header(table))
    if metrics:
        honest_metrics = metrics(honest_metrics)
    return Message(to_records(copies, json.dumps(table), honest_metrics), reply_to=message)


def first_of(arrays: dict[str, np.ndarray], dimensions: int = 1) -> str:
    return next(name for name, array in arrays.items() if array.ndim >= dimensions and array.size > 1)


def with_value(value: float) -> Callable:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays[first_of(arrays)].flat[0] = value
        return arrays

    return change


def with_shape(shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable:
    def change(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = first_of(arrays)
        arrays[name] = np.ones(shape(arrays[name].shape), np.float32)
        return arrays

    return change


LIES: dict[str, tuple[dict[str, Callable], str]] = {
    "NaN": ({"arrays": with_value(np.nan)}, "NaN or infinity"),
    "infinity": ({"arrays": with_value(np.inf)}, "NaN or infinity"),
    "a huge change": ({"arrays": with_value(1e9)}, "changes by 1e+09"),
    "a wrong shape": ({"arrays": with_shape(lambda shape: (*shape, 2))}, "has shape"),
    "one number for many": ({"arrays": with_shape(lambda shape: (1,) * len(shape))}, "has shape"),
    "an extra key": (
        {"arrays": lambda arrays: {**arrays, "stem.secret": np.ones(3, np.float32)}},
        "`stem.secret` is not in this run's contract",
    ),
    "a missing key": ({"arrays": lambda arrays: dict(list(arrays.items())[1:])}, "is missing"),
    "another dtype": (
        {"arrays": lambda arrays: {name: array.astype(np.float64) for name, array in arrays.items()}},
        "dtype float64",
    ),
    "weight 1e12": ({"header": lambda _: {"weight": 1e12}}, "its weight is 1e+12"),
    "weight -1": ({"header": lambda _: {"weight": -1.0}}, "its weight is -1"),
    "weight 0": ({"header": lambda _: {"weight": 0.0}}, "its weight is 0"),
    "a stale round": ({"header": lambda table: {"round": table["round"] - 1}}, "a late reply is never added"),
    "another run": ({"header": lambda _: {"run": "other"}}, "it answers run 'other'"),
    "another's name": ({"header": lambda _: {"site": "press-01"}}, "calls itself 'press-01'"),
    "an unknown header key": ({"header": lambda _: {"shell": "rm"}}, "`shell`"),
    "a foreign metric": ({"metrics": lambda metrics: {**metrics, "secret": 1.0}}, "metric `secret`"),
    "a NaN metric": ({"metrics": lambda metrics: {**metrics, "train_loss": float("nan")}}, "metric `train_loss`"),
}


@pytest.fixture(scope="module")
def three(plants: list[Path]) -> list[Path]:
    return plants[:3]


@pytest.fixture(scope="module")
def without_the_liar(three: list[Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The trunk of a run in which the liar never takes part in round 2: what every lie has to end in."""
    out = tmp_path_factory.mktemp("honest")
    federate(three, out, tamper={LIAR: lambda message, honest: trains_but(message, honest, _crash(message))})
    return trunk_of(out).digest()


def _round(message: Message) -> int:
    return int(json.loads(open_records(message.content)[1])["round"])


def trains_but(message: Message, honest: Callable[[], Message], answer: Message | None) -> Message | None:
    """The site does its work in round 2 (so that its private state moves on), but something else is answered."""
    reply = honest()
    return answer if message.metadata.message_type == "train" and _round(message) == 2 else reply


def _crash(message: Message) -> Message:
    from trunkline.flower.errors import error_reply

    return error_reply(message, "RuntimeError: out of memory")


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_liar_its_round_and_nobody_else_anything(
    three: list[Path], tmp_path: Path, without_the_liar: str, lie: str
) -> None:
    changes, words = LIES[lie]

    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        return (
            changed(reply, message, **changes)
            if message.metadata.message_type == "train" and _round(message) == 2
            else reply
        )

    federate(three, tmp_path, tamper={LIAR: tamper})
    refused = refusals_of(tmp_path)
    assert refused[1] == {}
    assert refused[3] == {}
    ((site, cause),) = refused[2].items()
    assert cause.startswith(f"{site}, round 2:")
    assert words in cause
    assert trunk_of(tmp_path).digest() == without_the_liar
    assert len(read_report(tmp_path)["rounds"][1]["sites"]) == len(three) - 1


@pytest.mark.parametrize("content", ["no records", "text in the metrics", "pickled array"])
def test_a_malformed_message_is_set_aside(
    three: list[Path], tmp_path: Path, without_the_liar: str, content: str
) -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if message.metadata.message_type != "train" or _round(message) != 2:
            return reply
        _, header, _ = open_records(reply.content)
        bad = RecordDict()
        if content == "text in the metrics":
            bad = RecordDict(
                {"arrays": ArrayRecord(), "header": ConfigRecord({"json": header}), "metrics": ConfigRecord({"a": "b"})}
            )
        if content == "pickled array":
            array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=b"\x80\x04cposix\nsystem\n.")
            bad = RecordDict(
                {
                    "arrays": ArrayRecord({"trunk.x": array}),
                    "header": ConfigRecord({"json": header}),
                    "metrics": MetricRecord(),
                }
            )
        return Message(bad, reply_to=message)

    federate(three, tmp_path, tamper={LIAR: tamper})
    assert set(refusals_of(tmp_path)[2]) == {three[LIAR - 2].name}
    assert trunk_of(tmp_path).digest() == without_the_liar


def test_a_reply_that_never_comes_costs_its_site_the_round_and_later_rounds_do_not_wait(
    three: list[Path], tmp_path: Path, without_the_liar: str
) -> None:
    grid = federate(
        three, tmp_path, tamper={LIAR: lambda message, honest: trains_but(message, honest, None)},
        cohort={"min_sites": 1, "deadline_s": 2.0, "resend_s": 0.5},
    )  # fmt: skip
    asked = [
        node
        for kind, node, content in grid.down
        if kind == "train" and json.loads(open_records(content)[1])["round"] == 2
    ]
    assert asked.count(LIAR) >= 2  # silence is answered by asking again
    refused = refusals_of(tmp_path)
    assert "no reply within 2 s" in refused[2][three[LIAR - 2].name]
    rounds = read_report(tmp_path)["rounds"]
    assert rounds[1]["seconds"] >= 2.0
    assert trunk_of(tmp_path).digest() == without_the_liar


@pytest.mark.parametrize("name", ["stem.secret", "head.rul.secret", "trunk.secret", "secret"])
def test_an_offer_never_widens_what_may_travel(three: list[Path], tmp_path: Path, name: str) -> None:
    """The allow-list is made of the run's `lend`; a site that offers more takes no part, and its array reaches nobody."""

    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if message.metadata.message_type != "query":
            return reply
        arrays, header, _ = open_records(reply.content)
        table = json.loads(header)
        table["arrays"].append({"name": name, "shape": [3], "dtype": "float32"})
        return Message(to_records({**arrays, name: np.ones(3, np.float32)}, json.dumps(table)), reply_to=message)

    federate(three, tmp_path, tamper={LIAR: tamper}, rounds=1)
    assert name not in trunk_of(tmp_path)
    notes = [event["text"] for event in events_of(tmp_path) if event["event"] == "note"]
    assert any(
        three[LIAR - 2].name in text and f"`{name}`, which this run does not lend (trunk)" in text for text in notes
    )
    assert all(len(one["sites"]) == len(three) - 1 for one in read_report(tmp_path)["rounds"])


def test_a_duplicate_name_does_not_take_over_a_site(plants: list[Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(plants[0], tmp_path / "impostor"))
    federate([*plants, copy], tmp_path / "out")
    notes = [event["text"] for event in events_of(tmp_path / "out") if event["event"] == "note"]
    assert any(plants[0].name in text and "already calls itself" in text for text in notes)
    assert len(read_report(tmp_path / "out")["rounds"][0]["sites"]) == len(plants)


def test_below_the_quorum_the_run_stops_with_its_state_on_disk_and_goes_on(plants: list[Path], tmp_path: Path) -> None:
    def broken(message: Message, honest: Callable[[], Message]) -> Message:
        return _crash(message) if message.metadata.message_type == "train" and _round(message) == 2 else honest()

    with pytest.raises(QuorumError, match=r"1 of 4 sites were admitted, 3 are needed.*out of memory.*--resume"):
        federate(plants, tmp_path, tamper={2: broken, 3: broken, 4: broken})
    federate(plants, tmp_path, resume=True, grid=WatchedGrid(plants, tmp_path))
    federate(plants, tmp_path.with_name(tmp_path.name + "-undisturbed"))
    assert trunk_of(tmp_path).digest() == trunk_of(tmp_path.with_name(tmp_path.name + "-undisturbed")).digest()
