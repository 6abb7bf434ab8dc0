"""The egress filter: what is not agreed does not leave, whatever the code behind it made, and every reply is recorded."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from tests.typed_requests import as_kind, request_of
from trunkline.client.app import app
from trunkline.client.policy import consent, contracts, manifest
from trunkline.client.policy.egress import ONCE, EgressFilter
from trunkline.errors import StorageError, TamperError, TrustError
from trunkline.flower.errors import CRASHED, DECLINED, PENDING, REFUSED, RESTARTED, answer, error_reply
from trunkline.flower.grid import LoopbackGrid, stamp
from trunkline.flower.records import open_records, to_records
from trunkline.models.tasks import describe_tasks
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.contract import FIT_CONTRACT
from trunkline.protocol.messages import FitQuery, ScoreRequest
from trunkline.protocol.opening_hours import PlantHours
from trunkline.protocol.plan import About, LocalPlan, TrunkSpec
from trunkline.security.encryption import make_seal

SPEC = TrunkSpec(width=16)
TRUNK = first_trunk(SPEC, 1)


@dataclass
class Plant:
    """One site with its app and its egress filter, and the centre's side of the questions."""

    folder: Path
    state: Path
    asked: int = 0
    _filter: EgressFilter | None = None
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def filter(self) -> EgressFilter:
        self._filter = self._filter or EgressFilter(self.folder, self.state, "10.0.0.5:9140", describe_tasks)
        return self._filter

    def order(self, round: int, **changes: Any) -> Any:
        about = About(operator="hannes", name="quick", strategy="fedper", rounds=3)
        order = request_of(
            round, run="quick-1", seed=1, rounds=3, trunk=SPEC, plan=LocalPlan(steps=1, batch_size=16), lend=("trunk",),
            baseline=False, about=about,
        )  # fmt: skip
        found = contracts.read(self.state, "quick-1")
        contract = found.contract.digest() if found else ""
        return order.model_copy(update={**({"contract": contract} if round else {}), **self.base, **changes})

    def question(self, kind: str, order: Any, arrays: Arrays | None = None) -> Message:
        self.asked += 1
        message = Message(to_records(arrays or Arrays(), order.model_dump_json()), dst_node_id=2, message_type=kind)
        stamp(message, f"question-{self.asked}")
        return message

    def answer(self, request: Message) -> Message:
        config: dict[str, Any] = {"site": str(self.folder), "state": str(self.state), "plant": 1}
        return answer(app, request, Context(1, 2, config, RecordDict(), {}))

    def join(self, **changes: Any) -> Message:
        request = self.question("query", self.order(0, **changes))
        return self.filter.check(request, self.answer(request))

    def trained(self, round: int = 1, **changes: Any) -> tuple[Message, Message]:
        request = self.question("train", self.order(round, **changes), TRUNK)
        return request, self.answer(request)

    def lines(self) -> list[dict[str, Any]]:
        return [link.body for link in manifest.read_manifest(self.state)[0]]


@pytest.fixture(autouse=True)
def a_process_of_flower() -> None:
    LoopbackGrid(app, [])  # messages are made in the name of a process, which a grid gives


@pytest.fixture
def plant(plants: list[Path], tmp_path: Path) -> Plant:
    folder = Path(shutil.copytree(plants[0], tmp_path / plants[0].name))
    return Plant(folder, tmp_path / "state")


@pytest.fixture
def joined(plant: Plant) -> Plant:
    assert not plant.join().has_error()
    return plant


def with_changes(
    request: Message,
    reply: Message,
    arrays: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    header: Callable[[str], str] = str,
    metrics: Callable[[dict[str, float]], dict[str, float]] = dict,
) -> Message:
    """The honest reply with one thing changed, as a ClientApp that leaks would make it."""
    found, text, numbers = open_records(reply.content)
    return Message(to_records(arrays(dict(found)), header(text), metrics(numbers)), reply_to=request)


