"""Everything private of a site, as `haystack` looks for it in recorded bytes."""

from collections.abc import Mapping
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
from trunkline.egress_audit.byte_search import Haystack, Runs
from trunkline.egress_audit.canaries import Planted, patterns
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import RoundRequest

MOST_VALUES = 1_000_000  # of a site's rows that are searched for, from the first on
SHORTEST = 5  # letters of a name that could not stand there by chance


@dataclass(frozen=True)
class Needle:
    """Something that must not be found: texts or bytes, or runs of numbers."""

    what: str
    where: str
    texts: tuple[bytes, ...] = ()
    runs: Runs | None = None


@dataclass
class Found:
    """What became of one needle."""

    what: str
    where: str
    searched: int
    left_out: int
    found: int
    places: list[str] = field(default_factory=list)


def private_tensors(entries: dict[int, Entry], order: RoundRequest) -> list[Needle]:
    """Everything that a vault holds beside what is lent, of all rounds.

    Args:
        order: of round 0. Its trunk is the centre's, and the twin that trains alone begins like it: where that is zero, what
            the twin has after round 1 is the very change that was lent, and no secret.
    """
    parts: dict[str, Runs] = {}
    start = first_trunk(order.trunk, order.seed)
    first = entries[1].delta if 1 in entries else Arrays()
    lent = {name: array.tobytes() for name, array in first.items() if name in start and not start[name].any()}

    def add(what: str, state: Mapping[str, NDArray[Any]]) -> None:
        for name, array in state.items():
            if np.asarray(array).dtype.kind == "f" and np.asarray(array).tobytes() != lent.get(name):
                parts.setdefault(what, Runs()).add(array)

    for entry in entries.values():
        add("stem, heads and norms", entry.private)
        add("the twin that trains alone", entry.local)
        add("the personal model", entry.personal)
        for who, state in entry.best.items():
            kept = state if who != "federated" else {name: state[name] for name in state if name in entry.private}
            add("the best models so far", kept)
        for state in entry.balance.values():
            add("what balances the losses", state)
    rounds = ", ".join(map(str, sorted(entries)))
    return [Needle(what, f"vault, after rounds {rounds}", runs=runs) for what, runs in parts.items()]


def data_of(folder: Path, site: SiteData, lent_scaler: bool) -> list[Needle]:
    """Rows as they are in the files and as they are trained on, labels, and the scaler's statistics unless these are lent."""
    config, raw, labels = site.config, Runs(), Runs()
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
    scaled = Runs()
    for part in (site.train, site.validation, site.test):
        rows32 = part.values[: MOST_VALUES // max(1, part.values.shape[1])]
        scaled.add(rows32).add(rows32.T)
        for name, column in part.labels.items():
            flat = np.asarray(column, np.float64).reshape(len(column), -1).T
            labels = labels.add(flat) if config.tasks[name].kind in NUMBERS else labels.add_classes(flat)
    needles = [
        Needle("sensor values", "data files", runs=raw),
        Needle("sensor values, scaled", "what is trained on", runs=scaled),
        Needle("labels", "data files and tasks", runs=labels),
    ]
    if not lent_scaler and config.data.scale == "zscore":
        statistics = Runs().add(site.scaler.mean).add(site.scaler.std).add(site.scaler.std**2)
        needles.append(Needle("means and deviations", "scaler", runs=statistics))
    return needles


def data_files(folder: Path, config: SiteConfig) -> list[Path]:
    globs = [
        glob
        for one in (config.data.files, config.data.test_files)
        for glob in ((one,) if isinstance(one, str) else one)
    ]
    found = {path for glob in globs for path in folder.glob(glob) if path.is_file()}
    return sorted(path for path in found if path.name not in ("site.toml", POLICY))


def names_of(folder: Path, site: SiteData, agreed: str) -> Needle:
    """Names of sensors, label columns, groups, classes and files: all that the contract does not list and chance would not write."""
    config, data = site.config, site.config.data
    names = {*data.channels, *data.categorical, *data.regime, *site.train.group_names, str(folder), folder.parent.name}
    names |= {name for task in config.tasks.values() for name in (*task.columns, *(task.classes or ()))}
    names |= {name for name in (data.group, data.order) if name}
    names |= {path.name for path in data_files(folder, config)}
    telling = sorted(name for name in names if len(name) >= SHORTEST and name not in agreed and not name.isdigit())
    return Needle(
        "names of sensors, labels, groups, files",
        "site.toml and data",
        tuple(one for name in telling for one in _written(name)),
    )


def _written(name: str) -> tuple[bytes, ...]:
    return name.encode(), name.encode("utf-16-le")


def canaries_of(planted: Planted) -> list[Needle]:
    needles = [Needle("canary: a sensor's name", planted.column[0], _written(planted.column[0]))]
    if planted.group:
        needles.append(Needle("canary: a group", planted.group, _written(planted.group)))
    for what, values in (("canary: sensor values", planted.values), ("canary: a numeric label", planted.labels)):
        if values:
            texts = tuple(pattern for value in values for pattern in patterns(value))
            needles.append(Needle(what, f"{len(values)} cells of training rows", texts, Runs().add(np.array(values))))
    return needles


def weights_of(weights: Mapping[str, NDArray[Any]]) -> Needle:
    """What `plant_in_vault` put into stem and heads."""
    runs = Runs()
    for array in weights.values():
        runs.add(array)
    return Needle("canary: weights", f"{len(weights)} tensors of stem and heads before round 2", runs=runs)


def look_for(needles: list[Needle], haystack: Haystack) -> list[Found]:
    results = []
    for needle in needles:
        result = Found(needle.what, needle.where, len(needle.texts), 0, 0)
        for text in needle.texts:
            if places := haystack.places_of(text):
                result.found += 1
                result.places += places
        if needle.runs is not None:
            found, among = haystack.share_of(needle.runs)
            result.found, result.searched = result.found + found, result.searched + among
            result.left_out = needle.runs.left_out
        results.append(result)
    return results
