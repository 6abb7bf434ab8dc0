"""The report's figures as words: what one row says, and what all of them say together. Used by the terminal and the page."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import numpy as np
from rich import filesize

from trunkline.server.reporting.task_conflicts import sentences

Outcome = Literal["helps", "same", "hurts", "unknown"]
Report = dict[str, Any]
MOST_SITES = 8  # whose tasks are described in the terminal; the page has all
Row = Mapping[str, Any]

# which columns of a row are compared with `local`: the federated model as it came, or what the site's gate chose
CAME = ("federated", "interval")
GATED = ("gated", "gated_interval")


def after_gate(row: Row) -> tuple[str, str]:
    """Where a row says what its gate's choice reaches; a report of an older version has its first two candidates only."""
    return GATED if row.get("gated") is not None else CAME


def outcome(row: Row, of: tuple[str, str] = CAME) -> Outcome:
    """Whether 0 lies outside the 95 % interval of the difference, and on which side."""
    value, interval = row.get(of[0]), row.get(of[1])
    if row["local"] is None or value is None or interval is None:
        return "unknown"
    low, high = sorted(interval)
    if low <= 0.0 <= high:
        return "same"
    return "helps" if (high < 0.0) == (row["better"] == "lower") else "hurts"


def verdict_of(row: Row) -> str:
    """In plain words whether the federated model as it came was worth it."""
    if row["federated"] is None:
        return "not measured: no test labels"
    if row["local"] is None:
        return "no baseline"
    found = outcome(row)
    if found == "unknown":
        return "cannot tell: too few test groups"
    if found == "same":
        return "no clear difference"
    if found == "hurts":
        return f"train alone: federation is worse by {_size(row, CAME)}"
    return f"federation helps: {_size(row, CAME)} {_direction(row)}"


def gated_verdict_of(row: Row) -> str:
    """In plain words what the model that the site chose is worth beside training alone."""
    of = after_gate(row)
    if row["chosen"] == "local":
        return "keeps its own model"
    if row.get(of[0]) is None:
        return "not measured: no test labels"
    if row["local"] is None:
        return "no baseline"
    found = outcome(row, of)
    if found == "unknown":
        return "cannot tell: too few test groups"
    if found == "same":
        return "no clear difference"
    return f"worse than alone by {_size(row, of)}" if found == "hurts" else f"{_size(row, of)} {_direction(row)}"


def _direction(row: Row) -> str:
    return "lower error" if row["better"] == "lower" else f"higher {row['metric']}"


def _size(row: Row, of: tuple[str, str]) -> str:
    change = abs(row[of[0]] - row["local"])
    share = percent(row, change)
    return f"{figure(change)} {row['unit']}".rstrip() if share is None else f"{figure(share, digits=2)} %"


def value(row: Row, who: str) -> str:
    """`local`, `federated`, `gated` or a candidate, with the digits of its row."""
    found = row[who] if who in row else row.get("candidates", {}).get(who)
    return "-" if found is None else f"{found:,.{_digits(row)}f}"


def difference(row: Row, of: tuple[str, str] = CAME) -> str:
    """Minus local, in the unit and in percent of local."""
    if row["local"] is None or row.get(of[0]) is None:
        return "-"
    change = row[of[0]] - row["local"]
    share = percent(row, change)
    return f"{change:+,.{_digits(row)}f}" + (f" ({figure(share, 2, sign=True)} %)" if share is not None else "")


def interval(row: Row, of: tuple[str, str] = CAME) -> str:
    if row.get(of[1]) is None:
        return "no interval"
    low, high = row[of[1]]
    return f"[{low:+,.{_digits(row)}f}, {high:+,.{_digits(row)}f}]"


def percent(row: Mapping[str, Any], value: float) -> float | None:
    """`value` in percent of what training alone reaches; None where that is 0."""
    return 100.0 * value / abs(row["local"]) if abs(row["local"]) > 1e-12 else None


def _digits(row: Mapping[str, Any]) -> int:
    """Decimals that show four digits of the row's larger value, for all figures of the row: they are to be compared."""
    scale = max(abs(row["local"] or 0.0), abs(row["federated"] or 0.0))
    return min(max(3 - math.floor(math.log10(scale)), 0), 9) if scale > 0 else 3


