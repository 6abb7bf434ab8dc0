"""`trunkline client prove-egress`: a site's copy with canaries in data, stem and heads, in a real run that is recorded.

A real centre and the plant's real daemon run on this machine with a recording proxy between them. Afterwards the recorded
bytes are searched for everything private. That the search can find anything at all is shown by what may leave: the lent
trunk's changes must be found.
"""

import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trunkline.client import contracts
from trunkline.client.data import SiteData
from trunkline.client.data.formats import load
from trunkline.client.data.read import NUMBERS, roles_of
from trunkline.client.manifest import read_manifest
from trunkline.client.vault import Entry
from trunkline.config import POLICY, CohortConfig, PolicyConfig, RunConfig, SiteConfig, parse_run, read_run, read_site
from trunkline.errors import ConfigError, DeploymentError
from trunkline.exchange import Arrays, GuardSettings, Order
from trunkline.flower import run_status
from trunkline.models.trunk import first_trunk
from trunkline.server import daemon as centre_daemon
from trunkline.simulations.canary import (
    Planted,
    entries_of,
    open_copy,
    patterns,
    plant_in_data,
    plant_in_vault,
    set_policy,
)
from trunkline.simulations.haystack import Haystack, Runs
from trunkline.simulations.recorder import Recorder
from trunkline.simulations.sockets import SocketWatch
from trunkline.supervise import accepts

if TYPE_CHECKING:
    from rich.console import Console

READY_S, RUN_S, END_S = 60.0, 240.0, 20.0  # how long parts may take to be ready, to run, and to end
MOST_VALUES = 1_000_000  # of a site's rows that are searched for, from the first on
SHORTEST = 5  # letters of a name that could not stand there by chance
APP = "trunkline.client.app:app"


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


# ---- real processes


