"""The results of the API: the data, a few lines for a prompt, and a table for a notebook."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.api.html import draw_lines, draw_table

if TYPE_CHECKING:
    from trunkline.client.check import CheckReport

Report = dict[str, Any]
Rows = list[dict[str, Any]]
MOST_LINES = 8  # rows that a `repr` shows; the notebook's table has all


@dataclass(frozen=True, repr=False)
class SimulationResult:
    """The worth-it report of a simulated run.

    Args:
        path: folder of the run.
        report: the contents of `report.json`, described in docs/results.md.
    """

    path: Path
    report: Report

    @property
    def rows(self) -> Rows:
        """One dictionary for each site and task: `site`, `task`, `metric`, `local`, `federated`, `verdict` and more."""
        return list(self.report["sites"])

    @property
    def page(self) -> Path:
        """The report as a page for a browser."""
        return self.path / "report.html"

    @property
    def trunk(self) -> Path:
        """The released trunk, for `adapt`; absent after a strategy that releases none."""
        return self.path / "trunk.safetensors"

    def __repr__(self) -> str:
        from trunkline.server.reporting.summary import interval, metric, shown, value

        lines = [
            f"{row['site']}, {row['task']}: {metric(row)} alone {value(row, 'local')}, federated {value(row, 'federated')} "
            f"{interval(row)}; {row['verdict']}"
            for row in self.rows
        ]
        return shown(_lines(f"SimulationResult({str(self.path)!r}): {self._title()}", lines))

    def _repr_html_(self) -> str:
        from trunkline.server.reporting.summary import difference, interval, metric, summary, value

        headings = ("site", "task", "metric", "n test", "alone", "federated", "difference", "95 % interval", "use", "verdict")  # fmt: skip
        rows = [
            (row["site"], row["task"], metric(row), f"{row['n_test']:,}", value(row, "local"), value(row, "federated"),
             difference(row), interval(row), row["chosen"], row["verdict"])
            for row in self.rows
        ]  # fmt: skip
        return draw_lines([self._title()], bold=True) + draw_table(headings, rows) + draw_lines(summary(self.report))

    def _title(self) -> str:
        run = self.report["run"]
        sites = len({row["site"] for row in self.rows})
        return f"run {run['name']!r}, {run['strategy']}, {sites} sites, {run['rounds']} rounds"


@dataclass(frozen=True, repr=False)
class SiteCheck:
    """The rows, tasks and channels that a site would train on, and every problem.

    Args:
        path: the site folder.
        report: `site`, `ok`, `files`, `rows`, `samples`, `groups`, `tasks`, `channels`, `problems` and `notes`.
        details: the objects behind `report`.
    """

    path: Path
    report: Report
    details: "CheckReport" = field(compare=False)

    @property
    def ok(self) -> bool:
        """Whether the site can train."""
        return bool(self.report["ok"])

    @property
    def rows(self) -> Rows:
        """One dictionary for each task: `task`, `kind`, `columns`, `unit`, `weight`, and a text for each part of the data."""
        return list(self.report["tasks"])

    def __repr__(self) -> str:
        return _lines(f"SiteCheck({str(self.path)!r}): {self._verdict()}", [*self._facts(), *self._remarks()])

    def _repr_html_(self) -> str:
        parts = ("train", "validation", "test")
        tasks = [
            (row["task"], row["kind"], ", ".join(row["columns"]), row["unit"], f"{row['weight']:g}",
             *(row[part] for part in parts))
            for row in self.rows
        ]  # fmt: skip
        channels = [
            (row["channel"], *(_short(row[key]) for key in ("minimum", "median", "maximum")), f"{row['missing']:.2%}",
             f"{row['outliers']:,}")
            for row in self.report["channels"]
        ]  # fmt: skip
        return (
            draw_lines([self._verdict()], bold=True)
            + draw_lines([*self._facts(), *self._remarks()])
            + draw_table(("task", "kind", "columns", "unit", "weight", *parts), tasks)
            + draw_table(("channel", "min", "median", "max", "missing", "outliers"), channels)
        )

    def _verdict(self) -> str:
        from trunkline.client.data.notes import counted

        name = self.report["site"]
        if self.ok:
            return f"{name} is ready to train"
        return f"{counted(len(self.report['problems']), 'problem')} to mend before {name} can train"

    def _facts(self) -> list[str]:
        from trunkline.client.data.notes import counted

        report = self.report
        samples = ", ".join(f"{part} {count:,}" for part, count in report["samples"].items())
        rows = f"{counted(report['rows'], 'row')} in {counted(len(report['files']), 'file')}"
        return [f"{rows}; samples: {samples}"] if samples else [rows]

    def _remarks(self) -> list[str]:
        remarks = [("problem", remark) for remark in self.report["problems"]]
        remarks += [(remark["level"], remark) for remark in self.report["notes"]]
        return [
            f"{level}: " + " ".join(filter(None, (remark["where"] and f"{remark['where']}:", remark["what"], remark["remedy"])))
            for level, remark in remarks
        ]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Adaptation:
    """The model that a new plant should use, and the evidence for it.

    Args:
        path: folder of the model and its evidence.
        report: the evidence, described in docs/adapt.md.
        model: file of the model.
        page: the evidence as a page for a browser.
        sealed: whether both files are encrypted, because the plant's state is.
        signature: one sentence on the signature of the release.
    """

    path: Path
    report: Report
    model: Path
    page: Path
    sealed: bool = False
    signature: str = ""

    @property
    def rows(self) -> Rows:
        """One dictionary for each task: `task`, `metric`, `unit`, `figures` and `gains` of the candidates."""
        return list(self.report["tasks"])

    @property
    def choice(self) -> str:
        """Name of the candidate to use: `as_is`, `probe`, `lp_ft`, `lora`, `full`, `interpolated` or `scratch`."""
        return str(self.report["choice"]["name"])

    def __repr__(self) -> str:
        lines = [
            f"{row['task']}: {row['metric']} adapted {_short(row['figures'].get('adapted'))}, "
            f"as is {_short(row['figures'].get('as_is'))}, from scratch {_short(row['figures'].get('scratch'))}"
            for row in self.rows
        ]
        return _lines(f"Adaptation({str(self.path)!r}): {self._title()}", [*lines, f"model: {self.model}"])

    def _repr_html_(self) -> str:
        from trunkline.client.adaptation.evidence import spread

        rows = [
            (row["task"], f"{row['metric']} ({row['unit']})" if row["unit"] else row["metric"],
             *(_short(row["figures"].get(name)) for name in ("adapted", "as_is", "scratch")),
             *(spread(row["gains"].get(name, {"difference": None})) for name in ("as_is", "scratch")), row["on"])
            for row in self.rows
        ]  # fmt: skip
        headings = (
            "task",
            "metric",
            "adapted",
            "as is",
            "from scratch",
            "gain over as is",
            "over scratch",
            "scored on",
        )
        notes = [*self.report["notes"], *filter(None, (self.signature,)), f"model: {self.model}"]
        return draw_lines([self._title()], bold=True) + draw_table(headings, rows) + draw_lines(notes)

    def _title(self) -> str:
        groups = self.report["labelled_groups"]
        return f"{self.report['site']} with {groups} labelled groups: use {self.choice}"


def describe_check(details: "CheckReport") -> Report:
    """A check as plain values, ready for JSON."""
    survey = details.survey
    site = survey.site if survey else None
    parts = {"train": site.train, "validation": site.validation, "test": site.test} if site else {}
    tasks = site.tasks if site else {}
    remarks = ("where", "what", "remedy")
    figures = ("channel", "minimum", "median", "maximum", "missing", "outliers")
    return {
        "site": survey.config.name if survey else details.folder.name,
        "ok": details.ok,
        "files": [path.name for path in survey.files] if survey else [],
        "rows": survey.rows if survey else 0,
        "samples": {part: len(samples) for part, samples in parts.items()},
        "groups": dict(survey.groups) if survey else {},
        "tasks": [
            {
                "task": name,
                "kind": task.kind,
                "columns": list(task.config.columns),
                "unit": task.config.unit,
                "weight": task.config.weight,
                **{part: task.describe(samples.labels[name]) for part, samples in parts.items()},
            }
            for name, task in tasks.items()
        ],
        "channels": [{key: getattr(row, key) for key in figures} for row in (survey.statistics if survey else ())],
        "problems": [{key: getattr(problem, key) for key in remarks} for problem in details.problems],
        "notes": [{key: getattr(note, key) for key in ("level", *remarks)} for note in details.notes],
    }


def _lines(title: str, lines: list[str]) -> str:
    shown = lines if len(lines) <= MOST_LINES + 1 else [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more"]
    return "\n  ".join([title, *shown])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