def stopped(plant: Plant, request: Message, reply: Message) -> str:
    """That nothing of `reply` but an error leaves, which is written down; the error's text."""
    before = len(plant.lines())
    out = plant.filter.check(request, reply)
    assert out.has_error() and out.error.code == REFUSED
    assert out.metadata.reply_to_message_id == request.metadata.message_id
    text = out.error.reason or ""
    assert text.startswith("stopped by the plant's egress filter: ")
    *_, line = plant.lines()
    assert len(plant.lines()) == before + 1
    assert line["kind"] == "error" and line["error"] == [REFUSED, text] and line["tensors"] == []
    return text


# ---- what may leave


def test_a_whole_run_passes_and_every_reply_has_its_line(joined: Plant) -> None:
    for round in (1, 2, 3):
        request, reply = joined.trained(round)
        out = joined.filter.check(request, reply)
        assert not out.has_error()
        assert Arrays(open_records(out.content)[0]).digest() == Arrays(open_records(reply.content)[0]).digest()
        assert open_records(out.content)[1:] == open_records(reply.content)[1:]
    request = joined.question("query", as_kind(FitQuery, joined.order(3)), TRUNK)
    assert not joined.filter.check(request, joined.answer(request)).has_error()
    request = joined.question("evaluate", as_kind(ScoreRequest, joined.order(4)), TRUNK)
    assert not joined.filter.check(request, joined.answer(request)).has_error()
    lines = joined.lines()
    assert [(line["kind"], line["round"]) for line in lines] == [
        ("offer", 0), ("update", 1), ("update", 2), ("update", 3), ("fit", 3), ("scorecard", 4),
    ]  # fmt: skip
    assert {line["run"] for line in lines} == {"quick-1"}
    assert {line["to"] for line in lines} == {"hannes at 10.0.0.5:9140"}


def test_a_line_says_what_left_to_the_byte(joined: Plant) -> None:
    import hashlib

    request, reply = joined.trained()
    out = joined.filter.check(request, reply)
    arrays, header, metrics = open_records(out.content)
    *_, line = joined.lines()
    assert line["header"] == json.loads(header) and line["metrics"] == metrics and line["error"] is None
    assert line["bytes"] == len(header) + Arrays(arrays).nbytes + 8 * len(metrics)
    for (name, shape, dtype, size, norm, digest), (own, array) in zip(line["tensors"], arrays.items(), strict=True):
        assert (name, tuple(shape), dtype, size) == (own, array.shape, "float32", array.nbytes)
        assert norm == pytest.approx(float(np.linalg.norm(array.ravel().astype(np.float64))), rel=1e-12)
        assert digest == hashlib.sha256(array.tobytes()).hexdigest()
    numbers = json.dumps(metrics, sort_keys=True)
    whole = hashlib.sha256(f"{header}\n{numbers}\n{Arrays(arrays).digest()}".encode()).hexdigest()
    assert line["sha256"] == whole


@pytest.mark.parametrize(
    ("lend", "policy"),
    [
        (("trunk", "stem"), ""),
        (("trunk", "heads"), ""),
        (("trunk", "head.rul"), ""),
        (("trunk", "scaler"), 'lend = ["trunk", "scaler"]'),
        (("trunk",), "metrics = false\nreport = false"),
        (("trunk",), 'metrics = ["train_loss"]'),
    ],
)
def test_what_a_run_and_a_policy_name_together_may_leave(plant: Plant, lend: tuple[str, ...], policy: str) -> None:
    from trunkline.client.site import open_site

    (plant.folder / "policy.toml").write_text(policy)
    plant.base = {"lend": lend}
    assert not plant.join().has_error()
    site = open_site({"site": str(plant.folder), "state": str(plant.state), "plant": 1})
    lent = site.model(plant.order(1)).share(lend)
    request = plant.question("train", plant.order(1), lent)
    assert not plant.filter.check(request, plant.answer(request)).has_error()
    request = plant.question("evaluate", as_kind(ScoreRequest, plant.order(4)), lent)
    assert not plant.filter.check(request, plant.answer(request)).has_error()
    assert [line["kind"] for line in plant.lines()] == ["offer", "update", "scorecard"]
    if "scaler" in lend:
        assert next(one[0] for one in plant.lines()[0]["tensors"]) == "scaler.count"


