"""Who is turned away by a whole centre, and in which words: real processes, the messages that a person would read."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.federation import Federation, federation, free_port, within
from trunkline.client.agent.join import _get
from trunkline.client.state.identity import Identity
from trunkline.errors import TrustError
from trunkline.flower.app_archive import app_digest
from trunkline.flower.control import environment, run_status, submit
from trunkline.flower.processes import client_context
from trunkline.security.enrolment import HELLO_PATH, Code, Hello
from trunkline.server.membership import audit_log as audit
from trunkline.server.operations import daemon

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.xdist_group("refusals"),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # Flower with pathspec 1.x
]


@pytest.fixture(scope="module")
def centre(plants: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One centre, and one plant that has joined and is online."""
    with federation(tmp_path_factory.mktemp("f")) as made:
        made.start()
        made.join(plants[0])
        made.plant(plants[0])
        within(60.0, lambda: f"online\n{made.logs()}", lambda: plants[0].name in made.online())
        yield made


@pytest.fixture
def other(plants: list[Path], tmp_path: Path) -> Path:
    """A second plant's folder that may be spoilt."""
    return Path(shutil.copytree(plants[1], tmp_path / plants[1].name))


def test_a_code_works_once(centre: Federation, other: Path) -> None:
    code = centre.invite(other.name)
    centre.join(other, code)
    said = centre.join(other, code, fails=True)
    assert f"{other.name}: this code was used on" in said and "ask the operator for another" in said
    assert Identity.of(centre.states[other.name]).joined, "what was there stays"


def test_a_code_that_is_over_is_said_to_be_over(centre: Federation, other: Path) -> None:
    code = centre.invite(other.name, "--hours", "0.0001")
    time.sleep(1.5)
    assert f"{other.name}: this code expired on" in centre.join(other, code, fails=True)


def test_a_mistyped_code_and_another_sites_code_are_told_apart(centre: Federation, other: Path) -> None:
    code = centre.invite(other.name)
    wrong = code.replace(code[0], "B" if code[0] != "B" else "C", 1)
    assert "incomplete or mistyped" in centre.join(other, wrong, fails=True)
    assert "incomplete or mistyped" in centre.join(other, code[:-6], fails=True)
    strange = centre.invite("somebody-else")
    said = centre.join(other, strange, fails=True)
    assert "the code is for 'somebody-else'" in said and "not used up" in said
    centre.join(other, code)


def test_a_server_that_is_not_the_one_that_invited_gets_nothing(
    centre: Federation, other: Path, tmp_path: Path
) -> None:
    """Somebody between the plant and its centre, with a whole federation of his own."""
    with federation(tmp_path / "m") as between:
        between.start()
        theirs = between.invite(other.name)
        real = centre.invite(other.name)
        between.states[other.name] = centre.states[other.name] = tmp_path / "state"
        said = between.join(other, real, fails=True)
        assert "does not know the signer" in said, said
        # he knows the secret half too, and still cannot be the authority that the code names
        stolen, honest = Code.parse(theirs), Code.parse(real)
        said = between.join(other, str(Code(stolen.secret, honest.authority)), fails=True)
        assert "does not know the signer" in said or "made by another" in said, said
        assert not Identity.of(tmp_path / "state").joined
        assert "enrol" not in between.command("server", "audit")


def test_a_site_of_another_name_takes_no_part(centre: Federation, plants: list[Path]) -> None:
    """The certificate says who it is; what site.toml calls itself is checked against it before anything starts."""
    folder = centre.root / "renamed"
    shutil.copytree(plants[0], folder)
    text = (folder / "site.toml").read_text()
    (folder / "site.toml").write_text(text.replace(plants[0].name, "another"))
    said = centre.command("client", "start", str(folder), "--state", str(centre.states[plants[0].name]), fails=True)
    assert f"joined as '{plants[0].name}'" in said and "name = 'another'" in said


