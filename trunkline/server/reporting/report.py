"""The worth-it report: for each site and task, the difference between federation and the local baseline.

`build_report` makes the dictionary behind every view (report.json, the contract for other tools). `write_report` writes it
to disk with a self-contained page, and `print_report` shows it in a terminal. The sites compute the intervals; the verdicts
are derived from them here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trunkline import __version__
from trunkline.config.run import RunConfig
from trunkline.errors import StorageError
from trunkline.protocol.messages import TaskRow
from trunkline.runtime.storage import write_atomic
from trunkline.server.reporting.records import RoundRecord
from trunkline.server.reporting.summary import (
    FEDERATED,
    Outcome,
    Report,
    Row,
    after_gate,
    difference,
    gated_verdict_of,
    interval,
    metric,
    outcome,
    plain,
    shown,
    summary,
    value,
    verdict_of,
)
from trunkline.server.reporting.task_conflicts import conflicts_of

if TYPE_CHECKING:
    from trunkline.server.reporting.plots import Predictions

WIDE = 118  # terminal columns that fit every column of the table beside a site name of 20 letters
WIDEST = 170  # terminal columns that fit every candidate as well
NARROW = 64  # columns of the stacked table; a site name that does not fit beside them gets a line of its own


def build_report(
    *,
    run: RunConfig,
    rows: Sequence[tuple[str, TaskRow]],
    rounds: Sequence[RoundRecord],
    trunk_parameters: int,
    seconds: float,
) -> Report:
    """The report as plain values for JSON: sites by name, their tasks in the given order, rounds in order.

    A number that is not finite (a site's curve may diverge) becomes None, because JSON has no NaN.
    """
    sites = [
        {
            "site": site,
            **row.model_dump(mode="json", exclude={"n_groups"}),
            "verdict": verdict(row),
            "gated_verdict": gated_verdict_of(row.model_dump()),
        }
        for site, row in sorted(rows, key=lambda pair: pair[0])
    ]
    report: Report = {
        "trunkline": __version__,
        "run": {
            "name": run.name,
            "strategy": run.strategy.name,
            "backbone": run.trunk.backbone,
            "rounds": run.total_rounds,
            "refit": run.refit,  # the second half of the rounds, on all labelled rows, made the models that are scored
            "seed": run.seed,
            "trunk_parameters": trunk_parameters,
            "seconds": seconds,
        },
        "cohort": sorted({site for site, _ in rows}.union(*(record.sites for record in rounds))),
        "sites": sites,
        "conflicts": conflicts_of([record.metrics for record in rounds]),
        "rounds": [
            {
                "round": record.round,
                "sites": list(record.sites),
                "refused": [{"site": refusal.site, "cause": refusal.cause} for refusal in record.refused],
                "seconds": record.seconds,
                "bytes_up": record.bytes_up,
                "bytes_down": record.bytes_down,
                "train_loss": record.train_loss,
                "curves": record.metrics,
            }
            for record in rounds
        ],
    }
    if run.cohort.mode == "buffered":
        report["buffered"] = _buffered(run, rounds)
        for entry, record in zip(report["rounds"], rounds, strict=True):
            entry["staleness"] = record.staleness
    finite: Report = plain(report)
    return finite


def _buffered(run: RunConfig, rounds: Sequence[RoundRecord]) -> Report:
    """The steps of a buffered run, and each site's updates in them."""
    ages: dict[str, list[int]] = {}
    for record in rounds:
        for site, updates in record.staleness.items():
            ages.setdefault(site, []).extend(updates)
    total = sum(map(len, ages.values()))
    return {
        "buffer": rounds[-1].buffer if rounds else run.cohort.buffer,
        "staleness_power": run.cohort.staleness_power,
        "staleness_limit": run.cohort.staleness_limit,
        "updates": total,
        "staleness_mean": sum(map(sum, ages.values())) / total if total else None,
        "staleness_max": max(map(max, ages.values()), default=None),
        "sites": {
            site: {"updates": len(updates), "share": len(updates) / total, "staleness_mean": sum(updates) / len(updates), "staleness_max": max(updates)}
            for site, updates in sorted(ages.items())
        },
    }  # fmt: skip


def verdict(row: TaskRow) -> str:
    """Whether federation was worth it for this site and task, as a sentence.

    Only the 95 % interval of federated minus local decides: if it contains 0, the test groups cannot distinguish the two
    models, however large the difference looks.
    """
    return verdict_of(row.model_dump())


def write_report(
    report: Report, out: Path, predictions: "Mapping[tuple[str, str], Predictions] | None" = None, *, page: bool = True
) -> None:
    """Write `out`/report.json and `out`/report.html; equal arguments give equal bytes.

    Args:
        predictions: (site, task) -> test rows, drawn into the page only; report.json never contains a row.
        page: False writes report.json only; the plots cost a second or more.

    Raises:
        StorageError: the folder cannot be written.
    """
    text = json.dumps(plain(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "report.json", f"{text}\n".encode())
    if page:
        from trunkline.server.reporting import html  # here, because it brings matplotlib

        write_atomic(out / "report.html", html.page(report, predictions or {}).encode())


def read_report(out: Path) -> Report:
    """The report in `out`/report.json.

    Raises:
        StorageError: there is none, or it is not a report.
    """
    path = out / "report.json"
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StorageError(
            f"{path}: no such file. A run writes it when it ends; "
            "`trunkline simulate --resume` resumes one that stopped."
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: cannot be read as a report ({error}). Run again with --resume to write it again."
        ) from None
    if not isinstance(report, dict) or (missing := {"run", "sites", "rounds"} - report.keys()):
        cause = f"it has no `{min(missing)}`" if isinstance(report, dict) else "it is not a table"
        raise StorageError(f"{path}: not a worth-it report: {cause}. Give the output folder of a run.")
    return report


def print_report(report: Report, console: Console) -> None:
    """The table and the summary, at any width of `console`; no site name is ever cut."""
    run, rows = report["run"], report["sites"]
    console.print(Text(f"{shown(run['name'])}: is federation worth it?", style="bold"))
    names = {row["site"] for row in rows}
    width = console.width
    if max(map(len, names), default=0) <= (20 if width >= WIDE else width - NARROW):
        console.print(_table(rows, width=width, with_site=True))
    else:
        for name in sorted(names):
            console.print(Text(shown(name), style="bold"), soft_wrap=True)
            console.print(_table([row for row in rows if row["site"] == name], width=width, with_site=False))
    if width < WIDE:
        console.print(Text("* the model to use, chosen on validation data", style="dim"))
    console.print()
    for line in summary(report):
        console.print(Text(shown(line)))


# --- the terminal ------------------------------------------------------------------------------------------------

STYLES: dict[Outcome, str] = {"helps": "green", "hurts": "red", "same": "", "unknown": "dim"}


def _table(rows: Sequence[Row], *, width: int, with_site: bool) -> Table:
    """Two lines for each site and task. A narrow terminal stacks the values and marks the model to use with a star."""
    wide = width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    if with_site:
        table.add_column("site", no_wrap=True)
    table.add_column("task" if wide else "task\nmetric (unit)", overflow="fold", min_width=12)
    if wide:
        table.add_column("metric (unit)", overflow="fold", min_width=8)
        table.add_column("n test", justify="right", no_wrap=True)
        table.add_column("local", justify="right", no_wrap=True)
        table.add_column("federated", justify="right", no_wrap=True)
    else:
        table.add_column("local\nfederated", justify="right", no_wrap=True)
    table.add_column("difference\n[95 % interval]", no_wrap=True)
    if wide:
        table.add_column("use\nreaches", no_wrap=True)
    if width >= WIDEST:
        table.add_column("other candidates", no_wrap=True)
    table.add_column("verdict", min_width=14)
    before = None
    for row in rows:
        if before not in (None, row["site"]):
            table.add_section()
        style = STYLES[outcome(row)]
        task, unit = Text(shown(row["task"])), Text(shown(metric(row)), style="dim")
        change = Text(difference(row), style=style) + Text("\n") + Text(interval(row), style="dim")
        end = Text(shown(row["verdict"]), style=style)
        cells = [Text(shown(row["site"]) if row["site"] != before else "")] if with_site else []
        if wide:
            values = [Text(value(row, model)) for model in ("local", "federated")]
            cells += [task, unit, Text(f"{row['n_test']:,}"), *values, change, _used(row)]
            if width >= WIDEST:
                cells.append(_others(row))
            cells.append(end)
        else:
            names = ["local", "federated"] + ([row["chosen"]] if row["chosen"] not in ("local", "federated") else [])
            star = {model: "*" if row["chosen"] == model and value(row, model) != "-" else " " for model in names}
            stacked = Text("\n".join(value(row, model) + star[model] for model in names))
            if len(names) > 2:
                unit = unit + Text(f"\n{shown(row['chosen'])}", style="")
            cells += [task + Text("\n") + unit, stacked, change, end]
        table.add_row(*cells)
        before = row["site"]
    return table


def _used(row: Row) -> Text:
    """The gate's choice, and its value if that has no column of its own."""
    of = after_gate(row)
    name = Text(shown(row["chosen"]))
    if row["chosen"] in ("local", "federated") or of == FEDERATED:
        return name
    return name + Text("\n") + Text(value(row, "gated"), style=STYLES[outcome(row, of)])


def _others(row: Row) -> Text:
    kept = [model for model in row.get("candidates", {}) if model not in ("local", "federated", row["chosen"])]
    return Text("\n".join(f"{shown(model)} {value(row, model)}" for model in kept), style="dim")
