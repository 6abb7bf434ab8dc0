"""The report as text: the verdict of each row and the summary of all rows, for the terminal and the page."""

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import numpy as np
from rich import filesize

from trunkline.server.reporting.task_conflicts import sentences

Outcome = Literal["helps", "same", "hurts", "unknown"]
Report = dict[str, Any]
MOST_SITES = 8  # sites whose task conflicts the terminal describes; the page has all
Row = Mapping[str, Any]

# the columns of a row that are compared with `local`: the federated model, or the model that the site's gate chose
FEDERATED = ("federated", "interval")
GATED = ("gated", "gated_interval")


def after_gate(row: Row) -> tuple[str, str]:
    """The columns of the gate's choice; a report of an older version has none, so those of the federated model."""
    return GATED if row.get("gated") is not None else FEDERATED


def outcome(row: Row, of: tuple[str, str] = FEDERATED) -> Outcome:
    """Whether 0 is outside the 95 % interval of the difference, and on which side."""
    value, interval = row.get(of[0]), row.get(of[1])
    if row["local"] is None or value is None or interval is None:
        return "unknown"
    low, high = sorted(interval)
    if low <= 0.0 <= high:
        return "same"
    return "helps" if (high < 0.0) == (row["better"] == "lower") else "hurts"


def verdict_of(row: Row) -> str:
    """The verdict on the federated model without model selection, as a sentence."""
    if row["federated"] is None:
        return "not measured: no test labels"
    if row["local"] is None:
        return "no baseline"
    result = outcome(row)
    if result == "unknown":
        return "cannot tell: too few test groups"
    if result == "same":
        return "no clear difference"
    if result == "hurts":
        return f"train alone: federation is worse by {_size(row, FEDERATED)}"
    return f"federation helps: {_size(row, FEDERATED)} {_direction(row)}"


def gated_verdict_of(row: Row) -> str:
    """The verdict on the model that the site chose, compared with its local baseline, as a sentence."""
    of = after_gate(row)
    if row["chosen"] == "local":
        return "keeps its own model"
    if row.get(of[0]) is None:
        return "not measured: no test labels"
    if row["local"] is None:
        return "no baseline"
    result = outcome(row, of)
    if result == "unknown":
        return "cannot tell: too few test groups"
    if result == "same":
        return "no clear difference"
    return f"worse than alone by {_size(row, of)}" if result == "hurts" else f"{_size(row, of)} {_direction(row)}"


def _direction(row: Row) -> str:
    return "lower error" if row["better"] == "lower" else f"higher {row['metric']}"


def _size(row: Row, of: tuple[str, str]) -> str:
    change = abs(row[of[0]] - row["local"])
    share = percent(row, change)
    return f"{figure(change)} {row['unit']}".rstrip() if share is None else f"{figure(share, digits=2)} %"


def value(row: Row, model: str) -> str:
    """`local`, `federated`, `gated` or a candidate, with the digits of its row."""
    result = row[model] if model in row else row.get("candidates", {}).get(model)
    return "-" if result is None else f"{result:,.{_digits(row)}f}"


def difference(row: Row, of: tuple[str, str] = FEDERATED) -> str:
    """The difference from local, in the metric's unit and in percent of local."""
    if row["local"] is None or row.get(of[0]) is None:
        return "-"
    change = row[of[0]] - row["local"]
    share = percent(row, change)
    return f"{change:+,.{_digits(row)}f}" + (f" ({figure(share, 2, sign=True)} %)" if share is not None else "")


def interval(row: Row, of: tuple[str, str] = FEDERATED) -> str:
    if row.get(of[1]) is None:
        return "no interval"
    low, high = row[of[1]]
    return f"[{low:+,.{_digits(row)}f}, {high:+,.{_digits(row)}f}]"


def percent(row: Mapping[str, Any], value: float) -> float | None:
    """`value` in percent of the local baseline's value; None if that is 0."""
    return 100.0 * value / abs(row["local"]) if abs(row["local"]) > 1e-12 else None


def _digits(row: Mapping[str, Any]) -> int:
    """Decimals that show four digits of the row's larger value; the same for all figures of the row, to compare them."""
    scale = max(abs(row["local"] or 0.0), abs(row["federated"] or 0.0))
    return min(max(3 - math.floor(math.log10(scale)), 0), 9) if scale > 0 else 3