def request(centre: Federation, site: str, method: str, path: str) -> httpx.Response:
    context = client_context(Identity.of(centre.states[site]).folder)
    with httpx.Client(verify=context, timeout=10.0) as client:
        return client.request(method, f"https://{centre.address}{path}", content=b"")


OUTSIDE = (
    *("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json"),
    *("/v1/fleet/register-node", "/v1/fleet/unregister-node", "//v1/control/list-runs"),
    "/v1/fleet/%2e%2e/control/list-runs",
)


@pytest.mark.parametrize("path", OUTSIDE)
def test_control_and_runtime_do_not_exist_from_outside(centre: Federation, plants: list[Path], path: str) -> None:
    for method in ("GET", "POST"):
        answer = request(centre, plants[0].name, method, path)
        assert answer.status_code == 404, (method, path, answer.text)
    assert request(centre, plants[0].name, "GET", "/health").status_code == 200


def test_nothing_but_the_gateway_listens_beyond_the_centre(centre: Federation) -> None:
    """Every listening socket of the centre's processes is on loopback; the gateway's is where it was told to be."""
    pids = {one["pid"] for one in daemon.status(centre.server)["children"]} | {centre.running["server"].pid}
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()))
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1])
    assert listening and all(one.startswith("0100007F:") for one in listening), listening


@pytest.mark.timeout(200)
def test_a_foreign_app_runs_neither_at_the_centre_nor_at_a_plant(centre: Federation, plants: list[Path]) -> None:
    """Submitted on the server's own loopback, where Flower asks nobody who he is."""
    marker, folder = centre.root / "was-run", centre.root / "evil"
    code = f'from pathlib import Path\nPath({str(marker)!r}).write_text("import")\n'
    (folder / "evil").mkdir(parents=True)
    (folder / "evil" / "__init__.py").write_text("")
    (folder / "evil" / "client.py").write_text(code + "from flwr.clientapp import ClientApp\napp = ClientApp()\n")
    (folder / "evil" / "server.py").write_text(code + "from flwr.serverapp import ServerApp\napp = ServerApp()\n")
    config = '[tool.flwr.app.config]\nout = ""\nheader = "{{}}"\nrounds = 1\nnodes = 1\nretries = 0\n'
    components = 'serverapp = "{server}"\nclientapp = "evil.client:app"\n'
    head = '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = "x"\nlicense = "Apache-2.0"\n[tool.flwr.app]\npublisher = "evil"\n'
    project = head + "[tool.flwr.app.components]\n" + components + config
    (folder / "pyproject.toml").write_text(project.format(server="evil.server:app"))
    status = daemon.status(centre.server)
    ca = Path(status["ca"]).read_bytes()

    def ended(run: int) -> bool:
        return run_status(status["address"], run, ca=ca)[0].startswith("finished")

    run = submit(status["address"], folder, {}, ca=ca)
    within(60.0, lambda: f"refused\n{centre.logs()}", lambda: ended(run))
    said, why = run_status(status["address"], run, ca=ca)
    assert said == "finished:failed" and "is not the one installed at this server; none of its code was run" in why
    assert any(link.body["what"] == "refuse app" for link in audit.read(centre.server))
    shown = centre.command("server", "status")
    assert "finished:failed" in shown

    # and where the operator himself lets it pass, a plant has the last word: here the tests' server app asks it to train
    (folder / "pyproject.toml").write_text(project.format(server="tests.tiny_apps:server_app"))
    (centre.server / "pins.txt").write_text(app_digest(folder) + "\n")
    out = centre.root / "foreign.jsonl"
    out.touch()
    run = submit(status["address"], folder, {"out": str(out)}, ca=ca)
    within(90.0, lambda: f"answered\n{centre.logs()}", lambda: ended(run))
    assert "is not pinned at this site; none of its code was run" in out.read_text(), centre.logs()
    executor = centre.states[plants[0].name] / "logs" / "executor.log"
    assert "refused the app" in executor.read_text()
    assert not marker.exists()


