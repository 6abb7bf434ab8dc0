"""Every private value of a site, in the form in which `byte_search` searches recorded bytes for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data import SiteData
from trunkline.client.data.formats import load
from trunkline.client.data.read import NUMBERS, roles_of
from trunkline.client.state.vault import Entry
from trunkline.config.site import POLICY, SiteConfig
from trunkline.egress_audit.byte_search import NumberRuns, RecordedBytes
from trunkline.egress_audit.canaries import Canaries, patterns
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import RoundRequest

MOST_VALUES = 1_000_000  # numbers of a site's rows that are searched for, from the first row on
SHORTEST = 5  # letters of a name that could not occur by chance


@dataclass(frozen=True)
class PrivateValue:
    """A value that must not be in the recorded bytes: as texts or bytes, or as runs of numbers.

    Args:
        name: what it is, for a person.
        source: where the plant keeps it.
    """

    name: str
    source: str
    texts: tuple[bytes, ...] = ()
    runs: NumberRuns | None = None


@dataclass
class SearchResult:
    """The result of the search for one private value.

    Args:
        name: of the value.
        source: of the value.
        patterns: searched for.
        left_out: runs of numbers that were too common to be evidence.
        hits: patterns that the recorded bytes contain.
        packings: how the bytes with the hits were packed.
    """

    name: str
    source: str
    patterns: int = 0
    left_out: int = 0
    hits: int = 0
    packings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The result as proof.json has it."""
        return {
            "what": self.name, "where": self.source, "searched": self.patterns, "left_out": self.left_out, "found": self.hits,
            "places": self.packings,
        }  # fmt: skip


def private_tensors(entries: dict[int, Entry], request: RoundRequest) -> list[PrivateValue]:
    """Every tensor of all rounds in a vault, except the lent ones.

    Args:
        entries: round -> its entry in the vault.
        request: of round 0. The local baseline starts from the server's trunk, as the request has it. Where that is zero, the
            baseline's values after round 1 are the very change that was lent, and no secret.
    """
    parts: dict[str, NumberRuns] = {}
    start = first_trunk(request.trunk, request.seed)
    first = entries[1].delta if 1 in entries else Arrays()
    lent = {name: array.tobytes() for name, array in first.items() if name in start and not start[name].any()}

    def add(part: str, state: Mapping[str, NDArray[Any]]) -> None:
        for name, array in state.items():
            if np.asarray(array).dtype.kind == "f" and np.asarray(array).tobytes() != lent.get(name):
                parts.setdefault(part, NumberRuns()).add(array)

    for entry in entries.values():
        add("stem, heads and norms", entry.private)
        add("the local baseline", entry.local)
        add("the personal model", entry.personal)
        for side, state in entry.best.items():
            kept = state if side != "federated" else {name: state[name] for name in state if name in entry.private}
            add("the best models so far", kept)
        for state in entry.balance.values():
            add("the balance of the losses", state)
    rounds = ", ".join(map(str, sorted(entries)))
    return [PrivateValue(part, f"vault, after rounds {rounds}", runs=runs) for part, runs in parts.items()]