def test_what_is_asked_twice_may_leave_twice(joined: Plant) -> None:
    for _ in range(12):  # more often than different answers of the run may
        request, reply = joined.trained(2)
        assert not joined.filter.check(request, reply).has_error()
    assert len({line["sha256"] for line in joined.lines() if line["kind"] == "update"}) == 1


# ---- what may not


FEW = np.ones(3, np.float32)


def first(arrays: dict[str, Any]) -> str:
    return next(name for name, array in arrays.items() if array.ndim == 3)


EXCESS: dict[str, tuple[dict[str, Any], str]] = {
    "an extra array": ({"arrays": lambda arrays: {**arrays, "head.rul.weight": FEW}}, "`head.rul.weight` is not in"),
    "an array left out": ({"arrays": lambda arrays: dict(list(arrays.items())[1:])}, "is missing"),
    "a head's array under a trunk's name": ({"arrays": lambda arrays: {**arrays, first(arrays): FEW}}, "has shape (3,)"),
    "another dtype": (
        {"arrays": lambda arrays: {**arrays, first(arrays): arrays[first(arrays)].astype(np.float64)}}, "has dtype float64",
    ),
    "whole numbers": (
        {"arrays": lambda arrays: {**arrays, first(arrays): arrays[first(arrays)].astype(np.int32)}}, "has dtype int32",
    ),
    "a metric that was not agreed": ({"metrics": lambda found: {**found, "unit_17": 3.0}}, "metric `unit_17` is not in"),
    "a field more": ({"header": lambda text: text[:-1] + ',"note":"unit 17"}'}, "its header is no Reply (extra_forbidden)"),
    "spaces in the header": ({"header": lambda text: text.replace(":", ": ")}, "holds more than that"),
    "a field twice": ({"header": lambda text: text[:-1] + ',"weight":1.0}'}, "holds more than that"),
    "digits in the weight": ({"header": lambda text: changed(text, weight=17.25)}, "its weight is no whole number"),
    "a weight of nothing": ({"header": lambda text: changed(text, weight=0.0)}, "its weight is no whole number"),
    "another site's name": ({"header": lambda text: changed(text, site="unit-17")}, "its site is not what"),
    "another run": ({"header": lambda text: changed(text, run="quick-2")}, "its run is not what"),
    "another round": ({"header": lambda text: changed(text, round=2)}, "its round is not what"),
    "another contract": ({"header": lambda text: changed(text, contract="unit 17")}, "its contract is not what"),
    "no JSON": ({"header": lambda text: "unit 17"}, "its header is no Reply (json_invalid)"),
    "a scorecard in place of an update": (
        {"header": lambda text: json.dumps({"protocol": 3, "site": "kiln-02", "run": "quick-1", "rows": []})}, "no Reply",
    ),
}  # fmt: skip


def changed(text: str, **fields: Any) -> str:
    return json.dumps({**json.loads(text), **fields}, separators=(",", ":"))


@pytest.mark.parametrize("excess", EXCESS)
def test_whatever_is_beyond_the_contract_is_stopped_and_written_down(joined: Plant, excess: str) -> None:
    changes, words = EXCESS[excess]
    request, reply = joined.trained()
    text = stopped(joined, request, with_changes(request, reply, **changes))
    assert words in text and "unit 17" not in text
    assert not joined.filter.check(request, reply).has_error(), "the honest reply may still leave"


