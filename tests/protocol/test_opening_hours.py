"""A plant's hours by the clock on its wall: shifts over midnight, clocks that are changed, closures; and the tests' clock."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trunkline.config.site import SiteConfig, read_site
from trunkline.errors import ConfigError
from trunkline.protocol import opening_hours as hours
from trunkline.protocol.messages import Offer
from trunkline.protocol.opening_hours import DAYS, Calendar, PlantHours

HALF, QUARTER = timedelta(minutes=30), timedelta(minutes=15)
# beside whole hours: clocks that move by half an hour, zones of 45 minutes, changes at midnight, in the south
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Chatham", "America/Asuncion"]
# moments around which somebody's clocks are changed, and a plain week
AROUND = [
    datetime(2026, 3, 27),
    datetime(2026, 4, 3),
    datetime(2026, 10, 2),
    datetime(2026, 10, 23),
    datetime(2026, 6, 1),
]


def written_out(own: PlantHours) -> set[datetime]:
    """Every open half hour by the wall clock in a year and a bit, one by one."""
    slots, day = set(), date(2026, 1, 1)
    while day < date(2027, 2, 1):
        if DAYS[day.weekday()] in own.days:
            for begin, end in own.hours:
                at = datetime(day.year, day.month, day.day) + timedelta(hours=begin)
                for _ in range(int(2 * (end - begin if end > begin else end + 24 - begin))):
                    slots.add(at)
                    at += HALF
        day += timedelta(days=1)
    for one in own.closed:
        begin, end = (datetime.fromisoformat(text) for text in one.split(" to "))
        slots = {slot for slot in slots if not begin <= slot < end}
    return slots


def by_the_wall(at: datetime, zone: str) -> datetime:
    wall = at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    return wall - timedelta(minutes=wall.minute % 30)


halves = st.integers(0, 48).map(lambda number: number / 2)
spans = st.lists(st.tuples(halves, halves).filter(lambda one: one[0] < 24 and one[0] != one[1]), min_size=1, max_size=3)


@st.composite
def plants(draw: st.DrawFn) -> tuple[PlantHours, datetime]:
    around = draw(st.sampled_from(AROUND))
    closed = []
    for _ in range(draw(st.integers(0, 2))):
        begin = around + draw(st.integers(-96, 384)) * HALF
        closed.append(f"{begin:%Y-%m-%d %H:%M} to {begin + draw(st.integers(1, 200)) * HALF:%Y-%m-%d %H:%M}")
    own = PlantHours(
        hours=draw(spans), days=draw(st.lists(st.sampled_from(DAYS), min_size=1, unique=True)),
        zone=draw(st.sampled_from(ZONES)), closed=closed,
    )  # fmt: skip
    return own, (around + draw(st.integers(0, 500)) * QUARTER).replace(tzinfo=UTC)


def night(zone: str, *closed: str) -> PlantHours:
    return PlantHours(hours=((22, 6),), zone=zone, closed=closed)


@settings(max_examples=80, deadline=None)
@given(plants())
@example((night("Europe/Berlin"), datetime(2026, 10, 24, 12, tzinfo=UTC)))
@example(
    (PlantHours(hours=((2.5, 6),), zone="Europe/Berlin"), datetime(2026, 3, 29, 0, tzinfo=UTC))
)  # 2:30 never comes
@example(
    (PlantHours(hours=((2, 2.5),), zone="Europe/Berlin"), datetime(2026, 10, 25, 0, 30, tzinfo=UTC))
)  # comes again
def test_open_is_what_the_wall_clock_shows(drawn: tuple[PlantHours, datetime]) -> None:
    own, at = drawn
    slots, calendar = written_out(own), Calendar(own)
    assert calendar.open(at) == (by_the_wall(at, own.zone) in slots)
    opens = at
    while by_the_wall(opens, own.zone) not in slots:  # the slow way: a quarter of an hour after another
        opens += QUARTER
    assert calendar.closed_until(at) == (opens if opens > at else None)
    assert calendar.closed_until(at + timedelta(seconds=7)) in (opens, None)


def test_a_shift_over_midnight_and_a_closure_are_told_by_the_plant_s_own_clock() -> None:
    own = Calendar(
        PlantHours(
            hours=((22, 6),), days=("fri",), zone="Europe/Berlin", closed=("2026-12-26 00:00 to 2026-12-27 06:00",)
        )
    )
    saturday_morning = datetime(2026, 12, 19, 4, 59, tzinfo=UTC)
    assert own.open(saturday_morning)
    assert not own.open(saturday_morning + timedelta(minutes=1))
    assert own.in_words(own.closed_until(saturday_morning + timedelta(hours=3))) == "Fri 2026-12-25 22:00 CET"
    christmas = datetime(2026, 12, 25, 23, 30, tzinfo=UTC)  # half past midnight there
    assert own.in_words(own.closed_until(christmas)) == "Fri 2027-01-01 22:00 CET"


def test_a_long_closure_is_not_walked_through_hour_by_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = [f"20{year}-01-01 00:00 to 20{year + 1}-01-01 00:00" for year in range(27, 90)]
    own = Calendar(PlantHours(hours=[(hour, hour + 0.5) for hour in range(24)], zone="Europe/Berlin", closed=closed))
    steps, step = [], own._next
    monkeypatch.setattr(own, "_next", lambda at: steps.append(at) or step(at))
    assert own.closed_until(datetime(2027, 6, 1, tzinfo=UTC)) == datetime(2089, 12, 31, 23, tzinfo=UTC)
    assert len(steps) < 300  # what a hostile site may have the centre reckon with


SITE = """
name = "press-07"
[data]
files = "*.csv"
channels = ["a"]
[tasks.wear]
kind = "regression"
target = "wear"
"""


def site(tmp_path: Path, hours: str) -> SiteConfig:
    (tmp_path / "site.toml").write_text(f"{SITE}\n[hours]\n{hours}\n")
    return read_site(tmp_path)


def test_a_site_without_hours_may_always_train_and_one_with_a_zone_only_too(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    assert read_site(tmp_path).hours is None
    own = site(tmp_path, 'zone = "Asia/Tokyo"').hours
    assert own is not None
    assert Calendar(own).closed_until(datetime(2026, 5, 5, tzinfo=UTC)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hours = [[6, 14]]", r"`hours\.zone` is missing"),
        ('zone = "Europe/Berlim"', r"`hours\.zone`: no time zone is called 'Europe/Berlim'; did you mean 'Europe/Berlin'\?"),
        ('zone = "../../etc/passwd"', r"`hours\.zone`: no time zone is called .* Write its IANA name"),
        ('zone = "UTC"\nhours = [[6, 25]]', r"`hours`: .*\[6, 25\]: two different hours of a day from 0 to 24"),
        ('zone = "UTC"\nhours = [[6, 6]]', "all day is \\[0, 24\\]"),
        ('zone = "UTC"\nhours = []', r"`hours\.hours`"),
        ('zone = "UTC"\ndays = ["monday"]', r"`hours\.days\.0`"),
        ('zone = "UTC"\nopen = true', r"unknown key `hours\.open`"),
        ('zone = "UTC"\nclosed = ["24.12.2026"]', r"`hours\.closed`: '24\.12\.2026' is no closure; write it as '2026-12-24 06:00 to"),
        ('zone = "UTC"\nclosed = ["2026-12-24 6:00 to 2026-12-27 06:00"]', "is no closure"),
        ('zone = "UTC"\nclosed = ["2026-12-24 06:00 to 2026-02-30 06:00"]', "is no closure"),
        ('zone = "UTC"\nclosed = ["2026-12-27 06:00 to 2026-12-24 06:00"]', "ends before it begins"),
        ('zone = "UTC"\nclosed = ["2026-12-27 06:00 to 2028-12-24 06:00"]', "lasts more than 366 days"),
    ],
)  # fmt: skip
def test_hours_that_cannot_be_meant_are_refused_by_key_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        site(tmp_path, text)


def test_an_offer_of_a_site_without_hours_is_what_an_older_centre_reads() -> None:
    offer = Offer(site="press-07", run="r", version="1", arrays=(), tasks=())
    assert "hours" not in offer.model_dump_json()
    told = offer.model_copy(update={"hours": night("Europe/Berlin", "2026-12-24 06:00 to 2026-12-27 06:00")})
    assert Offer.model_validate_json(told.model_dump_json(), strict=True) == told


def test_the_clock_of_tests_runs_faster_from_a_moment_on_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    start = datetime.now(UTC) - timedelta(seconds=100)
    monkeypatch.setenv(hours.CLOCK, f"{start.isoformat()} x144")
    assert timedelta(hours=4) <= hours.now() - start < timedelta(hours=4, minutes=30)
    assert hours.lasts(timedelta(days=1)) == 600.0
    assert hours.span(600.0) == timedelta(days=1)
    monkeypatch.setenv(hours.CLOCK, f"{(start + timedelta(days=1)).isoformat()} x144")
    assert abs(hours.now() - datetime.now(UTC)) < timedelta(seconds=5)  # until then it is the machine's
    assert hours.lasts(timedelta(days=1)) == 86400.0
    monkeypatch.setenv(hours.CLOCK, "noon x2")
    with pytest.raises(ConfigError, match=r"TRUNKLINE_CLOCK='noon x2'.*unset it at a plant"):
        hours.now()
    monkeypatch.delenv(hours.CLOCK)
    assert abs(hours.now() - datetime.now(UTC)) < timedelta(seconds=5)
