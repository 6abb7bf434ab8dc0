"""How far a run is, for a person: the same display for a simulation in this process and a server that is watched.

The round loop reports the events of `trunkline.runtime.events`; `trunkline server run` reads their lines with `tail` from
the run's events.jsonl.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import filesize
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trunkline.runtime.events import Event

Line = Mapping[str, Any]  # an event as events.jsonl has it

EVENTS = "events.jsonl"  # in a run's folder: one JSON object a line, what a progress display reads

SPARKS = "▁▂▃▄▅▆▇█"
QUIET = ("late", "done", "error")  # kinds that are not shown: the command reports the end of a run itself
MANY_ROUNDS = 50  # above this a log file gets a line every tenth of the run instead of one a round


class Progress:
    """Show events as they come: live on a terminal, one plain line a round elsewhere.

    An event of an unknown kind, or with a key missing, is shown as far as it goes: a newer server may be watched by an
    older command. Of an unknown kind that is its `text`.

    Args:
        console: the output; `console.is_terminal` decides between the two displays.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._state: dict[str, Any] = {}  # the latest value of every key of every event
        self._losses: list[float] = []
        self._seconds: list[float] = []  # of the rounds seen, for the time that is left
        self._phase = "waiting"
        self._done = 0  # rounds that ended
        self._cohort: int | None = None  # sites asked each round
        self._shown: set[tuple[str, str]] = set()
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True) if live else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event | Line) -> None:
        """Take in one event, or one line of events.jsonl."""
        line = event.to_json() if isinstance(event, Event) else event
        name = line.get("event")
        if not isinstance(name, str) or name in QUIET:
            return
        handler = getattr(self, f"_on_{name}", None) if name else None
        if handler is None:
            self._on_note(line, self._state)
            return
        before = dict(self._state)
        self._state |= {key: value for key, value in line.items() if key != "event"}
        handler(line, before)

    # --- one method an event -------------------------------------------------------------------------------------

    def _on_gather(self, event: Line, before: Line) -> None:
        self._phase = "gather"
        if not self._live:  # the run reports it at changes, and once a minute
            self._print(self._gathering())

    def _on_start(self, event: Line, before: Line) -> None:
        self._phase = "round"
        self._done = _whole(event, "resumed_at") or 0
        self._state["round"] = self._done
        parts = [f"{_whole(event, 'rounds') or '?'} rounds"]
        if event.get("strategy"):
            parts.append(f"strategy {event['strategy']}")
        self._cohort = _count(event.get("sites"))
        if self._cohort is not None:
            parts.append(f"{self._cohort} sites")
        if (parameters := _whole(event, "trunk_parameters")) is not None:
            parts.append(f"trunk of {parameters:,} parameters")
        if self._done:
            parts.append(f"resumed after round {self._done}")
        self._print(f"{event.get('run', 'run')}: {', '.join(parts)}", style="bold")

    def _on_round(self, event: Line, before: Line) -> None:
        self._phase = "round"
        self._state |= {"in": 0, "of": self._cohort}

    def _on_reply(self, event: Line, before: Line) -> None:
        self._cohort = _whole(event, "of") or self._cohort  # a site that comes back raises it
        if event.get("refused"):
            self._refused(event.get("site", "a site"), event["refused"], event.get("round"))

    def _on_round_end(self, event: Line, before: Line) -> None:
        self._phase = "round"
        refused = event.get("refused")
        for refusal in refused if isinstance(refused, list) else []:
            if isinstance(refusal, dict):
                self._refused(refusal.get("site", "a site"), refusal.get("cause", "no cause given"), event.get("round"))
        if (loss := _number(event, "validation_loss")) is not None:
            self._losses.append(loss)
        if (seconds := _number(event, "seconds")) is not None:
            self._seconds.append(seconds)
        round, rounds = _whole(event, "round"), _whole(self._state, "rounds")
        self._done = round if round is not None else self._done + 1
        every = max(rounds // 10, 1) if rounds and rounds > MANY_ROUNDS else 1
        if not self._live and (round is None or round % every == 0 or round in (1, rounds)):
            sites = _count(event.get("sites"))
            parts = [f"round {round if round is not None else '?'} of {rounds or '?'}"]
            parts += [f"{sites} of {self._cohort or '?'} sites"] if sites is not None else []
            if losses := self._losses_in_words():
                parts.append("loss " + ", ".join(losses))
            self._print("; ".join(parts + self._traffic_in_words()))

    def _on_evaluate(self, event: Line, before: Line) -> None:
        self._phase = "evaluate"
        if not self._live and event.get("in") == event.get("of"):
            self._print(f"scored on test data at {event.get('in', '?')} of {event.get('of', '?')} sites")

    def _on_end(self, event: Line, before: Line) -> None:
        self._phase = "end"
        seconds = _number(event, "seconds")
        last = ", ".join(self._losses_in_words())
        took = f" in {_clock(seconds)}" if seconds is not None else ""
        rounds = _whole(before, "rounds") or "?"
        self._print(f"{self._done} of {rounds} rounds done{took}" + (f"; loss {last}" if last else ""))

    def _on_note(self, event: Line, before: Line) -> None:
        text = event.get("text")
        if isinstance(text, str) and text and ("", text) not in self._shown:
            self._shown.add(("", text))
            self._print(text, style="yellow")

    def _on_waiting(self, event: Line, before: Line) -> None:
        self._on_note(event, before)

    def _on_recovered(self, event: Line, before: Line) -> None:
        self._on_note(event, before)

    # --- what is shown -------------------------------------------------------------------------------------------

    def _refused(self, site: object, cause: object, round: object) -> None:
        """Shown once for each site and cause: a site that is wrong every round must not fill the screen."""
        if (str(site), str(cause)) in self._shown:
            return
        self._shown.add((str(site), str(cause)))
        when = f" in round {round}" if round is not None else ""
        self._print(f"refused {site}{when}: {cause}", style="red")

    def _print(self, text: str, style: str = "") -> None:
        """A line that stays; a log file gets it in one piece, a terminal wraps it."""
        self.console.print(Text(_clean(text), style=style), soft_wrap=not self._live)

    def _losses_in_words(self) -> list[str]:
        """The losses of the last round that ended, as far as events have them."""
        words = [("train_loss", "train {:.4g}"), ("validation_loss", "validation {:.4g}")]
        words += [("local_validation_loss", "{:.4g} when trained alone")]
        losses = [(_number(self._state, key), text) for key, text in words]
        return [text.format(loss) for loss, text in losses if loss is not None]

    def _traffic_in_words(self) -> list[str]:
        state, words = self._state, []
        up, down = _whole(state, "bytes_up"), _whole(state, "bytes_down")
        if up is not None and down is not None:
            words.append(f"{filesize.decimal(up)} up, {filesize.decimal(down)} down")
        if (seconds := _number(state, "seconds")) is not None:
            words.append(f"{seconds:.1f} s")
        return words

    def _gathering(self) -> str:
        """The plants that are here and those that are missing, in words."""
        sites, wanted = self._state.get("sites"), self._state.get("wanted", "?")
        here = _count(sites) or 0
        names = f" ({', '.join(map(str, sites))})" if isinstance(sites, list | tuple) and sites else ""
        absent = self._state.get("missing")
        missing = f"; missing: {', '.join(map(str, absent))}" if isinstance(absent, list | tuple) and absent else ""
        start = f"The run starts when {wanted} are online."
        if isinstance(wanted, int) and here >= wanted:
            start = "The run starts when the plants that run.toml names are online."
        return f"waiting for plants: {here} of {wanted} are here{names}{missing}. {start}"

    def _render(self) -> RenderableType:
        """The live part: a bar with the time left, then what the last round brought."""
        if self._phase in ("waiting", "end"):
            return Text("")
        if self._phase == "gather":
            return Text(_clean(self._gathering()), style="dim")
        rounds, answered, asked = _whole(self._state, "rounds") or 0, self._state.get("in"), self._state.get("of")
        share = answered / asked if isinstance(answered, int) and isinstance(asked, int) and asked > 0 else 0.0
        running = self._phase == "round" and (_whole(self._state, "round") or 0) > self._done
        done = self._done + (min(share, 1.0) if running else 0.0)
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        phase = f"round {_whole(self._state, 'round') or 0} of {rounds or '?'}"
        if self._phase == "evaluate":
            phase = "scoring on test data"
        line.add_row(
            Text(phase, style="bold"),
            ProgressBar(rounds or 1, done, complete_style="cyan", finished_style="green"),
            Text(self._left(rounds - done)),
        )
        details = Table.grid(padding=(0, 2, 0, 0))
        details.add_column(style="dim", no_wrap=True)
        if answered is not None and asked is not None:
            details.add_row("sites", Text(f"{answered} of {asked} are in"))
        losses, traffic = self._losses_in_words(), self._traffic_in_words()
        if losses:
            details.add_row("loss", Text(f"{', '.join(losses)}  ") + Text(_sparks(self._losses), style="cyan"))
        if traffic:
            details.add_row("round", Text(", ".join(traffic)))
        return Group(line, details)

    def _left(self, rounds: float) -> str:
        """The time left: the later half of the rounds seen says it better than the first, slow one."""
        recent = self._seconds[len(self._seconds) // 2 :]
        if not recent or rounds <= 0:
            return ""
        return f"{_clock(rounds * sum(recent) / len(recent))} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(min(max(seconds, 0.0), 1e9))))  # a mad clock must not end the display


def _clean(text: str) -> str:
    """`text` without control characters: site names and causes come from elsewhere and must not steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def _sparks(values: list[float], width: int = 24) -> str:
    """The last values as a row of bars, lowest to highest."""
    shown = values[-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    if high <= low:
        return ""
    return "".join(SPARKS[round((value - low) / (high - low) * (len(SPARKS) - 1))] for value in shown)


def _number(event: Line, key: str) -> float | None:
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(event: Line, key: str) -> int | None:
    value = _number(event, key)
    return int(value) if value is not None and abs(value) < 2**63 else None


def _count(sites: object) -> int | None:
    """The number of sites: events name the sites, or only count them."""
    if isinstance(sites, list | tuple):
        return len(sites)
    return sites if isinstance(sites, int) else None


def tail(path: Path, stop: Callable[[], bool], poll_s: float = 0.2, start: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a file that is still being written, each once, as soon as its line is complete.

    Waits for a file that is not there yet, and starts again with a file that was written anew. Once `stop` returns True,
    the remaining lines are read and the iteration ends. A damaged line (the writer was killed in it) is passed over.

    Args:
        path: one JSON object a line.
        stop: asked before each look.
        poll_s: seconds between looks.
        start: byte to begin at; the lines that a resumed run wrote before it was stopped have been shown already.
    """
    position = start
    while True:
        last = stop()  # asked before reading: a line that was written before it returned True is never missed
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) < position:
                    position = 0
                file.seek(position)
                data = file.read()
        except FileNotFoundError:
            data = b""
        complete = data[: data.rfind(b"\n") + 1]
        position += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
        if last:
            return
        time.sleep(poll_s)