def test_what_is_no_record_of_ours_is_stopped(joined: Plant) -> None:
    from flwr.app import ConfigRecord

    request, reply = joined.trained()
    content = RecordDict({**dict(reply.content.items()), "diary": ConfigRecord({"a": "unit 17"})})
    assert "a message holds the records" in stopped(joined, request, Message(content, reply_to=request))


def test_nothing_leaves_in_the_padding_of_an_array(joined: Plant) -> None:
    """numpy's header may be padded with any number of spaces and tabs: what leaves is written anew from what was read."""
    from flwr.app import Array, ArrayRecord

    request, reply = joined.trained()
    records = dict(reply.content.items())
    arrays = dict(records["arrays"].items())
    name, one = next(iter(arrays.items()))
    size = int.from_bytes(one.data[8:10], "little")
    head = one.data[10 : 10 + size].rstrip() + b" \t \t\t" * 20
    head = head + b" " * ((64 - (len(head) + 11) % 64) % 64) + b"\n"
    padded = one.data[:8] + len(head).to_bytes(2, "little") + head + one.data[10 + size :]
    arrays[name] = Array(one.dtype, one.shape, one.stype, padded)
    out = joined.filter.check(
        request, Message(RecordDict({**records, "arrays": ArrayRecord(arrays)}), reply_to=request)
    )
    assert not out.has_error()
    assert dict(out.content.items())["arrays"][name].data == one.data


def test_a_run_that_was_never_accepted_gets_no_answer(plant: Plant) -> None:
    plant.join()
    request, reply = plant.trained()
    (plant.state / "contracts" / "quick-1.json").unlink()
    assert "never agreed to run 'quick-1'" in stopped(plant, request, reply)
    request = plant.question("train", plant.order(1, run="other-7"), TRUNK)
    found, header, metrics = open_records(reply.content)
    forged = Message(to_records(found, changed(header, run="other-7"), metrics), reply_to=request)
    assert "never agreed to run 'other-7'" in stopped(plant, request, forged)


def test_a_run_that_a_person_has_refused_by_now_gets_no_answer(joined: Plant) -> None:
    request, reply = joined.trained()
    consent.decide(joined.state, "quick-1", "refused", "Anna")
    assert "not accepted at this plant but refused" in stopped(joined, request, reply)


@pytest.mark.parametrize("round", [4, 5, 100])
def test_no_more_rounds_leave_than_were_accepted(joined: Plant, round: int) -> None:
    """Behind the app's back: it is handed a round it may answer, and the reply is made to look like a later one."""
    _, reply = joined.trained(3)
    request = joined.question("train", joined.order(round), TRUNK)
    forged = with_changes(request, reply, header=lambda text: changed(text, round=round))
    assert f"round {round}" in stopped(joined, request, forged)


TERMS: dict[str, dict[str, Any]] = {
    "rounds": {"rounds": 300},
    "lend": {"lend": ("trunk", "stem")},
    "plan.batch_size": {"plan": LocalPlan(steps=1, batch_size=1)},
    "about.operator": {"about": About(operator="eve", name="quick", strategy="fedper", rounds=3)},
}


@pytest.mark.parametrize("term", TERMS)
def test_a_changed_term_is_named_and_nothing_leaves(joined: Plant, term: str) -> None:
    _, reply = joined.trained()
    request = joined.question("train", joined.order(1, **TERMS[term]), TRUNK)
    out = joined.answer(request)
    assert out.has_error() and f"`{term}`" in (out.error.reason or ""), "the app itself says it first"
    assert f"`{term}`" in stopped(joined, request, with_changes(request, reply))