def values_in_data(folder: Path, site: SiteData, lent_scaler: bool) -> list[PrivateValue]:
    """Rows as they are in the files and as the site trains on them, labels, and the scaler's statistics unless these are lent."""
    config, raw, labels = site.config, NumberRuns(), NumberRuns()
    for path in data_files(folder, config):
        table = load(path, roles_of(config)[0])
        columns = [
            np.asarray(table[name].cast(float, strict=False).to_numpy(), np.float64) for name in config.data.channels
        ]
        rows = np.stack(columns, axis=1)[: MOST_VALUES // max(1, len(columns))]
        raw.add(rows).add(rows.T)  # across the sensors of a row, and down each sensor
        for task in config.tasks.values():
            for name in task.columns:
                cells = table[name].cast(float, strict=False).to_numpy()
                labels = labels.add(cells) if task.kind in NUMBERS else labels.add_classes(cells)
    scaled = NumberRuns()
    for part in (site.train, site.validation, site.test):
        rows32 = part.values[: MOST_VALUES // max(1, part.values.shape[1])]
        scaled.add(rows32).add(rows32.T)
        for name, column in part.labels.items():
            flat = np.asarray(column, np.float64).reshape(len(column), -1).T
            labels = labels.add(flat) if config.tasks[name].kind in NUMBERS else labels.add_classes(flat)
    values = [
        PrivateValue("sensor values", "data files", runs=raw),
        PrivateValue("sensor values, scaled", "training rows", runs=scaled),
        PrivateValue("labels", "data files and tasks", runs=labels),
    ]
    if not lent_scaler and config.data.scale == "zscore":
        statistics = NumberRuns().add(site.scaler.mean).add(site.scaler.std).add(site.scaler.std**2)
        values.append(PrivateValue("means and deviations", "scaler", runs=statistics))
    return values


def data_files(folder: Path, config: SiteConfig) -> list[Path]:
    """The files of a site with its rows."""
    globs = [
        glob
        for globs in (config.data.files, config.data.test_files)
        for glob in ((globs,) if isinstance(globs, str) else globs)
    ]
    paths = {path for glob in globs for path in folder.glob(glob) if path.is_file()}
    return sorted(path for path in paths if path.name not in ("site.toml", POLICY))


def site_names(folder: Path, site: SiteData, contract: str) -> PrivateValue:
    """Names of sensors, label columns, groups, classes and files that the contract does not list and that no chance would write.

    Args:
        contract: its text.
    """
    config, data = site.config, site.config.data
    names = {*data.channels, *data.categorical, *data.regime, *site.train.group_names, str(folder), folder.parent.name}
    names |= {name for task in config.tasks.values() for name in (*task.columns, *(task.classes or ()))}
    names |= {name for name in (data.group, data.order) if name}
    names |= {path.name for path in data_files(folder, config)}
    distinctive = sorted(
        name for name in names if len(name) >= SHORTEST and name not in contract and not name.isdigit()
    )
    return PrivateValue(
        "names of sensors, labels, groups, files",
        "site.toml and data",
        tuple(pattern for name in distinctive for pattern in _encodings(name)),
    )


def _encodings(name: str) -> tuple[bytes, ...]:
    return name.encode(), name.encode("utf-16-le")


def canary_values(canaries: Canaries) -> list[PrivateValue]:
    """The canaries that `insert_in_data` inserted."""
    values = [PrivateValue("canary: a sensor's name", canaries.column[0], _encodings(canaries.column[0]))]
    if canaries.group:
        values.append(PrivateValue("canary: a group", canaries.group, _encodings(canaries.group)))
    for name, cells in (("canary: sensor values", canaries.values), ("canary: a numeric label", canaries.labels)):
        if cells:
            texts = tuple(pattern for cell in cells for pattern in patterns(cell))
            source = f"{len(cells)} cells of training rows"
            values.append(PrivateValue(name, source, texts, NumberRuns().add(np.array(cells))))
    return values


def canary_weights(weights: Mapping[str, NDArray[Any]]) -> PrivateValue:
    """The canaries that `insert_in_vault` inserted into stem and heads; name -> array of the parameter's shape."""
    runs = NumberRuns()
    for array in weights.values():
        runs.add(array)
    return PrivateValue("canary: weights", f"{len(weights)} tensors of stem and heads before round 2", runs=runs)


def search(values: Iterable[PrivateValue], recorded: RecordedBytes) -> list[SearchResult]:
    """Search recorded bytes for private values; one result for each, in their order."""
    results = []
    for value in values:
        result = SearchResult(value.name, value.source, len(value.texts))
        for text in value.texts:
            if packings := recorded.views_with(text):
                result.hits += 1
                result.packings += packings
        if value.runs is not None:
            hits, runs = recorded.count(value.runs)
            result.hits, result.patterns = result.hits + hits, result.patterns + runs
            result.left_out = value.runs.left_out
        results.append(result)
    return results
