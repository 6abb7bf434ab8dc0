"""open_site: the one place that knows whether a site is a plant's folder or one of many simulated ones."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from trunkline.client.availability import Pauses, free_memory
from trunkline.client.data import SiteData, open_data
from trunkline.client.state.permissions import open_seal
from trunkline.client.state.vault import check_whose
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import between_steps
from trunkline.config.site import SiteConfig, read_site
from trunkline.errors import Away, ConfigError
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import AgreedRequest, RoundRequest
from trunkline.protocol.plan import Conditions
from trunkline.security.encryption import Seal

CURVE_SAMPLES = 2000  # validation windows a round's curve is drawn from; the final choice uses all of them

RowSubset = Literal["train", "curve", "validation", "all", "test"]

logger = logging.getLogger(__name__)


@dataclass
class Site:
    """One plant: its data in memory, its tasks, where its state lies, and what seals it (a simulated site: nothing)."""

    folder: Path
    state: Path
    data: SiteData
    seal: Seal | None = None
    plant: bool = False  # a real one, where somebody can be asked; simulated sites are the researcher's own
    pauses: Pauses | None = None  # of a real one
    _resident: dict[str, DeviceDataset] = field(default_factory=dict)
    _conditions: tuple[Conditions, int] = (Conditions(), 0)  # and the seed of the run that has them
    _now: dict[str, DeviceDataset] = field(default_factory=dict)  # rows under these conditions

    @property
    def config(self) -> SiteConfig:
        return self.data.config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def contracts(self) -> Path | None:
        """The state folder that keeps what was agreed to; None of a simulated site, which has nobody to ask."""
        return self.state if self.plant else None

    def tell(self, text: str) -> None:
        logger.warning("%s: %s", self.name, text)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it training waits between two steps while the plant is outside its hours or paused."""
        token = between_steps.set(self.pauses.wait_if_paused if self.pauses is not None else None)
        try:
            yield
        finally:
            between_steps.reset(token)

    def admit(self) -> None:
        """Before anything is trained or scored for an order.

        Raises:
            Away: the plant is outside its hours, or paused.
        """
        if self.pauses is None:
            return
        try:
            self.pauses.admit()
        except Away:
            self.forget()  # whoever wants the machine now wants its memory too
            free_memory()
            raise

    def rows(self, request: AgreedRequest) -> RowSubset:
        """What `order` trains on: in the second pass of a run that refits, the validation rows too."""
        return "all" if request.passed else "train"

    def apply_conditions(self, request: AgreedRequest) -> None:
        """From now on `resident` gives rows under the conditions of the request; only a simulation has any."""
        now = request.conditions, request.seed if request.conditions != Conditions() else 0
        if now != self._conditions:
            self._conditions = now
            self._now.clear()

    def resident(self, part: RowSubset) -> DeviceDataset:
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
            self._resident[part] = DeviceDataset.of(windows, device())
        if self._conditions[0] == Conditions():
            return self._resident[part]
        if part not in self._now:
            self._now[part] = self._under_conditions(self._resident[part], part)
        return self._now[part]

    def _under_conditions(self, rows: DeviceDataset, part: RowSubset) -> DeviceDataset:
        """Rows of `part` as the conditions have them. The order of groups, and of rows in them, is that in which labels come."""
        conditions, seed = self._conditions
        if part in ("train", "all") and conditions.labelled < 1.0 and len(rows):
            rows = rows.begun(max(1, math.ceil(conditions.labelled * len(rows))))
        if conditions.drift:
            way = np.random.default_rng(seed_of(seed, self.name, "drift")).normal(size=rows.values.shape[1])
            way *= conditions.drift / max(float(np.sqrt(np.square(way).mean())), 1e-12)
            rows = rows.moved(torch.from_numpy(way).to(rows.values))
        return rows

    def forget(self) -> None:
        """Let go of what lies on the device; asked for again, it is made again."""
        self._resident.clear()
        self._now.clear()

    def model(self, request: RoundRequest) -> TrunkModel:
        """A fresh model of the run's trunk and this site's stem and heads, as at the start of the run."""
        data = self.data
        model = build_model(
            request.trunk,
            window=self.config.data.window,
            channels=len(data.channels),
            categories=data.categories,
            tasks=data.tasks,
            seed=request.seed,
            lend=request.lend,
        )
        return model.to(device())

    @cached_property
    def signature(self) -> tuple[tuple[str, int, int], ...]:
        return _signature(self.folder)


_open: dict[tuple[Path, Path], Site] = {}


def open_site(node_config: Mapping[str, object], *, fresh: bool = False) -> Site:
    """The Site a node stands for; read once a process and kept.

    Args:
        node_config: of the plant's own SuperNode: `site` is its folder, `state` its state folder, `plant` says that it is a
            real one; in a simulation `partition-id` counts the folders below TRUNKLINE_SITES. A server can set none of them.
        fresh: read the folder again if its files have changed (asked at the start of a run, never within one).

    Raises:
        ConfigError, DataError: the folder cannot be read as a site.
        TrustError: the state is sealed and its key is missing or another, or other accounts may reach one of the two.
        ForeignState: the state is another site's.
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
        seal = open_seal(state, lambda text: logger.warning("%s: %s", folder.name, text))
        plant = bool(node_config.get("plant"))
        if (state / "vault").is_dir():
            check_whose(state, read_site(folder).name, seal)  # before anything, a split say, is read or written there
        known = _open[folder, state] = Site(folder, state, open_data(folder, state, seal), seal, plant)
        known.pauses = Pauses(known.config, folder, state) if plant else None
        _ = known.signature
        for note in known.data.notes:
            if note.level == "warning" and note.where.startswith("task "):  # a task set aside should not go unnoticed
                known.tell(f"{note.where} {note.what}")
    return known


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of every file beside site.toml, so that new data is noticed at the next run."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".trunkline" not in path.parts)
    return tuple((str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