def test_a_round_asked_anew_with_other_arrays_has_an_end(joined: Plant) -> None:
    """A centre could learn more of the rows by asking one round over and over with arrays of its choice."""
    passed = 0
    for attempt in range(10):
        arrays = Arrays({name: array + np.float32(attempt) for name, array in TRUNK.items()})
        request = joined.question("train", joined.order(1), arrays)
        out = joined.filter.check(request, joined.answer(request))
        passed += not out.has_error()
    assert passed == 6, "twice as many different updates as the run has rounds"
    assert "6 different answers of the kind update have left" in str(joined.lines()[-1]["error"])
    again = EgressFilter(joined.folder, joined.state, "", describe_tasks)
    request = joined.question("train", joined.order(2), TRUNK)
    assert again.check(request, joined.answer(request)).has_error(), "a restart forgets nothing"


def test_statistics_are_offered_a_few_times_only(plant: Plant) -> None:
    (plant.folder / "policy.toml").write_text('lend = ["trunk", "scaler"]\n')
    plant.base = {"lend": ("trunk", "scaler")}
    plant.join()
    for attempt in range(ONCE + 1):
        request = plant.question("query", plant.order(0))
        _, header, _ = open_records(plant.answer(request).content)
        arrays = open_records(plant.answer(request).content)[0]
        arrays = {**arrays, "scaler.mean": arrays["scaler.mean"] + attempt}
        out = plant.filter.check(request, Message(to_records(arrays, header), reply_to=request))
        assert out.has_error() == (attempt >= ONCE)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("max_bytes_round = 2000", "caps a round at 2 kB"),
        ("max_rounds = 2", "caps a run at 2 rounds"),
        ("metrics = false", "metrics that the policy lets nobody have"),
        ('guards = ["clip"]', "demands the guard"),
        ('lend = ["stem"]', "its policy lends stem"),
        ("decide = ", "stopped by the plant's egress filter: ConfigError."),
    ],
)
def test_the_policy_counts_from_when_it_is_written(joined: Plant, policy: str, words: str) -> None:
    request = joined.question("train", joined.order(2), TRUNK)
    reply = joined.answer(request)
    assert not reply.has_error()
    reply = with_changes(request, reply, metrics=lambda found: {"train_loss": 0.5})
    (joined.folder / "policy.toml").write_text(policy)
    text = stopped(joined, request, reply)
    assert words in text and str(joined.folder) not in text


def test_a_guard_is_held_at_the_door_too(plant: Plant) -> None:
    about = About(operator="hannes", name="quick", strategy="fedper", rounds=3, guards={"clip_norm": 0.01})
    plant.base = {"about": about}
    plant.join()
    request, reply = plant.trained()
    larger = with_changes(request, reply, arrays=lambda arrays: {name: 2 * array for name, array in arrays.items()})
    assert "clip(0.01)" in stopped(plant, request, larger)
    assert not plant.filter.check(request, reply).has_error()


OFFERS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any], str]] = {
    "sensor names": (
        lambda table: {"inputs": {"channels": ["motor_A"], "settings": [], "window": 32}}, {}, "its inputs is not what",
    ),
    "a head": (
        lambda table: {"arrays": [*table["arrays"], {"name": "head.rul.weight", "shape": [3], "dtype": "float32"}]},
        {"head.rul.weight": FEW}, "its arrays is not what",
    ),
    "statistics": (
        lambda table: {"once": [{"name": "scaler.mean", "shape": [3], "dtype": "float32"}]}, {"scaler.mean": FEW}, "its once is",
    ),
    "a word in a task's unit": (
        lambda table: {"tasks": [{**table["tasks"][0], "unit": "unit 17"}, *table["tasks"][1:]]}, {}, "its tasks is not what",
    ),
    "a word in the version": (lambda table: {"version": "unit 17"}, {}, "its version is not what"),
    "hours that site.toml does not have": (
        lambda table: {"hours": PlantHours(zone="Europe/Berlin").model_dump(mode="json")}, {}, "its hours is not what",
    ),
    "arrays beside": (lambda table: {}, {"diary": FEW}, "`diary` is not in this run's contract"),
}  # fmt: skip