def figure(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A single number with `digits` significant digits; a large number in full."""
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1) - 0.5:
        return f"{value:{'+' if sign else ''},.0f}"
    return f"{value:{'+' if sign else ''}.{digits}g}"


def metric(row: Mapping[str, Any]) -> str:
    return f"{row['metric']} ({row['unit']})" if row["unit"] else str(row["metric"])


def shown(text: object) -> str:
    """`text` without control characters: text from a site must not control the reader's terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in str(text))


def plain(value: Any) -> Any:
    """`value` as plain JSON: lists and tables of text, integers and finite numbers; None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def traffic(report: Report) -> tuple[str, str]:
    """Mean bytes up and down per site and round; a refused reply counts as well."""
    exchanges = sum(len(record["sites"]) + len(record["refused"]) for record in report["rounds"])
    return tuple(  # type: ignore[return-value]
        filesize.decimal(round(sum(record[way] for record in report["rounds"]) / max(exchanges, 1)))
        for way in ("bytes_up", "bytes_down")
    )


def refusals_of(report: Report) -> list[dict[str, Any]]:
    """One entry for each site and cause, with its rounds, in order of first appearance."""
    rounds_of: dict[tuple[str, str], list[int]] = {}
    for record in report["rounds"]:
        for refusal in record["refused"]:
            rounds_of.setdefault((refusal["site"], refusal["cause"]), []).append(record["round"])
    return [{"site": site, "cause": cause, "rounds": rounds} for (site, cause), rounds in rounds_of.items()]


def in_rounds(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    return f"{len(rounds)} rounds, {rounds[0]} to {rounds[-1]}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def sentence(report: Report, of: Literal["federated", "gated"] = "federated") -> str:
    """The report in one sentence: the federated models without model selection, or the models that the sites chose."""
    rows = report["sites"]
    outcomes = [outcome(row, FEDERATED if of == "federated" else after_gate(row)) for row in rows]
    compared = len(outcomes) - outcomes.count("unknown")
    if not compared:
        return "Nothing could be compared: no site-task has both a local baseline and enough test groups."
    helps, same, hurts = (outcomes.count(which) or "none" for which in ("helps", "same", "hurts"))
    counts = (
        f"clearly helps in {helps} of {compared} site-tasks, makes no clear difference in {same}, hurts in {hurts}."
    )
    if of == "gated":
        kept = sum(row["chosen"] == "local" for row in rows)
        kept_local = f" {kept} of {len(rows)} keep the model trained alone." if kept else ""
        return f"With the model each site chose on its validation rows, it {counts}{kept_local}"
    left = f" {outcomes.count('unknown')} more could not be compared." if compared < len(outcomes) else ""
    return f"Without model selection, federation {counts}{left}"


def compared(report: Report) -> bool:
    """Whether any site-task has a verdict."""
    return any(outcome(row) != "unknown" for row in report["sites"])


def summary(report: Report) -> list[str]:
    """The lines under the table in the terminal."""
    run, (up, down) = report["run"], traffic(report)
    done = max((record["round"] for record in report["rounds"]), default=0)
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
        named = "; ".join(f"{trunk}: {', '.join(sites)}" for trunk, sites in groups)
        lines.append(f"Clusters, each with its own trunk: {named}.")
    if buffered := buffered_in_words(report):
        lines.append(buffered)
    refusals = refusals_of(report)
    if not refusals:
        return [*lines, "No reply was refused."]
    return lines + [
        f"Refused: {record['site']} ({in_rounds(record['rounds'])}): {record['cause']}" for record in refusals
    ]


def buffered_in_words(report: Report) -> str:
    """The steps of a buffered run in one sentence; empty for a run whose rounds wait for their sites."""
    buffered = report.get("buffered")
    if not buffered or not buffered["updates"]:
        return ""
    age = figure(buffered["staleness_mean"], 2)
    return (
        f"Buffered: one step for every {buffered['buffer']} updates, {buffered['updates']:,} updates in all. The trunk of an update was "
        f"{age} steps old on average and {buffered['staleness_max']} at most."
    )


def pace_of(report: Report) -> list[tuple[float, float]]:
    """After each step: seconds since the start, and the mean over the sites of the latest validation loss.

    Virtual seconds in a simulated world, else wall time. A site's loss is of the trunk it was given, so the curve of a slow
    site is late, never early.
    """
    last: dict[str, float] = {}
    line: list[tuple[float, float]] = []
    elapsed = 0.0
    for record in report["rounds"]:
        elapsed += record["seconds"]
        virtual = record.get("virtual_seconds")
        for site, curves in record.get("curves", {}).items():
            if curves.get("validation_loss") is not None:
                last[site] = curves["validation_loss"]
        if last:
            line.append((elapsed if virtual is None else virtual, sum(last.values()) / len(last)))
    return line


def cohorts_of(report: Report) -> list[tuple[str, list[str]]]:
    """Number of each trunk and the sites that train it, if the strategy made several."""
    groups: dict[str, list[str]] = {}
    for site, trunk in sorted((report.get("cohorts") or {}).items()):
        groups.setdefault(str(trunk), []).append(site)
    return sorted(groups.items(), key=lambda group: (len(group[0]), group[0]))
