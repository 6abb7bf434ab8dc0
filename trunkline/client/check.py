"""`trunkline check`: what a site would train on, and everything that is wrong with it, at once and without writing a byte."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trunkline.client.data import Note, Problem, SiteData, Survey, WindowSet, survey
from trunkline.client.data.notes import counted, some
from trunkline.client.data.split import PARTS
from trunkline.errors import ConfigError
from trunkline.security.encryption import find_seal

MOST_CHANNELS = 60  # lines of the channel table; a thousand channels are nobody's page
MARK = {"info": ("i", "cyan"), "warning": ("!", "yellow")}


@dataclass(frozen=True)
class CheckReport:
    """What `trunkline check` found.

    Args:
        folder: the site folder.
        survey: how far opening came; None where site.toml itself cannot be read.
        problems: what must be mended before the site can train.
    """

    folder: Path
    survey: Survey | None
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(self.survey.findings.notes) if self.survey else ()


def check_site(folder: Path, state: Path | None = None) -> CheckReport:
    """Open the site as training would, and collect every problem on the way.

    Args:
        folder: holds site.toml.
        state: where split.json is kept; None: look at a fresh split. Nothing is written either way.
    """
    try:
        result = survey(folder, state, seal=find_seal(state) if state else None)
    except ConfigError as error:
        return CheckReport(folder, None, tuple(Problem("", line) for line in str(error).splitlines()))
    problems = tuple(result.findings.problems)
    if not problems and (result.site is None or not len(result.site.train)):
        problems = (Problem(str(folder), "holds nothing to train on.", "Look at `files` in site.toml."),)
    return CheckReport(folder, result, problems)


def render(report: CheckReport, console: Console) -> None:
    """The report as a page: what there is, what is odd, what is wrong, and the verdict last, where the eye ends."""
    result = report.survey
    name = result.config.name if result else report.folder.name
    console.print()
    console.rule(Text.assemble((name, "bold"), f"  {report.folder}"), align="left", style="dim")
    if result:
        console.print(_facts(result))
        if result.site:
            console.print(_tasks(result.site))
        if result.statistics:
            console.print(_channels(result))
    if report.notes:
        lines = (_line(*MARK[note.level], note.where, note.what, note.remedy) for note in report.notes)
        console.print(_section("Notes", lines))
    if report.problems:
        wrong = (_line("x", "red", problem.where, problem.what, problem.remedy) for problem in report.problems)
        console.print(_section("Problems", wrong))
        verdict = Text(f"{counted(len(report.problems), 'problem')} to mend before {name} can train.", "bold red")
    else:
        aside = list(result.findings.aside) if result else []
        without = f", without {counted(len(aside), 'task')}: {some(aside)}" if aside else ""
        verdict = Text(f"{name} is ready to train{without}.", "bold yellow" if aside else "bold green")
    console.print(verdict)


def _section(title: str, lines: Iterable[Text]) -> Padding:
    return Padding(Group(Text(title, "bold"), *lines), (0, 0, 1, 0))


def _line(mark: str, style: str, where: str, what: str, remedy: str) -> Text:
    place = (f"{where}: ", "bold") if where else ""
    return Text.assemble((f"  {mark} ", f"bold {style}"), place, what, (f" {remedy}" if remedy else "", "dim"))


def _grid(*headers: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", no_wrap=header in right)
    return table


def _facts(result: Survey) -> Padding:
    data, site = result.config.data, result.site
    grid = Table.grid(padding=(0, 2))
    names = some([path.name for path in result.files], 4)
    facts = {"files": f"{len(result.files)}: {names}" if result.files else "none could be read"}
    facts["rows"] = f"{result.rows:,}"
    if site:
        what = (
            f"windows of {data.window} rows, every {data.stride}"
            if data.window and data.stride > 1
            else f"windows of {data.window} rows"
            if data.window
            else "rows"
        )
        sets = _parts(site)
        facts["samples"] = f"{what}: " + ", ".join(f"{part} {len(one):,}" for part, one in sets.items())
        if data.group:
            facts["groups"] = f"by `{data.group}`: " + ", ".join(f"{part} {result.groups[part]:,}" for part in PARTS)
        regimes = len(site.scaler.regimes)
        facts["scaling"] = (
            f"{counted(regimes, 'regime')} of {', '.join(data.regime)}" if data.regime else "one z-score a channel"
        )
        facts["inputs"] = counted(len(site.channels), "channel") + (" (age is one)" if data.age else "")
        if site.categories:
            sizes = zip(data.categorical, site.categories, strict=False)
            facts["inputs"] += ", " + ", ".join(f"{column} ({size - 1} values)" for column, size in sizes)
    if result.split:
        split = result.split
        shares = (
            f"validation {split.validation:.0%}, test {split.test:.0%}"
            if not data.test_files
            else f"validation {split.validation:.0%}, test from `test_files`"
        )
        facts["split"] = f"by {split.by}, {shares}, seed {split.seed}"
        if split.folds is not None:
            facts["split"] += f"; tested on fold {split.fold} of 0 to {split.folds - 1}"
        if split.labelled:
            facts["split"] += f"; {counted(len(split.labelled), 'training group')} with labels"
    for key, value in facts.items():
        grid.add_row(Text(key, "dim"), Text(value))
    return Padding(grid, (0, 0, 1, 0))


def _parts(site: SiteData) -> dict[str, WindowSet]:
    return dict(zip(PARTS, (site.train, site.validation, site.test), strict=True))


def _tasks(site: SiteData) -> Padding:
    grid = _grid("task", "kind", "target", "weight", *PARTS, right=("weight",))
    for name, task in site.tasks.items():
        cells = [task.describe(part.labels[name]) for part in _parts(site).values()]
        unit = f" ({task.config.unit})" if task.config.unit else ""
        grid.add_row(
            *(
                Text(cell)
                for cell in (
                    name,
                    task.kind,
                    ", ".join(task.config.columns[:3]) + (", ..." if len(task.config.columns) > 3 else "") + unit,
                    f"{task.config.weight:g}",
                    *cells,
                )
            )
        )
    return Padding(grid, (0, 0, 1, 0))


def _channels(result: Survey) -> Padding:
    grid = _grid(
        "channel", "min", "median", "max", "missing", "outliers", right=("min", "median", "max", "missing", "outliers")
    )
    for one in result.statistics[:MOST_CHANNELS]:
        figures = ["" if value is None else f"{value:.6g}" for value in (one.minimum, one.median, one.maximum)]
        missing = Text(f"{one.missing:.2%}" if one.missing else "-", "yellow" if one.missing > 0.2 else "")
        far = Text(f"{one.outliers:,}" if one.outliers else "-")
        grid.add_row(Text(one.channel), *map(Text, figures), missing, far)
    if (rest := len(result.statistics) - MOST_CHANNELS) > 0:
        grid.add_row(Text(f"... and {counted(rest, 'further channel')}", "dim"))
    return Padding(grid, (0, 0, 1, 0))