@pytest.mark.parametrize("excess", OFFERS)
def test_an_offer_says_what_was_agreed_and_no_more(joined: Plant, excess: str) -> None:
    fields, arrays, words = OFFERS[excess]
    request = joined.question("query", joined.order(0))
    reply = joined.answer(request)
    forged = with_changes(
        request,
        reply,
        arrays=lambda found: {**found, **arrays},
        header=lambda text: changed(text, **fields(json.loads(text))),
    )
    text = stopped(joined, request, forged)
    assert words in text and "unit 17" not in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"arrays": [{"name": "head.rul.weight", "shape": [3], "dtype": "float32"}]},
            "belongs to nothing that the run lends",
        ),
        ({"once": [{"name": "scaler.mean", "shape": [3], "dtype": "float32"}]}, "`scaler.mean` may not leave"),
        ({"inputs": {"channels": ["motor_A"], "settings": [], "window": 32}}, "it names the inputs"),
        ({"unit": "unit 17"}, "what it says of task `rul` is not what site.toml says"),
        ({"task": "unit-17"}, "it names a task that site.toml has not"),
    ],
)
def test_a_contract_that_the_code_behind_the_filter_wrote_itself_widens_nothing(
    joined: Plant, fields: dict[str, Any], words: str
) -> None:
    """A ClientApp that leaks could write the contract as well; what run, policy and site.toml say still holds."""
    kept = contracts.known(joined.state, "quick-1").model_dump(mode="json")
    wide = {name: fields[name] for name in ("arrays", "once", "inputs") if name in fields}
    if "unit" in fields or "task" in fields:
        wide = {"tasks": [{**next(one for one in kept["tasks"] if one["task"] == "rul"), **fields}]}
    contracts.write(joined.state, contracts.Consent.model_validate({**kept, **wide}))
    request = joined.question("query", joined.order(0))
    _, header, _ = open_records(joined.answer(request).content)
    contracts.write(joined.state, contracts.Consent.model_validate({**kept, **wide}))
    arrays = {one["name"]: FEW for part in ("arrays", "once") for one in wide.get(part, [])}
    forged = Message(to_records(arrays, changed(header, **wide)), reply_to=request)
    assert words in stopped(joined, request, forged)


ROW: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "a task that was not agreed": (lambda row: {"task": "unit17"}, "names a task that site.toml has not"),
    "a model's name": (lambda row: {"chosen": "unit 17"}, "under names that are no metric's or model's"),
    "a candidate": (lambda row: {"candidates": {**row["candidates"], "unit 17": 1.0}}, "no metric's or model's"),
    "a metric's name": (lambda row: {"more": {**row["more"], "unit 17": {}}}, "no metric's or model's"),
    "a unit": (lambda row: {"unit": "unit 17"}, "is not what site.toml says"),
}


@pytest.mark.parametrize("excess", ROW)
def test_a_scorecard_has_the_names_of_the_house_and_no_others(joined: Plant, excess: str) -> None:
    fields, words = ROW[excess]
    request = joined.question("evaluate", as_kind(ScoreRequest, joined.order(4)), TRUNK)
    reply = joined.answer(request)

    def with_row(text: str) -> str:
        table = json.loads(text)
        row = table["rows"][0]
        return changed(text, rows=[{**row, **fields(row)}, *table["rows"][1:]])

    text = stopped(joined, request, with_changes(request, reply, header=with_row))
    assert words in text and "unit 17" not in text
    assert not joined.filter.check(request, reply).has_error()


def test_results_stay_where_a_policy_keeps_them(joined: Plant) -> None:
    request = joined.question("evaluate", as_kind(ScoreRequest, joined.order(4)), TRUNK)
    reply = joined.answer(request)
    (joined.folder / "policy.toml").write_text("report = false\n")
    assert "results, which were not agreed on" in stopped(joined, request, reply)


