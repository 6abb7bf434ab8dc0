"""open_site: the one place that knows whether a site is a plant's folder or one of many simulated ones."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from trunkline.client.data import SiteData, open_data
from trunkline.client.training import Resident, device
from trunkline.config import SiteConfig
from trunkline.errors import ConfigError, ContractError
from trunkline.exchange import Order
from trunkline.models.trunk import TrunkModel, build_model

CURVE_SAMPLES = 2000  # validation windows a round's curve is drawn from; the final choice uses all of them

Part = Literal["train", "curve", "validation", "all", "test"]

logger = logging.getLogger(__name__)


@dataclass
class Site:
    """One plant: its data in memory, its tasks, and where its state lies."""

    folder: Path
    state: Path
    data: SiteData
    _resident: dict[str, Resident] = field(default_factory=dict)

    @property
    def config(self) -> SiteConfig:
        return self.data.config

    @property
    def name(self) -> str:
        return self.config.name

    def tell(self, text: str) -> None:
        logger.warning("%s: %s", self.name, text)

    def rows(self, order: Order) -> Part:
        """What `order` trains on: in the second pass of a run that refits, the validation rows too."""
        return "all" if order.passed else "train"

    def resident(self, part: Part) -> Resident:
        """`train`, `validation`, `test`, `all` (the first two), or `curve` (a spread of the validation windows), on the device."""
        if part not in self._resident:
            if part == "train":  # a batch of unlabelled windows would be a step that learns nothing
                windows = self.data.train.labelled()
            elif part == "all":
                windows = self.data.train.joined(self.data.validation).labelled()
            elif part == "curve":
                windows = self.data.validation.spread(CURVE_SAMPLES)
            else:
                windows = self.data.validation if part == "validation" else self.data.test
            self._resident[part] = Resident.of(windows, device())
        return self._resident[part]

    def forget(self) -> None:
        """Let go of what lies on the device; asked for again, it is made again."""
        self._resident.clear()

    def model(self, order: Order) -> TrunkModel:
        """A fresh model of the run's trunk and this site's stem and heads, as at the start of the run."""
        data = self.data
        model = build_model(
            order.trunk,
            window=self.config.data.window,
            channels=len(data.channels),
            categories=data.categories,
            tasks=data.tasks,
            seed=order.seed,
            lend=order.lend,
        )
        return model.to(device())

    def consent(self, lend: tuple[str, ...]) -> None:
        """Raises ContractError when the run asks for more than the site's own policy lends.

        "scaler" is not asked for here: a site that does not lend its statistics takes part without them.
        """
        allowed = self.config.policy.lend
        for part in lend:
            if part == "scaler":
                continue
            if part not in allowed and not (part.startswith("head.") and "heads" in allowed):
                raise ContractError(
                    f"the run wants {part!r} lent; the policy of {self.name} in site.toml lends {', '.join(allowed) or 'nothing'}"
                )

    @cached_property
    def signature(self) -> tuple[tuple[str, int, int], ...]:
        return _signature(self.folder)


_open: dict[tuple[Path, Path], Site] = {}


def open_site(node_config: Mapping[str, object], *, fresh: bool = False) -> Site:
    """The Site a node stands for; read once a process and kept.

    Args:
        node_config: of the plant's own SuperNode: `site` is its folder, `state` its state folder; in a simulation
            `partition-id` counts the folders below TRUNKLINE_SITES. A server can set neither.
        fresh: read the folder again if its files have changed (asked at the start of a run, never within one).
    """
    if "site" in node_config:
        folder = Path(str(node_config["site"]))
    elif "partition-id" in node_config and (root := os.environ.get("TRUNKLINE_SITES")):
        folders = sorted(path.parent for path in Path(root).glob("*/site.toml"))
        place = int(str(node_config["partition-id"]))
        if place >= len(folders):
            raise ConfigError(
                f"TRUNKLINE_SITES={root} holds {len(folders)} site folders; node {place} has none. Simulate {len(folders)} nodes."
            )
        folder = folders[place]
    else:
        raise ConfigError(
            "This node has no site: start it with --node-config 'site=\"/data/press-07\"', or set TRUNKLINE_SITES to a folder of "
            "site folders (see `trunkline sites`) before a Flower simulation."
        )
    state = Path(str(node_config.get("state", folder / ".trunkline")))
    known = _open.get((folder, state))
    if known is None or (fresh and known.signature != _signature(folder)):
        known = _open[folder, state] = Site(folder, state, open_data(folder, state))
        _ = known.signature
        for note in known.data.notes:
            if note.level == "warning" and note.where.startswith("task "):  # a task set aside should not go unnoticed
                known.tell(f"{note.where} {note.what}")
    return known


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of every file beside site.toml, so that new data is noticed at the next run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".trunkline" not in path.parts)
    return tuple((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
