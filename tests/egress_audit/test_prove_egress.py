"""That nothing private leaves a plant is shown on recorded bytes of real processes, by a search that finds what is there."""

import base64
import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trunkline.client.policy import contracts
from trunkline.client.policy.manifest import read_manifest
from trunkline.config.run import parse_run
from trunkline.config.site import read_site
from trunkline.egress_audit import local_federation, private_values, prove
from trunkline.egress_audit.byte_search import NumberRuns, RecordedBytes
from trunkline.egress_audit.canaries import (
    canary_value,
    entries_of,
    insert_in_data,
    insert_in_vault,
    open_copy,
    patterns,
)
from trunkline.egress_audit.recorder import Recorder
from trunkline.egress_audit.sockets import SocketWatch
from trunkline.server.reporting.report import read_report

TESTS = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets by process are listed by Linux only")


# ---- the search


def noise(rng: np.random.Generator, size: int) -> bytes:
    return bytes(rng.integers(0, 256, size, dtype=np.uint8))


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/long/name.bin", data)
    return buffer.getvalue()


WAYS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    "base64": base64.b64encode,
    "base64 for addresses": base64.urlsafe_b64encode,
    "hexadecimal": lambda data: data.hex().encode(),
    "zlib": zlib.compress,
    "gzip": gzip.compress,
    "zip": zipped,
    "base64 of zlib": lambda data: base64.b64encode(zlib.compress(data)),
}


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_found_however_they_are_written(way: str, dtype: str) -> None:
    rng = np.random.default_rng(len(way))
    for shift in range(5):  # wherever they begin
        secret = rng.normal(size=37).astype(np.float32)
        data = (
            noise(rng, 1000 + shift)
            + b"{"
            + b"A" * shift
            + WAYS[way](secret.astype(dtype).tobytes())
            + b"}"
            + noise(rng, 500)
        )
        found, among = RecordedBytes([noise(rng, 3000), data]).count(NumberRuns().add(secret))
        assert found == (34 if dtype[1:] == "f4" else 36), "every run of 16 bytes in this one form"
        assert among > found
        assert RecordedBytes([noise(rng, 5000)]).count(NumberRuns().add(secret))[0] == 0


def test_a_piece_of_four_numbers_is_enough() -> None:
    rng = np.random.default_rng(0)
    secret = rng.normal(size=1000).astype(np.float32)
    data = noise(rng, 333) + secret[500:504].tobytes() + noise(rng, 333)
    assert RecordedBytes([data]).count(NumberRuns().add(secret))[0] == 1


def test_what_anybody_could_write_is_no_evidence_and_is_counted() -> None:
    common = np.concatenate([np.zeros(50), np.ones(50), np.full(50, 0.25), np.tile([3.0, 7.0], 30)])
    runs = NumberRuns().add(common)
    rng = np.random.default_rng(0)
    same = np.full(100, 0.25, np.float32).tobytes() + noise(rng, 50) + np.tile(np.float32([3.0, 7.0]), 30).tobytes()
    data = b"".join(
        (np.zeros(500).tobytes(), np.ones(500, np.float32).tobytes(), noise(rng, 50), same, noise(rng, 1000))
    )
    assert RecordedBytes([data]).count(runs)[0] == 0
    assert runs.left_out > 4 * 150


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "<i4", "u1"])
def test_labels_of_classes_are_found_by_their_order(dtype: str) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 400)
    runs = NumberRuns().add_classes(labels)
    data = noise(rng, 701) + labels[100:140].astype(dtype).tobytes() + noise(rng, 99)
    assert RecordedBytes([data]).count(runs)[0] == 40 - 31
    assert RecordedBytes([np.zeros(4000).tobytes(), noise(rng, 4000)]).count(runs)[0] == 0


@pytest.mark.parametrize("like", [0.0, 3.4, 71.0, -410.0, 1e9])
def test_a_canary_value_is_found_as_a_double_and_as_text(like: float) -> None:
    value = canary_value(like, 7)
    assert abs(value - like) <= 1e-5 * abs(like) + 1.1
    for written in (
        np.float64(value).tobytes(),
        np.float64(value).tobytes()[::-1],
        json.dumps({"loss": value}).encode(),
    ):
        assert any(RecordedBytes([b"\x17" + written]).views_with(pattern) for pattern in patterns(value)), written


# ---- its parts


