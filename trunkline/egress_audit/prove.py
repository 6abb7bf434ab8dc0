"""`trunkline client prove-egress`: a site's copy with canaries in data, stem and heads, in a real run that is recorded.

A real centre and the plant's real daemon run on this machine with a recording proxy between them. Afterwards the recorded
bytes are searched for everything private. That the search can find anything at all is shown by what may leave: the lent
trunk's changes must be found.
"""

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trunkline.client.policy import contracts
from trunkline.client.policy.manifest import read_manifest
from trunkline.client.state.vault import Entry
from trunkline.config.run import CohortConfig, RunConfig, parse_run, read_run
from trunkline.config.site import PolicyConfig, SiteConfig, read_site
from trunkline.egress_audit.byte_search import Haystack, Runs
from trunkline.egress_audit.canaries import (
    Planted,
    always_open,
    entries_of,
    open_copy,
    plant_in_data,
    plant_in_vault,
    set_policy,
)
from trunkline.egress_audit.local_federation import APP, READY_S, RUN_S, centre, plant, run_through
from trunkline.egress_audit.private_values import canaries_of, data_of, look_for, names_of, private_tensors, weights_of
from trunkline.egress_audit.recorder import Recorder
from trunkline.egress_audit.sockets import SocketWatch
from trunkline.errors import ConfigError, DeploymentError
from trunkline.privacy.guards import settings_that_meet

if TYPE_CHECKING:
    from rich.console import Console


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
                run_through(root, run)
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
        table: dict[str, Any] = {
            "guards": settings_that_meet(policy),
            "trunk": {"backbone": "tcn" if site.data.window else "mlp"},
        }
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
                "guards": run.guards, "cohort": cohort, "report": run.report}
    )  # fmt: skip


def _let_it_run(folder: Path, policy: PolicyConfig) -> None:
    """The copy's policy is the plant's own, but nobody is asked: it is the plant that runs this, and now."""
    always_open(folder)
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
    needles += [names_of(folder, site, agreed), *private_tensors(entries, found.request)]
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
        "contract": {"lends": list(found.request.lend), "metrics": list(found.metrics), "arrays": len(found.arrays)},
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
