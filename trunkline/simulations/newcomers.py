"""Sites that stay out of a simulated federation and come to it at the end, with its released trunk and a few labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trunkline.client.adaptation import evidence
from trunkline.client.adaptation.adapt import adapt_data
from trunkline.client.adaptation.choice import label_of
from trunkline.client.data.site_data import open_newcomer
from trunkline.config.run import NewcomersConfig
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.release import read_release

COLUMNS = ("adapted", "as_is", "scratch")


def set_apart(folders: Sequence[Path], newcomers: NewcomersConfig) -> tuple[list[Path], list[Path]]:
    """(members, newcomers) of the site folders, by the `name` in site.toml.

    Raises:
        ConfigError: a newcomer is none of the sites, or no site is left to federate.
    """
    if not newcomers.sites:
        return list(folders), []
    names = {folder: read_site(folder).name for folder in folders}
    if missing := [name for name in newcomers.sites if name not in names.values()]:
        raise ConfigError(f"[newcomers] sites names {missing[0]!r}; the sites are {', '.join(sorted(names.values()))}.")
    apart = [folder for folder in folders if names[folder] in newcomers.sites]
    if len(apart) == len(folders):
        raise ConfigError("[newcomers] sites names every site, so no site is left to federate. Take one out.")
    return [folder for folder in folders if folder not in apart], apart


def onboard(folders: Sequence[Path], release: Path, newcomers: NewcomersConfig, out: Path) -> list[dict[str, Any]]:
    """Adapt every newcomer, with all its labels or with each of `labelled_groups`; rows for report["newcomers"].

    One that cannot be adapted costs itself only: its row has the cause. The model and evidence of all its labels, or of
    most groups, lie in `out`/newcomers/<folder>.

    Raises:
        StorageError: the release cannot be read; ConfigError: the run made none.
    """
    if not release.exists():
        raise ConfigError(
            f"{release}: the run released no trunk, so [newcomers] have nothing to start from. Lend the trunk."
        )
    arrays, card = read_release(release)
    rows: list[dict[str, Any]] = []
    for folder in folders:
        name = read_site(folder).name
        try:
            data = open_newcomer(folder, None, card.scales)
            counts: list[int | None] = [*sorted(set(newcomers.labelled_groups))] or [None]
            for index, count in enumerate(counts):
                adapted = adapt_data(data, arrays, card, labelled=count)
                last = index == len(counts) - 1
                facts = evidence.collect(adapted, curve=last and not newcomers.labelled_groups)
                if last:
                    evidence.write(adapted, facts, out / "newcomers" / folder.name)
                rows += [_row(name, facts, task) for task in facts["tasks"]]
        except DataError as error:
            rows.append({"site": name, "problem": str(error)})
    return rows


def _row(site: str, facts: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    return {
        "site": site,
        "labelled_groups": facts["labelled_groups"],
        **{key: task[key] for key in ("task", "kind", "metric", "unit", "better", "on", "groups")},
        **{column: task["figures"].get(column) for column in COLUMNS},
        "chosen": facts["choice"]["name"],
        "share": facts["choice"]["share"],
        "why": facts["choice"]["why"],
        "gains": task["gains"],
    }


def print_newcomers(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one table: each newcomer's figures by its labels, beside the release as it is and training from scratch."""
    if not rows:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), title="Newcomers", title_justify="left")
    for heading in (
        "site",
        "labelled groups",
        "task",
        "metric",
        "adapted",
        "as is",
        "scratch",
        "by",
        "gain over as is (95 %)",
    ):
        table.add_column(heading, justify="left" if heading in ("site", "task", "metric", "by") else "right")
    for row in rows:
        if "problem" in row:
            table.add_row(row["site"], "-", row["problem"])
            continue
        cells = [evidence.figure(row[column]) for column in COLUMNS]
        gain = row["gains"].get("as_is") or row["gains"].get("scratch") or {"difference": None}
        by = label_of(row["chosen"], row["share"])
        table.add_row(
            row["site"], str(row["labelled_groups"]), row["task"], f"{row['metric']} {row['unit']}".strip(), *cells, by,
            evidence.spread(gain),
        )  # fmt: skip
    console.print(table)