@pytest.mark.parametrize("place", range(4), ids=["parquet", "npz", "csv", "hdf5"])
def test_canaries_are_in_rows_that_are_trained_on_whatever_the_format(
    plants: list[Path], tmp_path: Path, place: int
) -> None:
    folder = Path(shutil.copytree(plants[place], tmp_path / plants[place].name))
    before = open_copy(folder, tmp_path / "scratch")
    planted = insert_in_data(folder, tmp_path / "scratch")
    config, data = read_site(folder), open_copy(folder, tmp_path / "scratch")
    new, old = planted.column
    assert new in config.data.channels and old not in config.data.channels
    assert len(config.data.channels) == len(before.config.data.channels)
    assert planted.group in {data.train.group_names[one] for one in np.unique(data.train.groups)}
    assert planted.group not in before.train.group_names
    numeric = next(name for name, task in config.tasks.items() if task.kind == "regression")
    assert set(np.float32(planted.labels)) & set(data.train.labels[numeric].ravel()), "a label is trained on"
    raw, mean, std = np.array(planted.values[:4]), data.scaler.mean, data.scaler.std
    assert len(planted.values) == 16
    scaled = [((raw - mean[regime, 0]) / std[regime, 0]).astype(np.float32) for regime in range(len(mean))]
    assert any(
        np.isin(one, data.train.values[:, 0]).any() or np.abs(data.train.values[:, 0][:, None] - one).min() < 1e-5
        for one in scaled
    )


def test_the_group_with_a_canarys_name_is_always_one_that_is_trained_on(plants: list[Path], tmp_path: Path) -> None:
    """Which part a group is dealt to may depend on its name, so names are tried until one fits."""
    for attempt in range(8):
        folder = Path(shutil.copytree(plants[2], tmp_path / str(attempt)))
        group = insert_in_data(folder, tmp_path / "scratch").group
        data = open_copy(folder, tmp_path / "scratch")
        assert group in {data.train.group_names[one] for one in np.unique(data.train.groups)}


@LINUX
def test_a_process_that_talks_to_somebody_else_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as friend, socket.create_server(("127.0.0.1", 0)) as stranger:
        ports = [one.getsockname()[1] for one in (friend, stranger)]
        code = f"import socket, time; held = [socket.create_connection(('127.0.0.1', port)) for port in {ports}]; print('x', flush=True); time.sleep(30)"
        outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"  # a child of a child
        child = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
        try:
            assert child.stdout is not None
            with SocketWatch(child.pid) as watch:
                child.stdout.readline()
                end = time.monotonic() + 10
                while len(watch.seen) < 2 and time.monotonic() < end:
                    time.sleep(0.02)
            assert watch.strangers(*ports) == []
            assert watch.strangers(ports[0]) == [("tcp", "127.0.0.1", ports[1])]
        finally:
            os.killpg(child.pid, 15)
            child.wait(10)
            child.stdout.close()


