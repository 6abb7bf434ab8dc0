"""`trunkline client prove-egress`: a site's copy with canaries in data, stem and heads, in a real run that is recorded.

A real server and the plant's real daemon run on this machine with a recording proxy between them. Afterwards the recorded
bytes are searched for every private value. The control shows that the search works: it must find the lent trunk's changes,
which may leave.
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
from trunkline.egress_audit.byte_search import NumberRuns, RecordedBytes
from trunkline.egress_audit.canaries import (
    Canaries,
    always_open,
    entries_of,
    insert_in_data,
    insert_in_vault,
    open_copy,
    set_policy,
)
from trunkline.egress_audit.local_federation import APP, READY_S, RUN_S, client_process, run_to_end, server_process
from trunkline.egress_audit.private_values import (
    canary_values,
    canary_weights,
    private_tensors,
    search,
    site_names,
    values_in_data,
)
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
    emit: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evidence of what leaves the site in `site_dir` in a run; the site itself is not changed.

    Args:
        run_toml: a run file that gives model, strategy, lend and guards; None: a small run that the site's policy allows.
        app: module:attribute of the ClientApp of the plant.
        emit: called with a sentence at every stage.

    Raises:
        ConfigError, DataError: the site cannot be read or the run lends nothing.
        DeploymentError: the run was not completed.
    """
    start = time.monotonic()
    site = read_site(site_dir)
    run = _small_run(site, run_toml)
    with tempfile.TemporaryDirectory(prefix="trunkline-prove-") as temporary:
        root = Path(temporary)
        folder, state = root / f"zq{secrets.token_hex(4)}" / site.name, root / "state"
        shutil.copytree(site_dir, folder, ignore=shutil.ignore_patterns(".trunkline"))
        _allow_run(folder, site.policy)
        emit("inserting canaries in a copy of the data")
        canaries = insert_in_data(folder, root / "scratch")
        weights: dict[str, NDArray[Any]] = {}
        with (
            server_process(root) as port,
            Recorder(port) as recorder,
            client_process(folder, state, recorder.port, app) as child,
        ):
            watch = SocketWatch(child.pid)
            inserting = threading.Thread(target=_insert_weights, args=(state, recorder, weights, run.name), daemon=True)
            with watch:
                inserting.start()
                emit(f"a real server and the plant's daemon train {run.rounds} rounds, recorded")
                run_to_end(root, run)
            inserting.join(1.0)
        emit("searching the recorded bytes")
        return {
            **_evidence(folder, state, canaries, weights, recorder, run),
            "sockets": _sockets(watch, recorder.port),
            "seconds": round(time.monotonic() - start, 1),
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
        raise ConfigError(f"strategy {run.strategy.name!r} sends no update, so there is nothing to prove.")
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


def _allow_run(folder: Path, policy: PolicyConfig) -> None:
    """Let the copy take part without a decision of a person, at any hour: the plant itself starts this run."""
    always_open(folder)
    if policy.decide == "accept":
        return
    set_policy(folder, policy.model_copy(update={"decide": "accept"}))


def _insert_weights(state: Path, recorder: Recorder, weights: dict[str, NDArray[Any]], name: str) -> None:
    """Insert canaries as soon as round 1 is in the vault and before its reply leaves, so that round 2 trains from them."""
    end = time.monotonic() + RUN_S
    while time.monotonic() < end:
        for path in (state / "vault").glob(f"{name}-*/round-000001.safetensors"):
            with recorder.held():
                weights |= insert_in_vault(state, path.parent.name, 1)
            return
        time.sleep(0.002)


def _evidence(
    folder: Path, state: Path, canaries: Canaries, weights: dict[str, NDArray[Any]], recorder: Recorder, run: RunConfig
) -> dict[str, Any]:
    contract = next(contracts.every(state), None)
    if contract is None:
        raise DeploymentError("the server never asked the plant: no contract lies in the plant's state.")
    entries = entries_of(state, contract.run)
    trained_from = _trained_from(weights, entries.get(2))
    site = open_copy(folder, state.parent / "scratch")
    recorded = RecordedBytes(recorder.up)
    values = canary_values(canaries)
    if weights:
        values.append(canary_weights(weights))
    values += [site_names(folder, site, contract.model_dump_json()), *private_tensors(entries, contract.request)]
    values += values_in_data(folder, site, bool(contract.once))
    results = search(values, recorded)
    lent = NumberRuns()
    for entry in entries.values():
        for array in entry.delta.values():
            lent.add(np.asarray(array), ("<f4",))  # the one form they are sent in
    control_hits, control_runs = recorded.count(lent)
    lines, signer = read_manifest(state)
    return {
        "site": site.config.name,
        "run": contract.run,
        "contract": {
            "lends": list(contract.request.lend),
            "metrics": list(contract.metrics),
            "arrays": len(contract.arrays),
        },
        "canaries_trained_from": trained_from,
        "bytes_up": sum(map(len, recorder.up)),
        "bytes_down": sum(map(len, recorder.down)),
        "connections": len(recorder.up),
        "messages": len(lines),
        "unpacked": recorded.unpacked,
        "searched": [result.to_json() for result in results],
        "control": {"what": "the lent arrays' changes", "found": control_hits, "of": control_runs},
        "manifest": {"lines": len(lines), "signed_by": signer, "bytes": sum(link.body["bytes"] for link in lines)},
        "found": sum(result.hits for result in results),
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


def _sockets(watch: SocketWatch, server_port: int) -> dict[str, Any]:
    strangers = watch.strangers(server_port)
    return {
        "watched": watch.possible and watch.samples > 0,
        "samples": watch.samples,
        "centre_seen": any(peer[2] == server_port for peer in watch.seen),
        "strangers": [f"{protocol} {address}:{port}" for protocol, address, port in strangers],
    }


def verdict(evidence: dict[str, Any]) -> list[str]:
    """The findings against the site, a sentence each; empty: there is none."""
    against = [
        f"{row['what']} ({row['where']}): {row['found']} of {row['searched']} found in what left, {', '.join(sorted(set(row['places']))) or 'as they are'}."
        for row in evidence["searched"]
        if row["found"]
    ]
    if evidence["sockets"]["strangers"]:
        against.append(f"The plant connected to others than the server: {', '.join(evidence['sockets']['strangers'])}.")
    control = evidence["control"]
    if not control["of"] or control["found"] < 0.9 * control["of"]:
        against.append(
            "The lent arrays themselves were not found, so nothing is proved: the search or the recording fails."
        )
    if (
        evidence["contract"]["arrays"]
        and not evidence["canaries_trained_from"]
        and any(row["what"] == "canary: weights" for row in evidence["searched"])
    ):
        against.append("Round 2 did not train from the canaries in stem and heads, so they prove nothing.")
    return against


def print_evidence(evidence: dict[str, Any], console: "Console") -> None:
    """Print the evidence as a page for a person."""
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
    for row in evidence["searched"]:
        table.add_row(
            Text(row["what"]),
            Text(row["where"]),
            f"{row['searched']:,}",
            "nothing" if not row["found"] else f"FOUND {row['found']:,}",
        )
    control = evidence["control"]
    table.add_row(
        Text(f"control: {control['what']}"),
        "vault; may leave",
        f"{control['of']:,}",
        f"{control['found']:,}, as it must be",
    )
    console.print(table)
    left_out = sum(row["left_out"] for row in evidence["searched"])
    console.print(
        f"The search looks for numbers as runs of 16 bytes. It leaves out {left_out:,} runs of zeros, small whole numbers and repeated "
        "values, which could occur anywhere."
    )
    sockets = evidence["sockets"]
    size = contracts.in_bytes(evidence["bytes_up"])
    console.print(
        f"{size} left in {evidence['messages']} replies over {evidence['connections']} connections. They were searched as they are, and "
        f"{evidence['unpacked']} pieces were unpacked from them and searched too."
    )
    if sockets["watched"]:
        peers = ", ".join(sockets["strangers"]) or "nobody but the server"
        console.print(
            f"The plant's processes connected to {peers} (their sockets were sampled {sockets['samples']} times)."
        )
    else:
        console.print(
            "The connections of the plant's processes were not watched: this system does not list sockets by process."
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
