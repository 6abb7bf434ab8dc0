"""The release at the end of a run, from which a new plant can start; the sites' statistics are merged exactly."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import trunkline
from trunkline.config.run import RunConfig
from trunkline.config.site import SITE_SCHEMA
from trunkline.errors import ContractError
from trunkline.protocol.arrays import SCALER_ARRAYS, Arrays
from trunkline.protocol.messages import PROTOCOL, Offer
from trunkline.release import (
    RELEASE,
    Card,
    Figure,
    GuardUsed,
    LabelScale,
    Lineage,
    Participation,
    PooledScale,
    write_release,
)
from trunkline.security.keys import now
from trunkline.security.signatures import Sign
from trunkline.server.releases.lineage import versions

SAME = 0.05  # of a setting's range: closer regimes are merged; the same share separates two levels at a site
LABEL = "scaler.label."
Floats = NDArray[np.float64]


def check_statistics(offer: Offer, arrays: Arrays) -> None:
    """Raise ContractError unless the `scaler.*` arrays beside `offer` can be merged with those of other sites.

    A site is not trusted: shapes, names, finiteness and signs are all checked.
    """
    labels = [name for name in arrays if name.startswith(LABEL)]
    tables = [name for name in arrays if name not in labels]
    tasks = {card.task for card in offer.tasks}
    if foreign := [name for name in labels if name.removeprefix(LABEL) not in tasks]:
        raise ContractError(f"`{foreign[0]}` is of a task that the site does not have")
    for name, array in arrays.items():
        if array.dtype != np.float64 or not np.isfinite(array).all():
            raise ContractError(f"`{name}` is not finite float64")
    for name in labels:
        if arrays[name].shape != (3,) or (arrays[name][[0, 2]] < 0.0).any():
            raise ContractError(f"`{name}` is not (count, mean, variance)")
    if not tables:
        return
    if sorted(tables) != sorted(SCALER_ARRAYS) or offer.inputs is None:
        raise ContractError(
            f"its statistics are {', '.join(tables)}; expected {', '.join(SCALER_ARRAYS)} and their names"
        )
    channels, settings = len(offer.inputs.channels), len(offer.inputs.settings)
    regimes = arrays["scaler.count"].shape[0] if arrays["scaler.count"].ndim == 2 else 0
    shapes = dict(zip(SCALER_ARRAYS, [(regimes, channels)] * 3 + [(regimes, settings), (settings,)], strict=True))
    for name, shape in shapes.items():
        if not regimes or arrays[name].shape != shape:
            raise ContractError(f"`{name}` has shape {arrays[name].shape}; its names require {shape}")
    for name in ("scaler.count", "scaler.variance", "scaler.widths"):
        if (arrays[name] < 0.0).any():
            raise ContractError(f"`{name}` is negative somewhere")


def pool(count: Floats, mean: Floats, variance: Floats) -> tuple[Floats, Floats, Floats]:
    """Count, mean and population variance of all values, from those of the sites.

    Shape:
        (sites, ...) each, count 0 where a site has no values -> (...) each; 0 where no site has any.
    """
    total = count.sum(axis=0)
    share = count / np.maximum(total, 1.0)
    middle = (share * mean).sum(axis=0)
    return total, middle, (share * (variance + (mean - middle) ** 2)).sum(axis=0)


def merge_scales(offers: Iterable[tuple[Offer, Arrays]]) -> tuple[PooledScale, ...]:
    """The input statistics of all sites: channels matched by name, regimes by the centres of their settings.

    Only sites with the same settings are merged. A site with one regime is merged with the matching one of another's six.
    """
    scaled = [(offer, arrays) for offer, arrays in offers if "scaler.count" in arrays and offer.inputs is not None]
    scaled.sort(key=lambda pair: (_settings(pair[0]), pair[0].site))
    return tuple(
        _merge(settings, list(members)) for settings, members in groupby(scaled, lambda pair: _settings(pair[0]))
    )


def _settings(offer: Offer) -> tuple[str, ...]:
    return offer.inputs.settings if offer.inputs is not None else ()


def _merge(settings: tuple[str, ...], members: Sequence[tuple[Offer, Arrays]]) -> PooledScale:
    channels: list[str] = []
    for offer, _ in members:
        channels += [name for name in offer.inputs.channels if name not in channels]  # type: ignore[union-attr]
    column_of = {name: column for column, name in enumerate(channels)}
    all_centres = np.concatenate([arrays["scaler.centres"] for _, arrays in members])
    widths = np.max([arrays["scaler.widths"] for _, arrays in members], axis=0)
    reach = SAME * np.maximum(widths, all_centres.max(axis=0) - all_centres.min(axis=0)) if settings else widths
    centres: list[Floats] = []
    # three tables for each site and regime, over the union of regimes and channels
    rows: list[tuple[int, int, Floats, Floats, Floats]] = []
    for site, (offer, arrays) in enumerate(members):
        columns = [column_of[name] for name in offer.inputs.channels]  # type: ignore[union-attr]
        for regime, centre in enumerate(arrays["scaler.centres"]):
            near = [index for index, other in enumerate(centres) if (np.abs(other - centre) <= reach).all()]
            if not near:
                centres.append(centre)
            tables = np.zeros((3, len(channels)))
            tables[:, columns] = [arrays[f"scaler.{name}"][regime] for name in ("count", "mean", "variance")]
            rows.append((near[0] if near else len(centres) - 1, site, *tables))
    merged = [
        pool(*(np.stack([row[part] for row in rows if row[0] == regime]) for part in (2, 3, 4)))
        for regime in range(len(centres))
    ]
    count, mean, variance = (np.stack([statistics[part] for statistics in merged]) for part in range(3))
    return PooledScale(
        settings=settings, widths=widths.tolist(), centres=np.stack(centres).tolist(), channels=tuple(channels),
        count=count.tolist(), mean=mean.tolist(), variance=variance.tolist(),
    )  # fmt: skip


def merge_labels(offers: Iterable[tuple[Offer, Arrays]]) -> dict[str, LabelScale]:
    """Task -> the scale of the labels of all sites that sent theirs."""
    tables: dict[str, list[Floats]] = {}
    for _, arrays in sorted(offers, key=lambda pair: pair[0].site):
        for name in arrays:
            if name.startswith(LABEL):
                tables.setdefault(name.removeprefix(LABEL), []).append(arrays[name])
    scales = {}
    for task, rows in sorted(tables.items()):
        count, mean, variance = (float(value) for value in pool(*np.stack(rows, axis=1)))
        if count > 0.0:
            scales[task] = LabelScale(count=count, mean=mean, std=float(np.sqrt(variance)) or 1.0)
    return scales


def release(
    out: Path,
    trunk: Arrays,
    run: RunConfig,
    key: str,
    lend: tuple[str, ...],
    offers: Sequence[tuple[Offer, Arrays]],
    file: str = RELEASE,
    *,
    rounds: int,
    parts: tuple[Participation, ...],
    figures: Mapping[str, Figure],
    guards: tuple[GuardUsed, ...] = (),
    budget: Mapping[str, float | str] | None = None,
    sign: Sign | None = None,
) -> Path | None:
    """Write `out`/trunk.safetensors; None if the run lends no trunk.

    Args:
        trunk: the final lent arrays.
        lend: the parts that the run's strategy lends.
        offers: of the sites that took part, each with its `once` arrays.
        file: name of the file, for a run with several trunks.
        rounds, parts, figures, guards, budget: of its `Lineage`.
        sign: signs the release; None: it stays unsigned.
    """
    if not any(name.startswith("trunk.") for name in trunk):
        return None
    inputs = [offer.inputs for offer, _ in offers if offer.inputs is not None]
    channels = {columns.channels for columns in inputs} if any(name.startswith("stem.") for name in trunk) else set()
    windows = {columns.window for columns in inputs}
    heads = {name.split(".")[1] for name in trunk if name.startswith("head.")}
    cards = {card.task: card for offer, _ in reversed(offers) for card in offer.tasks if card.task in heads}
    card = Card(
        run=run.name, key=key, rounds=run.rounds, seed=run.seed, strategy=run.strategy.name, trunk=run.trunk, lend=lend,
        window=windows.pop() if len(windows) == 1 else None,
        sites=tuple(sorted(offer.site for offer, _ in offers)),
        tasks=tuple(cards[name] for name in sorted(cards)),
        channels=channels.pop() if len(channels) == 1 else None,
        scales=merge_scales(offers), labels=merge_labels(offers),
        versions=tuple(sorted({trunkline.__version__, *(offer.version for offer, _ in offers)})),
        lineage=Lineage(
            rounds=rounds, parts=parts, versions=versions(), protocol=PROTOCOL, site_schema=SITE_SCHEMA,
            figures=dict(figures), guards=guards, budget=dict(budget or {}), digest=trunk.digest(),
            created=now().isoformat(timespec="seconds"),
        ),
    )  # fmt: skip
    write_release(out / file, trunk, card, sign)
    return out / file