@LINUX
def test_a_stranger_who_calls_a_process_is_seen() -> None:
    code = "import socket; held = socket.create_server(('127.0.0.1', 0)); print(held.getsockname()[1], flush=True); other = held.accept(); held.accept()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        with SocketWatch(child.pid) as watch, socket.create_connection(("127.0.0.1", port)) as caller:
            end = time.monotonic() + 10
            while not watch.seen and time.monotonic() < end:
                time.sleep(0.02)
            own = caller.getsockname()[1]
        assert watch.strangers() == [("tcp", "127.0.0.1", own)]
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_a_recorder_keeps_every_byte_and_can_hold_them() -> None:
    rng = np.random.default_rng(0)
    sent = noise(rng, 300_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with (
            Recorder(server.getsockname()[1]) as recorder,
            socket.create_connection(("127.0.0.1", recorder.port)) as near,
        ):
            far, _ = server.accept()
            far.settimeout(10)
            with recorder.held():
                time.sleep(0.1)
                near.sendall(b"first")
                far.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    far.recv(10)
            far.settimeout(10)
            assert far.recv(10) == b"first"
            threading.Thread(target=near.sendall, args=(sent,), daemon=True).start()
            got = b""
            while len(got) < len(sent):
                got += far.recv(1 << 16)
            far.sendall(b"thanks")
            assert near.recv(10) == b"thanks"
            far.close()
        assert got == sent
        assert recorder.up == [b"first" + sent] and recorder.down == [b"thanks"]


# ---- real processes


@pytest.mark.processes
@pytest.mark.slow
def test_the_command_shows_that_a_built_in_plant_keeps_everything(plants: list[Path], tmp_path: Path) -> None:
    site = next(plant for plant in plants if plant.name.startswith("kiln"))
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    command = [
        sys.executable,
        "-m",
        "trunkline.cli.app",
        "client",
        "prove-egress",
        str(site),
        "--out",
        str(tmp_path / "proof.json"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing private left kiln-02" in done.stdout and "nobody but the server" in done.stdout
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["found"] == 0 and proof["control"]["found"] == proof["control"]["of"] > 1000
    assert proof["canaries_trained_from"] is True
    searched = {one["what"]: one for one in proof["searched"]}
    assert {"canary: a sensor's name", "canary: a group", "canary: sensor values", "canary: a numeric label", "canary: weights",
            "stem, heads and norms", "the local baseline", "sensor values", "sensor values, scaled", "labels",
            "means and deviations"} <= set(searched)  # fmt: skip
    assert all(one["searched"] > 0 for one in searched.values())
    assert proof["bytes_up"] > proof["manifest"]["bytes"] > 100_000
    assert proof["messages"] == proof["manifest"]["lines"] == 4, "an offer, two updates, a scorecard"


@LINUX
@pytest.mark.processes
@pytest.mark.slow
def test_a_client_app_that_leaks_within_its_contract_is_caught(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stem weights in a lent array, a cell of the data as a loss, a sensor's name in an error, a connection to somebody else."""
    site = next(plant for plant in plants if plant.name.startswith("press"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(TESTS.parent)]))
    honest = insert_in_data

    def planted(folder: Path, scratch: Path) -> Any:
        found = honest(folder, scratch)
        monkeypatch.setenv("LEAKY_CELL", repr(found.values[0]))
        return found

    monkeypatch.setattr(prove, "insert_in_data", planted)
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setenv("LEAKY_PORT", str(stranger.getsockname()[1]))

        def listen() -> None:
            while True:
                try:
                    caller, _ = stranger.accept()
                except OSError:
                    return
                held.append(caller)
                time.sleep(0.5)
                caller.sendall(b"x")

        threading.Thread(target=listen, daemon=True).start()
        evidence = prove.prove(site, app="leaky_app:app")
        stranger.shutdown(socket.SHUT_RDWR)
    for caller in held:
        caller.close()
    found = {one["what"] for one in evidence["searched"] if one["found"]}
    assert {"stem, heads and norms", "canary: sensor values", "canary: a sensor's name"} <= found, evidence["searched"]
    assert "names of sensors, labels, groups, files" in found
    assert "labels" not in found and "canary: a group" not in found
    assert evidence["sockets"]["strangers"] == [f"tcp 127.0.0.1:{os.environ['LEAKY_PORT']}"]
    assert len(prove.verdict(evidence)) >= 4


@pytest.mark.processes
@pytest.mark.slow
def test_four_plants_in_one_recorded_run_let_nothing_private_out(plants: list[Path], tmp_path: Path) -> None:
    """Every byte that left each of four real plants, against everything the contract of that plant does not list."""
    run = parse_run(
        {
            "name": "recorded", "rounds": 2, "seed": 5, "trunk": {"width": 16}, "training": {"steps": 3, "batch_size": 32},
            "strategy": {"name": "fedrep"}, "cohort": {"min_sites": 4, "deadline_s": 180.0, "gather_s": 180.0},
        },
        "test",
    )  # fmt: skip
    folders = [Path(shutil.copytree(plant, tmp_path / "sites" / plant.name)) for plant in plants]
    planted = {folder: insert_in_data(folder, tmp_path / "scratch") for folder in folders}
    states = {folder: tmp_path / "states" / folder.name for folder in folders}
    (tmp_path / "states").mkdir()
    recorders: dict[Path, Recorder] = {}
    weights: dict[Path, dict[str, Any]] = {folder: {} for folder in folders}

    def plant_weights() -> None:
        waiting = set(folders)
        while waiting:
            for folder in sorted(waiting):
                for path in states[folder].glob("vault/*/round-000001.safetensors"):
                    with recorders[folder].held():
                        weights[folder] = insert_in_vault(states[folder], path.parent.name, 1)
                    waiting.discard(folder)
            time.sleep(0.005)

    with ExitStack() as running:
        port = running.enter_context(local_federation.server_process(tmp_path))
        for folder in folders:
            recorders[folder] = running.enter_context(Recorder(port))
            running.enter_context(local_federation.client_process(folder, states[folder], recorders[folder].port))
        threading.Thread(target=plant_weights, daemon=True).start()
        out = local_federation.run_to_end(tmp_path, run)
    assert [len(one["sites"]) for one in read_report(out)["rounds"]] == [4, 4]
    for folder in folders:
        contract = next(contracts.every(states[folder]))
        entries = entries_of(states[folder], contract.run)
        assert sorted(entries) == [1, 2] and weights[folder]
        site = open_copy(folder, tmp_path / "scratch")
        recorded = RecordedBytes(recorders[folder].up)
        values = [
            *private_values.canary_values(planted[folder]),
            private_values.canary_weights(weights[folder]),
            private_values.site_names(folder, site, contract.model_dump_json()),
            *private_values.private_tensors(entries, contract.request),
            *private_values.values_in_data(folder, site, lent_scaler=False),
        ]
        assert len(values) >= 11
        for result in private_values.search(values, recorded):
            assert result.patterns > 0, (folder.name, result)
            assert result.hits == 0, (folder.name, result)
        lent = NumberRuns()
        for entry in entries.values():
            for array in entry.delta.values():
                lent.add(np.asarray(array), ("<f4",))
        found, among = recorded.count(lent)
        assert found == among > 1000, "the search finds what did leave"
        lines, _ = read_manifest(states[folder])
        assert [line.body["kind"] for line in lines] == ["offer", "update", "update", "scorecard"]
        others = [one for one in folders if one != folder]
        assert not any(recorded.views_with(planted[other].column[0].encode()) for other in others)
