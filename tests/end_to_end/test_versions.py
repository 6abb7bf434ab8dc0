"""A server and sites of other versions work together, or say which of them is the older one and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

import trunkline
from tests.loopback import WatchedGrid, events_of, federate, refusals_of
from trunkline.errors import ContractError, QuorumError
from trunkline.flower.grid import LoopbackGrid
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.header import read_header
from trunkline.protocol.messages import PROTOCOL, Offer, Reply, Scorecard, TrainRequest

HERE = trunkline.__version__
SMALL: dict[str, Any] = {
    "rounds": 1, "trunk": {"width": 4}, "training": {"steps": 1, "batch_size": 16}, "strategy": {"name": "fedrep"}
}  # fmt: skip
Change = Callable[[dict[str, Any]], dict[str, Any]]


def changed(message: Message, change: Change) -> None:
    arrays, header, metrics = open_records(message.content)
    message.content = to_records(arrays, json.dumps(change(json.loads(header))), metrics)


class OtherServer(WatchedGrid):
    """Every order goes out as another version of Trunkline would have written it."""

    change: Change

    def _dispatch(self, message: Message, context: Context) -> None:
        changed(message, self.change)
        LoopbackGrid._dispatch(self, message, context)


def other_site(kind: str, change: Change) -> Callable[[Message, Callable[[], Message]], Message]:
    """Answers of this kind come as another version of Trunkline would have written them."""

    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if message.metadata.message_type == kind:
            changed(reply, change)
        return reply

    return tamper


def with_(**more: Any) -> Change:
    return lambda header: {**header, **more}


def without(key: str) -> Change:
    return lambda header: {name: value for name, value in header.items() if name != key}


@pytest.mark.parametrize(
    ("change", "why", "older", "to"),
    [
        (with_(protocol=PROTOCOL + 1), f"It speaks protocol {PROTOCOL + 1}, and here {PROTOCOL}", "site", ""),
        (with_(protocol=PROTOCOL - 1), f"It speaks protocol {PROTOCOL - 1}, and here {PROTOCOL}", "server", f" to {HERE}"),
        (with_(shoe_size=43), "a key `shoe_size` that is not known here", "site", ""),
        (without("plan"), "no key `plan`", "server", f" to {HERE}"),
    ],
    ids=["newer server", "older server", "server with a new key", "server without a key"],
)  # fmt: skip
def test_a_site_says_whether_it_or_the_server_is_older(
    plants: list[Path], tmp_path: Path, change: Change, why: str, older: str, to: str
) -> None:
    grid = OtherServer(plants[:1], tmp_path)
    grid.change = change
    with pytest.raises(QuorumError) as stopped:
        federate(plants[:1], tmp_path, grid=grid, **{**SMALL, "cohort": {"min_sites": 1, "gather_s": 1.0}})
    text = str(stopped.value)
    assert why in text
    other = "server" if older == "site" else "site"
    assert f"the {older}'s Trunkline{f' {HERE}' if older == 'site' else ''} is older than the {other}'s" in text
    assert f"Update Trunkline at the {older}{to}." in text
    assert (f"This server's Trunkline is {HERE}." in text) == (older == "site")
    assert not (tmp_path / "state" / plants[0].name / "vault").exists()


@pytest.mark.parametrize(
    ("change", "why", "older", "to"),
    [
        (with_(protocol=PROTOCOL + 1, version="0.9.0"), f"It speaks protocol {PROTOCOL + 1}", "server", " to 0.9.0"),
        (with_(protocol=PROTOCOL - 1, version="0.0.9"), f"It speaks protocol {PROTOCOL - 1}", "site", f" to {HERE}"),
        (with_(shoe_size=43, version="0.9.0"), "a key `shoe_size` that is not known here", "server", " to 0.9.0"),
        (without("tasks"), "no key `tasks`", "site", f" to {HERE}"),
    ],
    ids=["newer site", "older site", "site with a new key", "site without a key"],
)
def test_a_server_says_which_site_is_older_or_that_it_is_itself(
    plants: list[Path], tmp_path: Path, change: Change, why: str, older: str, to: str
) -> None:
    grid = WatchedGrid(plants[:2], tmp_path, {2: other_site("query", change)})
    federate(plants[:2], tmp_path, grid=grid, **SMALL)  # the others go on
    (text,) = (event["text"] for event in events_of(tmp_path) if "does not take part" in event.get("text", ""))
    assert text.startswith("node 2 does not take part: ")
    assert why in text
    assert f"Update Trunkline at the {older}{to}." in text
    assert ("0.0.9" in text) == (f"It speaks protocol {PROTOCOL - 1}" in text)


def test_a_site_that_was_updated_within_a_run_costs_its_own_update_and_the_server_knows_what_it_was(
    plants: list[Path], tmp_path: Path
) -> None:
    odd = with_(protocol=PROTOCOL + 1)
    tamper = {2: other_site("train", odd), 3: other_site("evaluate", with_(bonus=1))}
    federate(plants[:2], tmp_path, tamper=tamper, **{**SMALL, "cohort": {"min_sites": 2, "quorum": 0.5}})
    (told,) = refusals_of(tmp_path).values()
    assert f"{plants[0].name}, round 1: reply set aside. It speaks protocol {PROTOCOL + 1}" in told[plants[0].name]
    assert f"the server's Trunkline {HERE} is older than the site's Trunkline. Update" in told[plants[0].name]
    (text,) = (event["text"] for event in events_of(tmp_path) if "`bonus`" in event.get("text", ""))
    assert text.startswith(f"{plants[1].name}, round 2: reply set aside.")
    assert "Update Trunkline at the server" in text


@pytest.mark.parametrize("kind", [TrainRequest, Offer, Reply, Scorecard])
def test_every_header_is_told_apart_by_its_protocol_before_anything_else(kind: type[Any]) -> None:
    with pytest.raises(ContractError, match=r"protocol 99.*the server's Trunkline .* is older than the site's"):
        read_header(kind, '{"protocol": 99, "round": "what a round is then"}', "server")


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '"x"', "[" * 100_000])
def test_what_is_no_header_is_nobodys_version(text: str) -> None:
    with pytest.raises(ContractError, match="no JSON object, so the site is no Trunkline of ours"):
        read_header(Reply, text, "server")


def test_the_other_sides_words_do_not_reach_a_terminal_as_they_are() -> None:
    with pytest.raises(ContractError) as refused:
        read_header(Reply, json.dumps({"protocol": 99, "version": "\x1b[2J" + "9" * 500}), "server")
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 400
