"""What a plant's daemon says of its membership, and when it renews its certificate."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import trunkline.security.keys
from trunkline.client.agent import join, membership_monitor
from trunkline.client.agent.membership_monitor import MembershipMonitor, Timing
from trunkline.client.state.identity import Identity
from trunkline.errors import TrustError
from trunkline.runtime.incidents import Incidents, read_incidents
from trunkline.security.enrolment import Hello
from trunkline.security.keys import key_id, read_certificate
from trunkline.server.membership import authority, certificates
from trunkline.server.membership.authority import Authority
from trunkline.server.membership.registry import Registry

SITE = (
    'name = "p"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.t]\nkind = "regression"\ntarget = "t"\nunit = "mm"\n'
)


class Plant:
    """A site that has joined by files; the centre answers by calls instead of a network."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.state, self.said = root / "site", root / "state", []  # type: tuple[Path, Path, list[str]]
        self.site.mkdir()
        (self.site / "site.toml").write_text(SITE)
        authority.init(root / "s", "north", (), key=f"file:{root / 'centre-key'}")
        self.centre = Authority.open(root / "s")
        code, _ = self.centre.invite("p", 1.0)
        join.write_request(self.site, self.state, code, root / "request", key=f"file:{root / 'key'}")
        (root / "answer").write_text(self.centre.admit_file(root / "request").model_dump_json())
        join.accept_admission(self.site, self.state, code, root / "answer", "127.0.0.1:1")
        self.ahead = timedelta(0)
        self.woken = 0
        monkeypatch.setattr(membership_monitor, "hello", self.hello)
        monkeypatch.setattr(join, "_post", self.post)
        self.notes = Incidents(self.state, "p")
        self.monitor = MembershipMonitor(
            self.state, "centre:1", self.said.append, self.wake, incidents=self.notes, timing=Timing(ask_s=0.0)
        )

    def wake(self) -> None:
        self.woken += 1

    def hello(self, state: Path, server: str) -> tuple[Hello, datetime]:
        entry = Registry(self.centre.state).read().welcome().get("p")
        if entry is None:
            raise TrustError("centre:1: p: this certificate was revoked")
        at = datetime.now(UTC) - self.ahead
        return Hello(site="p", now=at.isoformat(), until=entry.until, version="0"), at

    def post(self, server: str, path: str, context: object, body: join.RenewRequest, kind: type) -> object:
        own = read_certificate(Identity.of(self.state).certificate)
        return self.centre.renew(body.request, key_id(own.public_key()))

    def incidents(self) -> list[tuple[str, str]]:
        return [(one["kind"], one["text"]) for one in read_incidents(self.state, 100)]

    def until(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 20.0
        while not found():
            assert time.monotonic() < end, self.said
            self.monitor.tick()
            time.sleep(0.01)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    return Plant(tmp_path, monkeypatch)


def test_all_is_well_and_said_once(plant: Plant) -> None:
    plant.until(lambda: bool(plant.said))
    for _ in range(100):
        plant.monitor.tick()
        time.sleep(0.002)
    assert plant.said == ["the server at centre:1 knows this site as p"]
    assert plant.monitor.summary["warnings"] == [] and plant.woken == 0


def test_a_clock_that_is_off_is_told_before_it_shuts_the_site_out(plant: Plant) -> None:
    plant.ahead = timedelta(seconds=4)
    plant.until(lambda: any("the clock here is 4 s ahead of the server's" in one for one in plant.said))
    plant.ahead = timedelta(seconds=-200)
    plant.until(lambda: any("the clock here is 200 s behind the server's" in one for one in plant.said))


def test_a_certificate_is_renewed_when_a_third_of_its_life_is_left(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Identity.of(plant.state).certificate
    before = read_certificate(own)
    plant.until(lambda: bool(plant.said))
    assert read_certificate(own) == before
    real = trunkline.security.keys.now
    for module in (trunkline.security.keys, authority, certificates):
        monkeypatch.setattr(module, "now", lambda: real() + timedelta(days=250))
    plant.until(lambda: read_certificate(own) != before)
    after = read_certificate(own)
    assert after.public_key() == before.public_key() and after.not_valid_after_utc > before.not_valid_after_utc
    plant.until(lambda: plant.woken == 1)  # what had failed for the old one tries again at once


def test_a_certificate_that_cannot_be_renewed_is_warned_of_ahead_of_time(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: object) -> None:
        raise TrustError("centre:1: cannot be reached")

    monkeypatch.setattr(membership_monitor, "hello", away)
    real = trunkline.security.keys.now
    monkeypatch.setattr(trunkline.security.keys, "now", lambda: real() + timedelta(days=355))
    plant.until(lambda: any("this site's certificate expires in 10 days" in one for one in plant.said))
    assert any("cannot be reached" in one for one in plant.said)


def test_a_revoked_site_is_told_so_as_soon_as_something_goes_wrong(plant: Plant) -> None:
    plant.monitor.timing = Timing(ask_s=1000.0)
    plant.until(lambda: bool(plant.said))
    authority.revoke(plant.centre.state, "p", "sold")
    plant.monitor.tick()
    assert not any("was revoked" in one for one in plant.said)
    plant.monitor.hurry()
    plant.until(lambda: any("was revoked" in one for one in plant.said))


def test_a_link_that_is_lost_and_a_clock_that_is_off_are_each_an_incident_once(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.until(lambda: bool(plant.said))
    assert plant.incidents() == [] and plant.monitor.summary["connected"]
    asked: list[str] = []

    def away(*arguments: object) -> None:
        asked.append("timed out" if len(asked) % 2 else "cannot be reached")
        raise TrustError(f"centre:1: {asked[-1]}")

    with monkeypatch.context() as patch:
        patch.setattr(membership_monitor, "hello", away)
        plant.until(lambda: len(asked) >= 6)
    plant.ahead = timedelta(seconds=-100)
    plant.until(lambda: bool(plant.monitor.summary["connected"]) and len(plant.incidents()) == 4)
    plant.ahead = timedelta(seconds=-200)  # another sentence, and the same incident
    plant.until(lambda: any("200 s behind" in one for one in plant.said))
    plant.ahead = timedelta(0)
    plant.until(lambda: len(plant.incidents()) == 5)
    kinds, texts = zip(*plant.incidents(), strict=True)
    assert kinds == ("failure", "failure", "recovery", "failure", "recovery")
    assert "no link to the server at centre:1: centre:1: cannot be reached" in texts[0] and "timed out" in texts[1]
    assert texts[2].startswith("the link is back") and "100 s behind" in texts[3] and "agree again" in texts[4]