def figure(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number that stands alone, with so many significant digits; a large one is written out."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1) - 0.5:
        return f"{value:{'+' if sign else ''},.0f}"
    return f"{value:{'+' if sign else ''}.{digits}g}"


def metric(row: Mapping[str, Any]) -> str:
    return f"{row['metric']} ({row['unit']})" if row["unit"] else str(row["metric"])


def shown(text: object) -> str:
    """`text` without control characters: a site's own words must not steer the reader's terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in str(text))


def plain(value: Any) -> Any:
    """`value` as JSON has it: lists and tables of text, whole numbers and finite numbers; None for the rest."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def traffic(report: Report) -> tuple[str, str]:
    """Bytes up and down a site and round; a refused reply was sent too."""
    exchanges = sum(len(one["sites"]) + len(one["refused"]) for one in report["rounds"])
    return tuple(  # type: ignore[return-value]
        filesize.decimal(round(sum(one[way] for one in report["rounds"]) / max(exchanges, 1)))
        for way in ("bytes_up", "bytes_down")
    )


def refusals_of(report: Report) -> list[dict[str, Any]]:
    """One entry a site and cause, with the rounds it happened in, in order of first appearance."""
    found: dict[tuple[str, str], list[int]] = {}
    for one in report["rounds"]:
        for refusal in one["refused"]:
            found.setdefault((refusal["site"], refusal["cause"]), []).append(one["round"])
    return [{"site": site, "cause": cause, "rounds": rounds} for (site, cause), rounds in found.items()]


def in_rounds(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    return f"{len(rounds)} rounds, {rounds[0]} to {rounds[-1]}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def sentence(report: Report, of: Literal["came", "gated"] = "came") -> str:
    """The whole report in one sentence: the federated models as they came, or what the sites chose."""
    rows = report["sites"]
    found = [outcome(row, CAME if of == "came" else after_gate(row)) for row in rows]
    compared = len(found) - found.count("unknown")
    if not compared:
        return "Nothing could be compared: no site-task has both a baseline and enough test groups."
    helps, same, hurts = (found.count(which) or "none" for which in ("helps", "same", "hurts"))
    counts = (
        f"clearly helps in {helps} of {compared} site-tasks, makes no clear difference in {same}, hurts in {hurts}."
    )
    if of == "gated":
        kept = sum(row["chosen"] == "local" for row in rows)
        own = f" {kept} of {len(rows)} keep the model trained alone." if kept else ""
        return f"With the model each site chose on its validation rows, it {counts}{own}"
    left = f" {found.count('unknown')} more could not be compared." if compared < len(found) else ""
    return f"As it came, federation {counts}{left}"


def compared(report: Report) -> bool:
    """Whether any site-task can be judged at all."""
    return any(outcome(row) != "unknown" for row in report["sites"])


def summary(report: Report) -> list[str]:
    """What the terminal says under its table."""
    run, (up, down) = report["run"], traffic(report)
    done = max((one["round"] for one in report["rounds"]), default=0)
    lines = [sentence(report)]
    if compared(report):
        lines.append(sentence(report, "gated"))
    lines.append(
        f"{done} of {run['rounds']} rounds with {run['strategy']} in {duration(run['seconds'])}; "
        f"trunk of {run['trunk_parameters']:,} parameters; {up} up and {down} down a site and round."
    )
    entries = report.get("conflicts", [])
    lines += [f"Tasks at {entry['site']}: {'; '.join(sentences(entry))}." for entry in entries[:MOST_SITES]]
    if len(entries) > MOST_SITES:
        lines.append(f"Tasks at {len(entries) - MOST_SITES} further sites: see the page.")
    if groups := cohorts_of(report):
        named = "; ".join(f"{number}: {', '.join(sites)}" for number, sites in groups)
        lines.append(f"Cohorts, each with a trunk of its own: {named}.")
    if told := buffered_in_words(report):
        lines.append(told)
    refusals = refusals_of(report)
    if not refusals:
        return [*lines, "No reply was refused."]
    return lines + [f"Refused: {one['site']} ({in_rounds(one['rounds'])}): {one['cause']}" for one in refusals]


def buffered_in_words(report: Report) -> str:
    """How the steps of a buffered run came about, in one sentence; empty where a round waits for its sites."""
    found = report.get("buffered")
    if not found or not found["updates"]:
        return ""
    behind = figure(found["staleness_mean"], 2)
    return (
        f"Buffered: a step as soon as {found['buffer']} updates were in, {found['updates']:,} in all, to a trunk {behind} steps old "
        f"in the mean and {found['staleness_max']} at most."
    )


def pace_of(report: Report) -> list[tuple[float, float]]:
    """After each step, seconds since the start and the mean of the validation losses that sites have told last.

    Virtual seconds in a simulated world, else those of the clock on the wall. What a site tells is of the trunk it was
    given, so the line is late for the slow ones, never early.
    """
    last: dict[str, float] = {}
    line: list[tuple[float, float]] = []
    gone = 0.0
    for one in report["rounds"]:
        gone += one["seconds"]
        at = one.get("virtual_seconds")
        for site, told in one.get("curves", {}).items():
            if told.get("validation_loss") is not None:
                last[site] = told["validation_loss"]
        if last:
            line.append((gone if at is None else at, sum(last.values()) / len(last)))
    return line


def cohorts_of(report: Report) -> list[tuple[str, list[str]]]:
    """Number of a trunk and the sites that train it, where the strategy made several."""
    groups: dict[str, list[str]] = {}
    for site, number in sorted((report.get("cohorts") or {}).items()):
        groups.setdefault(str(number), []).append(site)
    return sorted(groups.items(), key=lambda one: (len(one[0]), one[0]))
