"""A plant's own word wins over the server: what it forbids is not sent, or it stays out and says why."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from tests.loopback import QUICK, WatchedGrid, arrays_in, events_of, federate, refusals_of
from tests.typed_requests import as_kind, request_of
from trunkline.client.handlers import answer_offer, answer_score, answer_train
from trunkline.client.policy import consent, contracts
from trunkline.client.site import Site, open_site
from trunkline.client.state.at_rest import seal_state
from trunkline.client.state.rekeying import rekey
from trunkline.config.run import parse_run
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, ContractError, Declined, Pending
from trunkline.flower.records import open_records
from trunkline.models.trunk import first_trunk
from trunkline.protocol.contract import metric_names
from trunkline.protocol.messages import ScoreRequest
from trunkline.protocol.plan import About, Conditions, LocalPlan, TrunkSpec
from trunkline.runtime.programs import account_name
from trunkline.security.encryption import is_sealed, make_seal, sealing_key_name
from trunkline.server.reporting.report import read_report

SPEC = TrunkSpec(width=16)


def with_policy(plants: list[Path], tmp_path: Path, text: str) -> list[Path]:
    """Copies of the plants, the first of them with a policy."""
    folders = [Path(shutil.copytree(folder, tmp_path / "sites" / folder.name)) for folder in plants]
    (folders[0] / "policy.toml").write_text(text)
    return folders


def notes_of(out: Path) -> list[str]:
    return [event["text"] for event in events_of(out) if event["event"] == "note"]


def order_of(round: int, **changes: Any) -> Any:
    about = About(operator="hannes", name="quick", strategy="fedper", rounds=3)
    request = request_of(
        round, run="quick-1", seed=1, rounds=3, trunk=SPEC, plan=LocalPlan(steps=1, batch_size=16), lend=("trunk",),
        baseline=False, about=about,
    )  # fmt: skip
    return request.model_copy(update=changes)


# ---- the file


def test_a_policy_file_replaces_the_table_and_both_are_one_too_many(plants: list[Path], tmp_path: Path) -> None:
    (folder, *_) = with_policy(plants, tmp_path, 'decide = "ask"\nmax_rounds = 3\n')
    assert (read_site(folder).policy.decide, read_site(folder).policy.max_rounds) == ("ask", 3)
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text + '\n[policy]\nlend = ["trunk"]\n')
    with pytest.raises(ConfigError, match=r"site\.toml: `policy` is here and in .*policy\.toml too"):
        read_site(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_round = 3", ["unknown key `max_round`", "did you mean 'max_rounds'"]),
        ('decide = "maybe"', ["`decide`", "'maybe'"]),
        ("max_clip_norm = 3.0", ["`max_clip_norm` is the bound of a guard that is not demanded"]),
        ('guards = ["noise"]', ["`guards.0`", "'clip'"]),
    ],
)
def test_a_mistake_in_a_policy_file_names_that_file(
    plants: list[Path], tmp_path: Path, text: str, words: list[str]
) -> None:
    (folder, *_) = with_policy(plants, tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_site(folder)
    for word in [str(folder / "policy.toml"), *words]:
        assert word in str(caught.value)


def test_a_policy_file_is_no_data(plants: list[Path], tmp_path: Path) -> None:
    from trunkline.client.data.notes import Findings
    from trunkline.client.data.read import find_files

    (folder, *_) = with_policy(plants, tmp_path, 'decide = "ask"\n')
    found = find_files(folder, "*", "files", Findings())
    assert found and not {path.name for path in found} & {"policy.toml", "site.toml"}


# ---- what it forbids, over whole runs


@pytest.mark.parametrize(
    ("policy", "settings", "words"),
    [
        ("max_bytes_round = 1000", {}, ["its policy caps a round at 1 kB; this run takes "]),
        ("max_rounds = 2", {}, ["its policy caps a run at 2 rounds; this run has 3"]),
        ("max_rounds = 5", {"refit": True}, ["its policy caps a run at 5 rounds; this run has 6"]),
        ('guards = ["clip"]', {}, ["its policy demands the guard `clip`; this run has none"]),
        (
            'guards = ["clip"]\nmax_clip_norm = 1.0',
            {"guards": {"clip_norm": 2.0}},
            ["its policy demands the guard clip(1) or tighter; this run has clip(2)"],
        ),
        ('strategies = ["fedavg"]', {}, ["its policy allows the strategies fedavg; this run uses fedper"]),
        (
            'operators = ["anna"]',
            {"operator": "hannes"},
            ["its policy takes part in runs of anna; this one is of hannes"],
        ),
        ('decide = "refuse"', {}, ["its policy takes part in no run"]),
        ('decide = "refuse"\nruns = ["winter"]', {}, ["its policy takes part in no run but winter"]),
        ('lend = ["stem"]', {}, ["its policy lends stem; this run wants 'trunk'"]),
    ],
)
@pytest.mark.parametrize("plant", [True, False])
def test_a_run_that_a_policy_forbids_goes_on_without_that_site_and_says_why(
    plants: list[Path], tmp_path: Path, policy: str, settings: dict[str, Any], words: list[str], plant: bool
) -> None:
    folders = with_policy(plants[:3], tmp_path, policy)
    grid = federate(folders, tmp_path / "out", plant=plant, **{"rounds": 3, **settings})
    site = folders[0].name
    assert not [content for _, node, content in grid.up if node == 2], "nothing left the site"
    for word in words:
        assert any(f"{site} does not take part: {word}" in note for note in notes_of(tmp_path / "out"))
    for one in read_report(tmp_path / "out")["rounds"]:
        assert one["sites"] == [folder.name for folder in folders[1:]]
    if plant:
        (kept,) = contracts.every(tmp_path / "out" / "state" / site)
        assert (kept.verdict, kept.by) == ("refused", "policy") and words[0] in kept.why


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("max_bytes_round = 10_000_000\nmax_rounds = 3", {}),
        ('guards = ["clip"]\nmax_clip_norm = 1.0', {"guards": {"clip_norm": 0.5}}),
        ('strategies = ["fedper"]\noperators = ["hannes"]', {"operator": "hannes"}),
        ('decide = "refuse"\nruns = ["quick"]', {}),
        ('decide = "ask"\nruns = ["quick"]', {}),
    ],
)
def test_a_run_within_a_policy_is_taken_part_in(
    plants: list[Path], tmp_path: Path, policy: str, settings: dict[str, Any]
) -> None:
    folders = with_policy(plants[:2], tmp_path, policy)
    federate(folders, tmp_path / "out", plant=True, **settings)
    assert all(len(one["sites"]) == 2 for one in read_report(tmp_path / "out")["rounds"])
    assert not any(one for one in refusals_of(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("policy", "sent"),
    [("metrics = false", set()), ('metrics = ["train_loss"]', {"train_loss"}), ("metrics = true", None)],
)
@pytest.mark.parametrize("plant", [True, False])
def test_metrics_that_a_policy_forbids_are_not_sent_and_the_run_goes_on(
    plants: list[Path], tmp_path: Path, policy: str, sent: set[str] | None, plant: bool
) -> None:
    folders = with_policy(plants[:3], tmp_path, policy)
    grid = federate(folders, tmp_path / "out", plant=plant)
    found = {
        node: set().union(
            *(open_records(content)[2] for kind, by, content in grid.up if kind == "train" and by == node)
        )
        for node in (2, 3, 4)
    }
    assert {"train_loss", "validation_loss"} < found[3]
    assert found[2] == sent if sent is not None else {"train_loss", "validation_loss"} < found[2]
    report = read_report(tmp_path / "out")
    assert all(len(one["sites"]) == 3 and not one["refused"] for one in report["rounds"])
    assert all(one["train_loss"] is not None for one in report["rounds"])
    offered = next(open_records(content)[1] for kind, node, content in grid.up if kind == "query" and node == 2)
    if sent is not None:
        assert set(json.loads(offered)["metrics"]) == sent


def test_a_metric_that_was_not_offered_is_refused_by_the_server(plants: list[Path], tmp_path: Path) -> None:
    """The contract shrinks at the centre too: what a policy forbids cannot come in by a site that forgets it."""
    folders = with_policy(plants[:3], tmp_path, "metrics = false")

    def tamper(message: Message, honest: Any) -> Message:
        from trunkline.flower.records import to_records

        reply: Message = honest()
        if message.metadata.message_type != "train":
            return reply
        arrays, header, _ = open_records(reply.content)
        return Message(to_records(arrays, header, {"train_loss": 1.0}), reply_to=message)

    federate(folders, tmp_path / "out", tamper={2: tamper})
    for refused in refusals_of(tmp_path / "out").values():
        assert "metric `train_loss` is not in this run's contract" in refused[folders[0].name]


def test_a_site_whose_policy_keeps_results_at_home_sends_no_row_and_keeps_its_own(
    plants: list[Path], tmp_path: Path
) -> None:
    folders = with_policy(plants[:2], tmp_path, "report = false")
    grid = federate(folders, tmp_path / "out", plant=True)
    assert {row["site"] for row in read_report(tmp_path / "out")["sites"]} == {folders[1].name}
    (card,) = [content for kind, node, content in grid.up if kind == "evaluate" and node == 2]
    assert json.loads(open_records(card)[1])["rows"] == []
    assert list((tmp_path / "out" / "state" / folders[0].name).rglob("evaluation/*/*.safetensors"))


def test_a_fit_query_is_not_answered_where_the_loss_may_not_leave(plants: list[Path], tmp_path: Path) -> None:
    folders = with_policy(plants, tmp_path, "metrics = false")
    settings = {
        "strategy": {"name": "clustered", "count": 2, "warm_rounds": 1, "every": 1, "assign": "validation"},
        "rounds": 4,
    }
    grid = federate(folders, tmp_path / "out", plant=True, **settings)
    answers = [node for kind, node, content in grid.up if kind == "query" and open_records(content)[2]]
    assert 3 in answers and 2 not in answers
    assert any("its policy lets no `validation_loss` leave" in note for note in notes_of(tmp_path / "out"))
    assert all(len(one["sites"]) == 4 for one in read_report(tmp_path / "out")["rounds"])


# ---- asking a person


@pytest.fixture
def quick_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    from trunkline.server.rounds import cohort

    monkeypatch.setattr(cohort, "CONSENT_S", 0.05)
    monkeypatch.setattr(cohort, "GREET_S", 0.05)


def the_contract(state: Path) -> contracts.Consent | None:
    return next(contracts.every(state), None)


def test_a_run_waits_for_a_persons_yes_and_says_once_for_whom(
    plants: list[Path], tmp_path: Path, quick_questions: None
) -> None:
    folders = with_policy(plants[:2], tmp_path, 'decide = "ask"')
    state = tmp_path / "out" / "state" / folders[0].name
    grid = WatchedGrid(folders, tmp_path / "out", None, True)

    def agree() -> None:
        end = time.monotonic() + 20
        while len([1 for kind, node, _ in grid.down if kind == "query" and node == 2]) < 3 and time.monotonic() < end:
            time.sleep(0.02)  # it is asked a few times before it says yes
        found = the_contract(state)
        assert found is not None
        consent.decide(state, found.run, "accepted", "Anna")

    person = threading.Thread(target=agree)
    person.start()
    federate(
        folders,
        tmp_path / "out",
        grid=grid,
        plant=True,
        cohort={"min_sites": 2, "deadline_s": 20.0, "gather_s": 20.0},
    )
    person.join(timeout=20)
    assert len([1 for kind, node, _ in grid.down if kind == "query" and node == 2]) > 2
    waiting = [note for note in notes_of(tmp_path / "out") if "waits for its plant's consent" in note]
    assert (
        len(waiting) == 1
        and waiting[0].startswith(f"{folders[0].name} waits")
        and "trunkline client accept" in waiting[0]
    )
    assert all(len(one["sites"]) == 2 for one in read_report(tmp_path / "out")["rounds"])
    kept = the_contract(state)
    assert kept is not None and (kept.verdict, kept.by) == ("accepted", "Anna")


def test_a_run_starts_without_a_plant_that_has_not_decided_and_takes_it_in_when_it_has(
    plants: list[Path], tmp_path: Path, quick_questions: None
) -> None:
    folders = with_policy(plants[:3], tmp_path, 'decide = "ask"')
    state = tmp_path / "out" / "state" / folders[0].name

    def agree(message: Message, honest: Any) -> Message:
        reply: Message = honest()
        if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] == 1:
            found = the_contract(state)
            assert found is not None and found.verdict == "pending"
            consent.decide(state, found.run, "accepted", "Anna")
            time.sleep(0.1)
        return reply

    federate(folders, tmp_path / "out", plant=True, tamper={3: agree})
    sites = [one["sites"] for one in read_report(tmp_path / "out")["rounds"]]
    assert folders[0].name not in sites[0] and folders[0].name in sites[1] and folders[0].name in sites[2]


def test_a_persons_no_under_way_ends_it_for_that_site_alone(plants: list[Path], tmp_path: Path) -> None:
    folders = with_policy(plants[:3], tmp_path, 'decide = "accept"')
    state = tmp_path / "out" / "state" / folders[0].name

    def object_(message: Message, honest: Any) -> Message:
        reply: Message = honest()
        if message.metadata.message_type == "train" and json.loads(open_records(message.content)[1])["round"] == 1:
            found = the_contract(state)
            assert found is not None
            consent.decide(state, found.run, "refused", "Anna")
        return reply

    federate(folders, tmp_path / "out", plant=True, tamper={4: object_})
    site = folders[0].name
    refused = refusals_of(tmp_path / "out")
    assert site not in refused[1]
    for round in (2, 3):
        assert refused[round][site] == f"{site}, round {round}: no update. refused at the plant by Anna."


def test_nothing_is_asked_or_written_in_a_simulation(plants: list[Path], tmp_path: Path) -> None:
    folders = with_policy(plants[:2], tmp_path, 'decide = "ask"')
    federate(folders, tmp_path / "out")
    assert all(len(one["sites"]) == 2 for one in read_report(tmp_path / "out")["rounds"])
    assert not list((tmp_path / "out" / "state").glob("*/contracts"))
    assert not list((tmp_path / "out" / "state").glob("*/manifest*"))


# ---- held to it


@pytest.fixture
def plant(plants: list[Path], tmp_path: Path) -> Site:
    folder = Path(shutil.copytree(plants[0], tmp_path / plants[0].name))
    return open_site({"site": str(folder), "state": str(tmp_path / "state"), "plant": 1})


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "more lent": ({"lend": ("trunk", "stem")}, "`lend`"),
    "more rounds": ({"rounds": 300}, "`rounds` was 3, is 300"),
    "more work": ({"plan": LocalPlan(steps=1, batch_size=1)}, "`plan.batch_size` was 16, is 1"),
    "another operator": ({"about": About(operator="eve", name="quick", strategy="fedper", rounds=3)}, '"hannes", is "eve"'),
    "a guard dropped": ({"about": About(name="quick", strategy="fedper", rounds=3)}, "`about.operator`"),
    "another guard": (
        {"about": About(operator="hannes", name="quick", strategy="fedper", rounds=3, guards={"clip_norm": 9.0})},
        "`about.guards.clip_norm` was null, is 9.0",
    ),
    "another seed": ({"seed": 2}, "`seed` was 1, is 2"),
    "a larger weight": ({"weight_cap": 10**9}, "`weight_cap`"),
    "a baseline": ({"baseline": True}, "`baseline`"),
    "few rows": ({"conditions": Conditions(labelled=0.001)}, "for simulations only"),
    "a later round": ({"round": 5}, "has 3 rounds; this request is for round 5"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_order_that_takes_more_than_the_plant_was_asked_for_is_refused_in_words(plant: Site, change: str) -> None:
    changes, words = CHANGES[change]
    trunk = first_trunk(SPEC, 1)
    answer_offer(plant, order_of(0))
    _, entry = answer_train(plant, order_of(1), trunk)
    assert entry.delta
    with pytest.raises(ContractError) as caught:
        answer_train(plant, order_of(2).model_copy(update=changes), trunk)
    assert words in str(caught.value)
    with pytest.raises(ContractError):
        answer_score(plant, as_kind(ScoreRequest, order_of(4), **changes), trunk)
    answer_train(plant, order_of(2), trunk)  # the run itself goes on


def test_a_run_that_never_asked_gets_nothing(plant: Site) -> None:
    with pytest.raises(ContractError, match="never agreed to run 'quick-1'"):
        answer_train(plant, order_of(1), first_trunk(SPEC, 1))
    assert not (plant.state / "vault").exists()


def asking(plant: Site, tmp_path: Path) -> Site:
    (plant.folder / "policy.toml").write_text('decide = "ask"\n')
    return open_site({"site": str(plant.folder), "state": str(tmp_path / "asked"), "plant": 1}, fresh=True)


def test_an_accepted_contract_that_changes_in_any_term_asks_again(plant: Site, tmp_path: Path) -> None:
    site = asking(plant, tmp_path)
    with pytest.raises(Pending, match="has not agreed yet"):
        answer_offer(site, order_of(0))
    consent.decide(site.state, "quick-1", "accepted", "Anna")
    answer_offer(site, order_of(0))
    answer_train(site, order_of(1), first_trunk(SPEC, 1))
    for changes, _ in list(CHANGES.values())[2:9]:
        with pytest.raises(Pending):
            answer_offer(site, order_of(0, **changes))
        with pytest.raises((Pending, ContractError)):
            answer_train(site, order_of(1, **changes), first_trunk(SPEC, 1))
        consent.decide(site.state, "quick-1", "accepted", "Anna")


def test_a_persons_yes_does_not_stand_above_the_policy(plant: Site, tmp_path: Path) -> None:
    site = asking(plant, tmp_path)
    with pytest.raises(Pending):
        answer_offer(site, order_of(0))
    consent.decide(site.state, "quick-1", "accepted", "Anna")
    (plant.folder / "policy.toml").write_text('decide = "ask"\nmax_rounds = 2\n')
    strict = open_site({"site": str(plant.folder), "state": str(tmp_path / "asked"), "plant": 1}, fresh=True)
    with pytest.raises(Declined, match="caps a run at 2 rounds"):
        answer_offer(strict, order_of(0))
    with pytest.raises(ContractError, match="policy refuses"):
        consent.decide(strict.state, "quick-1", "accepted", "Anna")


def test_where_the_state_is_sealed_the_contract_is_too(plant: Site, tmp_path: Path) -> None:
    make_seal(plant.state, f"file:{tmp_path / 'key'}")
    answer_offer(plant, order_of(0))
    data = (plant.state / "contracts" / "quick-1.json").read_bytes()
    assert is_sealed(data) and b"hannes" not in data
    assert contracts.known(plant.state, "quick-1").verdict == "accepted"


def test_a_contract_goes_with_the_state_when_it_is_sealed_and_when_its_key_changes(plant: Site, tmp_path: Path) -> None:
    answer_offer(plant, order_of(0))
    path = plant.state / "contracts" / "quick-1.json"
    assert not is_sealed(path.read_bytes())
    first = seal_state(plant.state, f"file:{tmp_path / 'key'}")
    assert is_sealed(path.read_bytes()), "what lay there in the clear is sealed with the rest"
    assert contracts.known(plant.state, "quick-1").verdict == "accepted"
    told: list[str] = []
    second = rekey(plant.state, forget=True, tell=told.append)
    assert second.name != first.name and sealing_key_name(path.read_bytes()) == second.name, told
    assert contracts.known(plant.state, "quick-1").verdict == "accepted"
    assert not any("Left as it is" in text for text in told), told


def test_a_contract_says_in_words_what_the_run_would_take(plant: Site) -> None:
    lend = ("trunk", "stem")
    evil = About(operator="hannes \x9b31m"[:7], name="quick", strategy="fedper", rounds=3, guards={"clip_norm": 2.5})
    request = order_of(0, lend=lend, about=evil, trunk=SPEC)
    offer, _ = answer_offer(plant, request)
    words = dict(contracts.in_words(contracts.known(plant.state, "quick-1")))
    size = sum(spec.nbytes for spec in offer.arrays)
    assert (
        size > 1000
        and contracts.in_bytes(size + 8 * len(offer.metrics) + contracts.HEADER_BYTES) in words["a round takes"]
    )
    assert f"{len(offer.arrays)} arrays" in words["a round takes"] and "stem" in words["a round takes"]
    assert words["lends"] == "trunk, stem" and words["guards"] == "clip(2.5)"
    assert set(words["metrics"].split(", ")) == set(metric_names(offer.tasks))
    assert words["sensor names"] == ", ".join(plant.data.channels)
    assert words["verdict"] == "accepted by policy" and words["rounds"].startswith(
        "3, in each 1 steps of up to 16 rows"
    )


def test_the_words_of_a_centre_are_shown_and_never_obeyed() -> None:
    assert contracts.plain("a\x1b[31mred\x07") == "a?[31mred?"


def test_the_operator_is_said_by_the_run_file_or_is_the_account(plants: list[Path], tmp_path: Path) -> None:
    import socket

    for name, said in (("a", {"operator": "Hannes at the institute"}), ("b", {})):
        grid = federate(plants[:1], tmp_path / name, rounds=1, **said)
        told = json.loads(open_records(grid.down[0][2])[1])["about"]["operator"]
        assert told == said.get("operator", f"{account_name()}@{socket.gethostname()}"[:120])
    with pytest.raises(ConfigError, match="`operator`"):
        parse_run({"operator": "a\x1b[31m"}, "run.toml")


def test_an_orders_header_stays_small(plants: list[Path], tmp_path: Path) -> None:
    grid = federate(plants[:1], tmp_path, rounds=1)
    header = open_records(grid.down[0][2])[1]
    assert len(json.dumps(json.loads(header)["about"])) < 250
    assert QUICK["name"] in header and isinstance(grid, WatchedGrid) and arrays_in(grid.up[0][2]) == {}