def test_a_fit_query_is_answered_by_one_number(joined: Plant) -> None:
    request = joined.question("query", as_kind(FitQuery, joined.order(2)), TRUNK)
    reply = joined.answer(request)
    for changes in (
        {"metrics": lambda found: {**found, "train_loss": 1.0}},
        {"arrays": lambda found: {"trunk.x": FEW}},
    ):
        assert "is not in this run's contract" in stopped(joined, request, with_changes(request, reply, **changes))
    assert FIT_CONTRACT.metrics == ("validation_loss",)


def test_a_question_that_is_none_of_ours_gets_nothing(joined: Plant) -> None:
    _, reply = joined.trained()
    strange = Message(to_records({}, '{"give": "everything"}'), dst_node_id=2, message_type="train")
    stamp(strange, "strange")
    assert "the question is none of Trunkline's" in stopped(joined, strange, with_changes(strange, reply))
    for kind in ("train.more", "query.more", "train"):
        order = as_kind(FitQuery, joined.order(1)) if kind == "train" else joined.order(1)
        request = joined.question(kind, order, TRUNK)
        assert stopped(joined, request, with_changes(request, reply))


# ---- errors


def test_an_error_leaves_bounded_without_folders_and_is_written_down(joined: Plant) -> None:
    request, _ = joined.trained()
    for code in (CRASHED, REFUSED, RESTARTED, PENDING, DECLINED):
        out = joined.filter.check(request, error_reply(request, "/data/press-07/rows.csv: broken " + "x" * 5000, code))
        assert out.error.code == code and (out.error.reason or "").startswith("rows.csv: broken x")
        assert len(out.error.reason or "") == 1000
        assert joined.lines()[-1]["error"] == [code, out.error.reason]
    out = joined.filter.check(request, error_reply(request, "x", 417017))
    assert out.error.code == CRASHED, "a code is no place for a number of one's own"


def test_an_error_before_anything_is_agreed_leaves_too(plant: Plant) -> None:
    request = Message(RecordDict(), dst_node_id=2, message_type="train")
    stamp(request, "envelope")
    out = plant.filter.check(request, error_reply(request, "the app is not pinned here", REFUSED))
    assert out.error.reason == "the app is not pinned here"
    (line,) = plant.lines()
    assert (line["run"], line["to"], line["kind"]) == ("", "10.0.0.5:9140", "error")


# ---- the manifest


def test_what_cannot_be_written_down_does_not_leave(joined: Plant) -> None:
    request, reply = joined.trained()
    path = joined.state / manifest.MANIFEST
    aside = path.rename(path.with_name("aside"))
    path.mkdir()
    with pytest.raises(StorageError):
        joined.filter.check(request, reply)
    path.rmdir()
    aside.rename(path)
    assert not joined.filter.check(request, reply).has_error()


def test_the_executor_holds_a_reply_until_it_can_be_written_down(joined: Plant, tmp_path: Path) -> None:
    import threading

    from trunkline.client.agent import executor as module
    from trunkline.runtime.incidents import read_incidents
    from trunkline.runtime.programs import make_secret

    worker = module.Executor(
        "127.0.0.1:9",
        make_secret(tmp_path / "secret"),
        tmp_path / "journal.json",
        app,
        set,
        egress_filter=joined.filter,
        timing=module.Timing(retry_s=0.05),
    )
    request, reply = joined.trained()
    path = joined.state / manifest.MANIFEST
    aside = path.rename(path.with_name("aside"))
    path.symlink_to(path.name)  # a loop: cannot be opened, and is replaced in one step
    out: list[Message | None] = []
    holding = threading.Thread(target=lambda: out.append(worker._filter(request, reply)))
    holding.start()
    holding.join(0.4)
    assert holding.is_alive() and not out
    aside.replace(path)
    holding.join(10)
    (let_out,) = out
    assert let_out is not None and not let_out.has_error()
    assert joined.lines()[-1]["kind"] == "update"
    told = [one["kind"] for one in read_incidents(tmp_path, 10)]
    assert told == ["failure", "recovery"], "however often it was tried"
    path.rename(path.with_name("aside"))
    path.mkdir()
    worker._stop.set()
    assert worker._filter(request, reply) is None, "told to end, it ends, and nothing has left"


TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a number in a line": lambda lines: [lines[0], lines[1].replace(b'\\"round\\": 1', b'\\"round\\": 2'), *lines[2:]],
    "a line less": lambda lines: [lines[0], *lines[2:]],
    "the last line less": lambda lines: lines[:-1],
    "two lines swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
    "a line twice": lambda lines: [*lines, lines[-1]],
    "nothing left": lambda lines: [],
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_manifest_that_was_altered_is_found_out_and_stops_every_reply(joined: Plant, change: str) -> None:
    for round in (1, 2):
        joined.filter.check(*joined.trained(round))
    path = joined.state / manifest.MANIFEST
    lines = path.read_bytes().splitlines(keepends=True)
    altered = TAMPERED[change](lines)
    assert altered != lines
    path.write_bytes(b"".join(altered))
    with pytest.raises(TamperError):
        manifest.read_manifest(joined.state)
    request, reply = joined.trained(3)
    with pytest.raises(TamperError):
        EgressFilter(joined.folder, joined.state, "", describe_tasks).check(request, reply)


def test_a_manifest_signed_by_another_key_is_found_out(joined: Plant) -> None:
    (joined.state / "identity" / "records.key").unlink()
    with pytest.raises(TamperError, match=r"not what was written|not written by"):
        manifest.read_manifest(joined.state)


def test_where_the_state_is_sealed_nobody_else_reads_the_manifest(plant: Plant, tmp_path: Path) -> None:
    make_seal(plant.state, f"file:{tmp_path / 'key'}")
    plant.join()
    plant.filter.check(*plant.trained())
    data = (plant.state / manifest.MANIFEST).read_bytes()
    assert b"trunk." not in data and b"hannes" not in data
    assert [line["kind"] for line in plant.lines()] == ["offer", "update"]
    (tmp_path / "key").rename(tmp_path / "gone")
    with pytest.raises(TrustError):
        manifest.read_manifest(plant.state)


# ---- the commands


def command(*arguments: object) -> tuple[int, str]:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "trunkline.cli.app", "client", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_person_reads_and_decides_by_the_command_line(plant: Plant) -> None:
    (plant.folder / "policy.toml").write_text('decide = "ask"\n')
    plant.state = plant.folder / ".trunkline"
    assert plant.join().error.code == PENDING
    code, text = command("contracts", plant.folder)
    assert code == 0 and "quick-1" in text and "hannes" in text and "pending" in text
    code, text = command("contract", plant.folder, "quick-1")
    assert code == 0 and "fedper" in text and "train_loss" in text and "not yet" in text
    assert command("contract", plant.folder, "other")[0] == 1
    assert command("contract", plant.folder, "../x")[0] == 1
    code, text = command("accept", plant.folder, "quick-1", "--by", "Anna")
    assert code == 0 and "accepted by Anna" in text
    assert not plant.join().has_error()
    assert not plant.filter.check(*plant.trained()).has_error()
    code, text = command("manifest", plant.folder)
    assert code == 0 and "error 402" in text and "update" in text and "intact: 3 lines, signed by" in text
    code, text = command("manifest", plant.folder, "--json", "--run", "quick-1")
    assert [json.loads(line)["kind"] for line in text.splitlines()] == ["error", "offer", "update"]
    code, text = command("refuse", plant.folder, "quick-1", "--by", "Anna")
    assert code == 0
    request = plant.question("train", plant.order(2), TRUNK)
    assert plant.answer(request).error.code == DECLINED
    path = plant.state / manifest.MANIFEST
    path.write_bytes(path.read_bytes().replace(b"quick-1", b"quick-2", 1))
    code, text = command("manifest", plant.folder, "--verify")
    assert code == 1 and "line 1" in text and "altered" in text
