"""Gathering: while a run waits for plants, its events name those that are here and those that are missing."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.config.run import CohortConfig
from trunkline.errors import QuorumError
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.events import Event, SitesGathering
from trunkline.server.rounds import cohort as cohorts
from trunkline.server.rounds.cohort import Cohort


class Deployment:
    """A SuperLink at which no node answers, and a clock that runs on with each pause."""

    durable, local, complete, journalled, waits, stacks = True, False, False, True, False, None

    def __init__(self) -> None:
        self.clock, self.seconds = self, 0.0

    def monotonic(self) -> float:
        return self.seconds

    def pause(self, seconds: float, most: float) -> None:
        self.seconds += seconds

    def get_node_ids(self) -> list[int]:
        return []


def gather(
    joins: Callable[[float], list[str]], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> list[SitesGathering]:
    """The events of a gathering of 130 s at which too few plants come.

    Args:
        joins: seconds -> the sites that have joined by then.
    """
    transport, events = Deployment(), list[Event]()
    roster = {2: "press-01", 3: "kiln-02", 4: "mill-04", 5: "pump-03"}
    config = CohortConfig(gather_s=130.0, **settings)
    offer: Any = SimpleNamespace(lend=("trunk",), run="run")
    cohort = Cohort(transport, config, offer, Arrays(), events.append, lambda: roster)  # type: ignore[arg-type]

    def greet(deadline_s: float) -> None:
        cohort.members = dict.fromkeys(joins(transport.seconds))  # type: ignore[assignment]

    monkeypatch.setattr(cohort, "greet", greet)
    monkeypatch.setattr(cohorts, "GREET_S", 5.0)
    with pytest.raises(QuorumError, match="sites have joined"):
        cohort.gather()
    return [event for event in events if isinstance(event, SitesGathering)]


def test_a_run_that_waits_reports_it_at_once_at_changes_and_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    everybody = ("kiln-02", "mill-04", "press-01", "pump-03")
    before = SitesGathering((), 4, everybody)
    after = SitesGathering(("mill-04", "press-01"), 4, ("kiln-02", "pump-03"))
    events = gather(lambda seconds: ["press-01", "mill-04"] if seconds >= 65.0 else [], monkeypatch, min_sites=4)
    assert events == [before, before, after, after]


def test_a_site_that_run_toml_names_is_missing_even_if_it_is_not_enrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    first = gather(lambda seconds: ["press-01"], monkeypatch, min_sites=1, sites=("press-01", "saw-09"))[0]
    assert first.wanted == 2
    assert "saw-09" in first.missing
