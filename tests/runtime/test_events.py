"""Events of a run: their JSON form, the lines of older runs, and the page that documents them."""

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trunkline
from trunkline.runtime.events import (
    KINDS,
    STAMPS,
    BufferedRoundEnded,
    Event,
    FederatedRoundEnded,
    ReplyReceived,
    RoundEnded,
    SitesGathering,
    Waiting,
    events_page,
    parse_event,
)

ROOT = Path(trunkline.__file__).parent
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=8), int: st.integers(0, 10**9), float: st.floats(allow_nan=False), type(None): st.none(),
}  # fmt: skip


def drawn(kind: type[Event]) -> st.SearchStrategy[Event]:
    hints, columns = get_type_hints(kind), {}
    for column in fields(kind):
        hint = hints[column.name]
        if get_origin(hint) is tuple:
            columns[column.name] = st.lists(VALUES[str], max_size=3).map(tuple)
        else:
            columns[column.name] = st.one_of([VALUES[part] for part in get_args(hint) or (hint,)])
    return st.builds(kind, **columns)


@given(st.one_of([drawn(kind) for kind in KINDS]))
def test_an_event_is_the_same_after_a_line_of_json(event: Event) -> None:
    line = json.loads(json.dumps(event.to_json()))
    assert parse_event(line) == event
    assert parse_event({**line, "at": 1.5, "virtual_seconds": 2.0, "newer": [1]}) == event


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('{"event": "gather", "sites": ["press"], "wanted": 2}', SitesGathering(("press",), 2, ())),
        ('{"event": "waiting", "text": "1 of 2"}', Waiting("1 of 2")),
        ('{"event": "reply", "round": 2, "site": "press", "refused": null, "in": 1, "of": 2, "at": 17.25}',
         ReplyReceived(2, "press", None, 1, 2)),
        ('{"event": "round_end", "round": 1, "rounds": 2, "sites": 2, "seconds": 0.5, "train_loss": null}',
         RoundEnded(1, 2, 2, 0.5, None)),
        ('{"event": "round_end", "round": 1, "rounds": 2, "sites": 2, "seconds": 0.5, "train_loss": 1, "validation_loss": null, '
         '"local_validation_loss": null, "bytes_up": 8, "bytes_down": 9, "refused": 0}',
         FederatedRoundEnded(1, 2, 2, 0.5, 1, None, None, 8, 9, 0)),
    ],
)  # fmt: skip
def test_the_lines_of_older_runs_are_read(line: str, event: Event) -> None:
    parsed = parse_event(json.loads(line))
    assert parsed == event
    assert type(parsed) is type(event)


@pytest.mark.parametrize(
    "line",
    [{}, {"event": None}, {"event": "newer", "text": "x"}, {"event": "note"}, {"event": "note", "text": 3},
     {"event": "evaluate", "in": True, "of": 2}, {"event": "gather", "sites": [1], "wanted": 2}],
)  # fmt: skip
def test_a_line_of_no_known_kind_is_no_event(line: dict[str, Any]) -> None:
    assert parse_event(line) is None


def test_a_field_that_is_unset_is_left_out_only_where_its_default_is_none() -> None:
    assert Waiting("x").to_json() == {"event": "waiting", "text": "x"}
    assert ReplyReceived(1, "", None, 0, 1).to_json() == {
        "event": "reply", "round": 1, "site": "", "refused": None, "in": 0, "of": 1,
    }  # fmt: skip
    assert {"updates", "refused"} <= set(
        BufferedRoundEnded(1, 1, 1, 0.0, None, None, None, 0, 0, 0, 1, 0.0, 0, 0).to_json()
    )


def test_the_page_lists_every_event_and_key() -> None:
    page = (ROOT.parent / "docs" / "events.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n{events_page()}"), "docs/events.md ends with what `events_page()` returns: write it there"
    for key, meaning in STAMPS.items():
        assert f"| `{key}` | number | {meaning} |" in page


def test_no_module_makes_an_event_by_hand() -> None:
    """A dictionary with the key `event` is made in one file only."""
    by_hand = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted(ROOT.rglob("*.py"))
        if path.relative_to(ROOT).as_posix() != "runtime/events.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and key.value == "event"
    ]
    assert by_hand == []