def test_an_expired_certificate_is_told_what_to_do(plants: list[Path], tmp_path: Path) -> None:
    with federation(tmp_path, "--site-days", "0.00005") as made:
        made.start()
        made.join(plants[0])
        time.sleep(5.0)
        state = made.states[plants[0].name]
        said = made.command("client", "renew", str(plants[0]), "--state", str(state), fails=True)
        assert "has expired" in said and "new invitation" in said, said
        with pytest.raises(
            TrustError, match="certificate has expired"
        ):  # and the centre says the same, in the handshake
            _get(made.address, HELLO_PATH, client_context(Identity.of(state).folder), Hello)
        log = made.server / "logs" / "gateway.log"
        within(5.0, "the gateway's log says so", lambda: "expired" in log.read_text())


@contextlib.contextmanager
def redirecting(state: Path) -> Iterator[tuple[str, list[bytes], list[bytes]]]:
    """A centre that has gone over to somebody: it answers everything with a way to another address of its choice.

    Yields its address, what came to it, and what came to the other address.
    """
    asked: list[bytes] = []
    lured: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(state / "server.crt", state / "server.key")
    ended = threading.Event()

    def serve(listener: socket.socket, seen: list[bytes], secure: bool, answer: bytes) -> None:
        listener.settimeout(0.2)
        while not ended.is_set():
            with contextlib.suppress(OSError):
                taken, _ = listener.accept()
                with context.wrap_socket(taken, server_side=True) if secure else taken as peer:
                    peer.settimeout(5.0)
                    seen.append(peer.recv(65536))
                    peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as other:
        there = f"http://127.0.0.1:{other.getsockname()[1]}/stolen"
        way = f"HTTP/1.1 307 Temporary Redirect\r\nlocation: {there}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        gone = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        threads = [
            threading.Thread(target=serve, args=(front, asked, True, way.encode()), daemon=True),
            threading.Thread(target=serve, args=(other, lured, False, gone), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield f"127.0.0.1:{front.getsockname()[1]}", asked, lured
        finally:
            ended.set()
            for thread in threads:
                thread.join(6.0)


@pytest.mark.parametrize("ours", [True, False])
def test_a_plant_follows_no_redirect(plants: list[Path], tmp_path: Path, ours: bool) -> None:
    """Ours asks the centre and goes nowhere else; Flower's own SuperNode, as the control, goes where it is sent."""
    made = Federation(tmp_path)
    state = tmp_path / "plant"
    code, request, answer = made.invite(plants[0].name), tmp_path / "request", tmp_path / "answer"
    own = ("client", "join", str(plants[0]), "--code", code, "--state", str(state))
    made.command(*own, "--request", str(request))
    made.command("server", "admit", str(request), "--out", str(answer))
    made.command(*own, "--admission", str(answer))
    identity = Identity.of(state)
    with redirecting(made.server) as (address, asked, lured):
        program = [sys.executable, "-m", "trunkline.flower.processes", "supernode", "--identity", str(identity.folder)]
        stock = [str(Path(sys.executable).with_name("flower-supernode"))]
        flags = ["--superlink", address, "--root-certificates", str(identity.authority), "--port", str(free_port())]
        with (tmp_path / "supernode.log").open("wb") as log:
            process = subprocess.Popen(
                [*(program if ours else stock), *flags, "--auth-supernode-private-key", str(identity.node_key)],
                env=environment(state), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                within(30.0, lambda: f"asked\n{(tmp_path / 'supernode.log').read_text()}", lambda: asked)
                if ours:
                    time.sleep(2.0)
                    assert not lured
                else:
                    within(10.0, "the control goes where it is sent", lambda: lured)
                    assert b"POST /stolen" in lured[0] and b"flwr-signature" in lured[0].lower()
            finally:
                process.kill()
                process.wait(10.0)