@contextlib.contextmanager
def process(code: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A child process of this Python, ended by SIGTERM, or killed if that takes too long."""
    with log.open("ab") as file:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(END_S)


@contextlib.contextmanager
def centre(root: Path) -> Iterator[int]:
    """The centre's daemon, its state in `root`/server; the port it listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    code = f"from pathlib import Path; from trunkline.server import daemon; daemon.start(Path({str(root / 'server')!r}), port={port})"
    with process(code, root / "server.log") as child:
        _until(READY_S, "the centre", root / "server.log", lambda: accepts(f"127.0.0.1:{port}"), child)
        yield port


def plant(
    folder: Path, state: Path, port: int, app: str = APP
) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    """A plant's daemon that asks 127.0.0.1:`port` for work."""
    code = (
        "from pathlib import Path; from trunkline.client import daemon; "
        f"daemon.start(Path({str(folder)!r}), server='127.0.0.1:{port}', state=Path({str(state)!r}), client_app={app!r})"
    )
    return process(code, state.parent / f"{state.name}.log")


def run_through(root: Path, port: int, run: RunConfig) -> Path:
    """Submit `run` to the centre of `root` and wait for its end; its folder.

    Raises:
        DeploymentError: it ended otherwise, or not in time.
    """
    out = root / "out"
    number = centre_daemon.run(root / "server", run.model_dump_json(), out)
    end = time.monotonic() + RUN_S
    while not (last := run_status(f"127.0.0.1:{port}", number))[0].startswith("finished"):
        if time.monotonic() > end:
            raise DeploymentError(f"the run did not end within {RUN_S:.0f} s: {last[0]}. {_tail(root / 'server.log')}")
        time.sleep(0.2)
    if last[0] != "finished:completed":
        raise DeploymentError(f"the run ended as {last[0]}: {centre_daemon.last_error(out) or last[1]}")
    return out


def _until(
    seconds: float, what: str, log: Path, done: Callable[[], bool], child: "subprocess.Popen[bytes] | None" = None
) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end or (child is not None and child.poll() is not None):
            raise DeploymentError(f"{what} is not ready. {_tail(log)}")
        time.sleep(0.05)


def _tail(log: Path) -> str:
    return f"{log.name}: {log.read_text(errors='replace')[-800:]}" if log.exists() else ""


# ---- what must not be found


def private_tensors(entries: dict[int, Entry], order: Order) -> list[Needle]:
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


# ---- the proof


def prove(
    site_dir: Path,
    run_toml: Path | None = None,
    app: str = APP,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evidence of what leaves the site in `site_dir` in a run; nothing is changed there.

    Args:
        run_toml: whose model, strategy, lend and guards are taken; by default a small run that its policy allows.
        app: module:attribute of the ClientApp of the plant.
        tell: called with a sentence at every stage.

    Raises:
        ConfigError, DataError: the site cannot be read or the run lends nothing.
        DeploymentError: the run did not come to its end.
    """
    began = time.monotonic()
    site = read_site(site_dir)
    run = _small_run(site, run_toml)
    with tempfile.TemporaryDirectory(prefix="trunkline-prove-") as temporary:
        root = Path(temporary)
        folder, state = root / f"zq{secrets.token_hex(4)}" / site.name, root / "state"
        shutil.copytree(site_dir, folder, ignore=shutil.ignore_patterns(".trunkline"))
        _let_it_run(folder, site.policy)
        tell("planting canaries in a copy of the data")
        planted = plant_in_data(folder, root / "scratch")
        weights: dict[str, NDArray[Any]] = {}
        with centre(root) as port, Recorder(port) as recorder, plant(folder, state, recorder.port, app) as child:
            watch = SocketWatch(child.pid)
            planting = threading.Thread(target=_plant_weights, args=(state, recorder, weights, run.name), daemon=True)
            with watch:
                planting.start()
                tell(f"a real centre and the plant's daemon train {run.rounds} rounds, recorded")
                run_through(root, port, run)
            planting.join(1.0)
        tell("searching what was recorded")
        return {
            **_evidence(folder, state, planted, weights, recorder, run),
            "sockets": _sockets(watch, recorder.port),
            "seconds": round(time.monotonic() - began, 1),
        }


def _small_run(site: SiteConfig, run_toml: Path | None) -> RunConfig:
    """Two short rounds of one site."""
    policy = site.policy
    if run_toml is not None:
        run = read_run(run_toml)
    else:
        guards = {"clip_norm": policy.max_clip_norm or 10.0} if "clip" in policy.guards else {}
        table: dict[str, Any] = {"guards": guards, "trunk": {"backbone": "tcn" if site.data.window else "mlp"}}
        if policy.strategies:
            table["strategy"] = {"name": policy.strategies[0]}
        if policy.operators:
            table["operator"] = policy.operators[0]
        run = parse_run(table, "prove-egress")
    if not run.lend or run.strategy.name in ("local", "central"):
        raise ConfigError(f"strategy {run.strategy.name!r} sends no update, so there is nothing to look at.")
    training = run.training.model_copy(
        update={
            "steps": min(run.training.steps, 20),
            "epochs": None,
            "finetune_steps": 0,
            "finish_steps": min(run.training.finish_steps, 20),
        }
    )
    cohort = CohortConfig(min_sites=1, quorum=1.0, deadline_s=RUN_S / 2, gather_s=READY_S, resend_s=RUN_S / 4)
    fresh = RunConfig(name="prove-egress", rounds=2, seed=run.seed, operator=run.operator)
    return fresh.model_copy(
        update={"lend": run.lend, "trunk": run.trunk, "training": training, "strategy": run.strategy,
                "guards": GuardSettings(**run.guards.model_dump()), "cohort": cohort, "report": run.report}
    )  # fmt: skip


def _let_it_run(folder: Path, policy: PolicyConfig) -> None:
    """The copy's policy is the plant's own, but nobody is asked: it is the plant that runs this."""
    if policy.decide == "accept":
        return
    set_policy(folder, policy.model_copy(update={"decide": "accept"}))


def _plant_weights(state: Path, recorder: Recorder, weights: dict[str, NDArray[Any]], name: str) -> None:
    """As soon as round 1 is in the vault, and before its answer has left, have round 2 train from canaries."""
    end = time.monotonic() + RUN_S
    while time.monotonic() < end:
        for path in (state / "vault").glob(f"{name}-*/round-000001.safetensors"):
            with recorder.held():
                weights |= plant_in_vault(state, path.parent.name, 1)
            return
        time.sleep(0.002)


def _evidence(
    folder: Path, state: Path, planted: Planted, weights: dict[str, NDArray[Any]], recorder: Recorder, run: RunConfig
) -> dict[str, Any]:
    found = next(contracts.every(state), None)
    if found is None:
        raise DeploymentError("the plant was never asked: no contract lies in its state.")
    entries = entries_of(state, found.run)
    trained_from = _trained_from(weights, entries.get(2))
    site = open_copy(folder, state.parent / "scratch")
    agreed = found.model_dump_json()
    haystack = Haystack(recorder.up)
    needles = canaries_of(planted)
    if weights:
        needles.append(weights_of(weights))
    needles += [names_of(folder, site, agreed), *private_tensors(entries, found.order)]
    needles += data_of(folder, site, bool(found.once))
    results = look_for(needles, haystack)
    lent = Runs()
    for entry in entries.values():
        for array in entry.delta.values():
            lent.add(np.asarray(array), ("<f4",))  # the one form they are sent in
    seen, among = haystack.share_of(lent)
    lines, signer = read_manifest(state)
    return {
        "site": site.config.name,
        "run": found.run,
        "contract": {"lends": list(found.order.lend), "metrics": list(found.metrics), "arrays": len(found.arrays)},
        "canaries_trained_from": trained_from,
        "bytes_up": sum(map(len, recorder.up)),
        "bytes_down": sum(map(len, recorder.down)),
        "connections": len(recorder.up),
        "messages": len(lines),
        "unpacked": haystack.unpacked,
        "searched": [vars(one) for one in results],
        "control": {"what": "the lent arrays' changes", "found": seen, "of": among},
        "manifest": {"lines": len(lines), "signed_by": signer, "bytes": sum(link.body["bytes"] for link in lines)},
        "found": sum(one.found for one in results),
    }


def _trained_from(weights: dict[str, NDArray[Any]], after: Entry | None) -> bool:
    """Whether round 2 began with the canaries: training moves a weight by hundredths, and they are 3 away from any other."""
    if not weights or after is None:
        return False
    moved = [
        np.abs(np.asarray(after.private[name]).reshape(-1)[:4] - array.reshape(-1)[:4])
        for name, array in weights.items()
    ]
    return bool(np.concatenate(moved).max() < 1.0)


def _sockets(watch: SocketWatch, centre_port: int) -> dict[str, Any]:
    strangers = watch.strangers(centre_port)
    return {
        "watched": watch.possible and watch.samples > 0,
        "samples": watch.samples,
        "centre_seen": any(peer[2] == centre_port for peer in watch.seen),
        "strangers": [f"{protocol} {address}:{port}" for protocol, address, port in strangers],
    }


def verdict(evidence: dict[str, Any]) -> list[str]:
    """What speaks against the site, a sentence each; empty: nothing does."""
    against = [
        f"{one['what']} ({one['where']}): {one['found']} of {one['searched']} found in what left, {', '.join(sorted(set(one['places']))) or 'as they are'}."
        for one in evidence["searched"]
        if one["found"]
    ]
    if evidence["sockets"]["strangers"]:
        against.append(f"The plant talked to others than the centre: {', '.join(evidence['sockets']['strangers'])}.")
    control = evidence["control"]
    if not control["of"] or control["found"] < 0.9 * control["of"]:
        against.append(
            "The lent arrays themselves were not found, so nothing is shown: the search or the recording fails."
        )
    if (
        evidence["contract"]["arrays"]
        and not evidence["canaries_trained_from"]
        and any(one["what"] == "canary: weights" for one in evidence["searched"])
    ):
        against.append("The canaries in stem and heads were not what round 2 trained from, so they show nothing.")
    return against


def print_evidence(evidence: dict[str, Any], console: "Console") -> None:
    """A page for a person."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "looked for",
        "where it is",
        "patterns",
        "found",
        title=f"{evidence['site']}: what left in a run",
        title_justify="left",
    )
    for one in evidence["searched"]:
        table.add_row(
            Text(one["what"]),
            Text(one["where"]),
            f"{one['searched']:,}",
            "nothing" if not one["found"] else f"FOUND {one['found']:,}",
        )
    control = evidence["control"]
    table.add_row(
        Text(f"control: {control['what']}"),
        "vault; may leave",
        f"{control['of']:,}",
        f"{control['found']:,}, as it must be",
    )
    console.print(table)
    left_out = sum(one["left_out"] for one in evidence["searched"])
    console.print(
        f"Numbers are looked for as runs of 16 bytes; {left_out:,} runs of zeros, small whole numbers and repeated values could stand "
        "anywhere and were left out."
    )
    sockets = evidence["sockets"]
    size = contracts.in_bytes(evidence["bytes_up"])
    console.print(
        f"{size} left in {evidence['messages']} replies over {evidence['connections']} connections; searched as they are, and "
        f"{evidence['unpacked']} pieces unpacked from them."
    )
    if sockets["watched"]:
        who = ", ".join(sockets["strangers"]) or "nobody but the centre"
        console.print(f"The plant's processes talked to {who} (their sockets, looked at {sockets['samples']} times).")
    else:
        console.print(
            "Whom the plant's processes talked to was not watched: this system does not list sockets by process."
        )
    against = verdict(evidence)
    for sentence in against:
        console.print(Text(sentence, style="bold red"))
    if not against:
        console.print(
            Text(
                f"Nothing private left {evidence['site']} in {evidence['seconds']} s of a real run.", style="bold green"
            )
        )
