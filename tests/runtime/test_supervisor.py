"""Children are restarted, end with their supervisor in order, and two daemons never share a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from trunkline.errors import ConfigError, DeploymentError
from trunkline.runtime import log_files
from trunkline.runtime.child import Child, Timing
from trunkline.runtime.health import clock_time
from trunkline.runtime.incidents import read_incidents
from trunkline.runtime.lock import Lock, read_status
from trunkline.runtime.log_files import rotate_in_place
from trunkline.runtime.programs import make_secret
from trunkline.runtime.supervisor import Supervisor
from trunkline.runtime.systemd import Service

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="process groups of Linux")]
FAST = Timing(first_pause_s=0.05, tick_s=0.02, stopped_s=0.05)
SLEEP = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def child(tmp_path: Path, name: str, code: str = SLEEP, restart: bool = True) -> Child:
    return Child(name, [sys.executable, "-S", "-c", code], os.environ, tmp_path / "logs" / f"{name}.log", restart)


def within(seconds: float, look: Callable[[], Any]) -> Any:
    end = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
    return value


def part(state: Path, name: str) -> dict[str, Any]:
    try:
        children = json.loads((state / "status.json").read_bytes())["children"]
    except FileNotFoundError:
        return {}
    return next((entry for entry in children if entry["name"] == name), {})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def supervised(
    children: list[Child], state: Path, lines: list[str] | None = None, timing: Timing = FAST, **info: object
) -> Supervisor:
    """A supervisor with short pauses; what it emits is appended to `lines`."""
    emit = (lambda text: None) if lines is None else lines.append
    return Supervisor(children, state, info, emit, timing=timing)


@contextmanager
def running(supervisor: Supervisor) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield thread
    finally:
        supervisor.stop()
        thread.join(12.0)
        assert not thread.is_alive(), "a supervisor ends within 10 s"


def test_a_killed_child_is_back_at_once_and_the_status_says_so(tmp_path: Path) -> None:
    with running(supervised([child(tmp_path, "a"), child(tmp_path, "b")], tmp_path)):
        first = within(5.0, lambda: part(tmp_path, "a").get("pid"))
        other = within(5.0, lambda: part(tmp_path, "b").get("pid"))
        os.kill(first, signal.SIGKILL)
        second = within(5.0, lambda: part(tmp_path, "a").get("restarts") == 1 and part(tmp_path, "a")["pid"])
        assert second != first and part(tmp_path, "a")["last_exit"] == "SIGKILL"
        assert part(tmp_path, "b")["pid"] == other and part(tmp_path, "b")["restarts"] == 0
        assert read_status(tmp_path)["running"]
    assert not read_status(tmp_path)["running"]
    assert not alive(second) and not alive(other)


def test_a_child_that_keeps_failing_is_started_ever_more_slowly(tmp_path: Path) -> None:
    with running(supervised([child(tmp_path, "a", "raise SystemExit(3)")], tmp_path, timing=Timing(0.1, tick_s=0.02))):
        within(8.0, lambda: part(tmp_path, "a").get("restarts", 0) >= 2)
        restarts = part(tmp_path, "a")["restarts"]
        time.sleep(0.3)
        assert part(tmp_path, "a")["restarts"] <= restarts + 1, "0.1 s, 0.2 s, 0.4 s, ..."
        assert part(tmp_path, "a")["last_exit"] == "exit code 3"


def test_a_child_not_to_be_restarted_is_left_ended(tmp_path: Path) -> None:
    with running(supervised([child(tmp_path, "a", "", restart=False)], tmp_path)):
        within(5.0, lambda: part(tmp_path, "a").get("last_exit") == "exit code 0")
        time.sleep(0.3)  # six times the first pause
        assert part(tmp_path, "a")["restarts"] == 0


def test_children_end_in_reverse_order_of_their_start(tmp_path: Path) -> None:
    order = tmp_path / "order"
    code = (
        "import signal, sys, time, pathlib\n"
        "def end(*_):\n    time.sleep(0.1)\n    open({0!r}, 'a').write({1!r})\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path({2!r}).touch()\ntime.sleep(60)"
    )
    ready = [tmp_path / f"ready-{name}" for name in "ab"]
    children = [
        child(tmp_path, name, code.format(str(order), name, str(path))) for name, path in zip("ab", ready, strict=True)
    ]
    with running(supervised(children, tmp_path)):
        within(5.0, lambda: all(path.exists() for path in ready))
    assert order.read_text() == "ba"


def test_a_child_that_ignores_the_request_is_killed_in_time(tmp_path: Path) -> None:
    with running(supervised([child(tmp_path, "a", STUBBORN)], tmp_path, timing=Timing(grace_s=0.3, tick_s=0.02))):
        pid = within(5.0, lambda: (tmp_path / "logs" / "a.log").exists() and part(tmp_path, "a").get("pid"))
        within(5.0, lambda: "up" in (tmp_path / "logs" / "a.log").read_text())
        began = time.monotonic()
    assert time.monotonic() - began < 3.0
    assert not alive(pid) and part(tmp_path, "a")["last_exit"] == "SIGKILL"


PARENT = """
import logging, os, sys
from pathlib import Path
from trunkline.runtime.child import Child
from trunkline.runtime.supervisor import Supervisor
state = Path({state!r})
child = Child("a", [sys.executable, "-S", "-c", {code!r}], os.environ, state / "a.log")
Supervisor([child], state).run()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_its_supervisor_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(state=str(tmp_path), code=SLEEP)])
    try:
        pid = within(10.0, lambda: part(tmp_path, "a").get("pid"))
        assert alive(pid)
        parent.send_signal(number)
        parent.wait(12.0)
        assert parent.returncode == (-number if number == signal.SIGKILL else 0)
        within(5.0, lambda: not alive(pid))
    finally:
        parent.kill()
        parent.wait(5.0)


def test_two_daemons_on_one_state_folder_are_refused_by_pid(tmp_path: Path) -> None:
    with Lock(tmp_path):
        with pytest.raises(DeploymentError, match=rf"pid {os.getpid()} already runs"), Lock(tmp_path):
            pass
        with pytest.raises(DeploymentError, match="already runs"):
            Supervisor([child(tmp_path, "a")], tmp_path).run()
    with Lock(tmp_path):
        pass


def test_a_lock_dies_with_its_holder_and_a_stale_pid_refuses_nobody(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1\n")
    with Lock(tmp_path):
        assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"


def test_a_log_above_the_limit_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("x" * 11)
    timing = Timing(log_limit=10, tick_s=0.02)
    with running(supervised([child(tmp_path, "a", "print('new')", restart=False)], tmp_path, timing=timing)):
        within(5.0, lambda: part(tmp_path, "a").get("last_exit"))
    assert (tmp_path / "logs" / "a.log").read_text() == "new\n"
    assert (tmp_path / "logs" / "a.log.1").read_text() == "x" * 11


def test_a_log_is_set_aside_under_a_running_child_which_writes_on(tmp_path: Path) -> None:
    timing = Timing(log_limit=1000, log_check_s=0.1, tick_s=0.02)
    code = "import time\nfor n in range(10**6): print(n, 'x' * 100, flush=True); time.sleep(0.01)"
    log = tmp_path / "logs" / "a.log"
    with running(supervised([child(tmp_path, "a", code)], tmp_path, timing=timing)):
        aside = log.with_name("a.log.1")
        within(5.0, lambda: aside.exists() and aside.stat().st_size > 0)
        within(5.0, lambda: b"\0" not in log.read_bytes() and 0 < log.stat().st_size < 50_000)
        assert part(tmp_path, "a")["restarts"] == 0


def test_a_child_that_needs_an_address_starts_when_somebody_listens(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        waiting = Child("a", [sys.executable, "-S", "-c", SLEEP], os.environ, tmp_path / "a.log", needs=address)
        with running(supervised([waiting], tmp_path)):
            time.sleep(0.3)
            assert not part(tmp_path, "a").get("pid")
            server.listen()
            within(5.0, lambda: part(tmp_path, "a").get("pid"))


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = Child("a", [str(tmp_path / "nothing")], os.environ, tmp_path / "a.log")
    with pytest.raises(DeploymentError, match="nothing cannot be executed"):
        Supervisor([missing], tmp_path).run()


def test_status_before_any_daemon_says_so(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no daemon has run"):
        read_status(tmp_path)


def test_a_secret_is_made_once_and_for_this_account_only(tmp_path: Path) -> None:
    path = make_secret(tmp_path / "state" / "secret")
    made = path.read_bytes()
    assert len(made) >= 32 and path.stat().st_mode & 0o777 == 0o600
    assert make_secret(path).read_bytes() == made
    path.chmod(0o644)
    with pytest.raises(DeploymentError, match="other accounts"):
        make_secret(path)


def test_a_death_is_one_failure_and_one_recovery_in_words(tmp_path: Path) -> None:
    lines: list[str] = []
    timing = Timing(first_pause_s=0.1, recovered_s=0.1, tick_s=0.02)
    with running(supervised([child(tmp_path, "a")], tmp_path, lines, timing, site="press-07")):
        os.kill(within(5.0, lambda: part(tmp_path, "a").get("pid")), signal.SIGKILL)
        within(5.0, lambda: len(read_incidents(tmp_path, 10)) == 2)
        assert part(tmp_path, "a")["trouble"] == ""
    first, second = read_incidents(tmp_path, 10)
    assert (first["kind"], first["site"], first["text"]) == ("failure", "press-07", "a was killed (SIGKILL)")
    assert first["remedy"].startswith("It is started again by itself. Its log: ")
    assert second["kind"] == "recovery" and second["text"].startswith("a runs again, after a start and ")
    assert any("killed" in line for line in lines) and any("runs again" in line for line in lines)
    assert "a ended with SIGKILL; it starts again in 0.1 s" in (tmp_path / "logs" / "daemon.log").read_text()


def test_a_child_that_keeps_ending_is_reported_twice_and_not_at_each_end(tmp_path: Path) -> None:
    timing = Timing(first_pause_s=0.02, longest_pause_s=0.02, tick_s=0.01)
    supervisor = supervised([child(tmp_path, "a", "raise SystemExit(3)")], tmp_path, timing=timing)
    with running(supervisor):
        supervisor.retry_now()
        within(10.0, lambda: part(tmp_path, "a").get("restarts", 0) >= 6)
        assert "keeps ending (exit code 3)" in part(tmp_path, "a")["trouble"]
    texts = [incident["text"] for incident in read_incidents(tmp_path, 100)]
    assert texts == ["a ended (exit code 3)", "a keeps ending (exit code 3), 4 times in a row"]


def test_a_loop_that_turns_sends_beats_to_systemd_and_one_that_hangs_sends_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "n"))
        systemd.settimeout(0.3)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        hang, go_on = threading.Event(), threading.Event()

        def tick() -> None:
            if hang.is_set():
                go_on.wait(10.0)

        def hear() -> str:
            try:
                return systemd.recv(4096).decode()
            except TimeoutError:
                return ""

        env = 'import os, time; print(sorted(set(os.environ) & {"NOTIFY_SOCKET", "WATCHDOG_USEC"}), flush=True); time.sleep(60)'
        supervisor = supervised([child(tmp_path, "a", env)], tmp_path)
        thread = threading.Thread(target=supervisor.run, args=(tick,))
        thread.start()
        try:
            heard = {hear() for _ in range(4)}
            assert {"STATUS=starting", "WATCHDOG=1"} <= heard
            within(5.0, lambda: (tmp_path / "logs" / "a.log").read_text() == "[]\n")  # no child speaks for its parent
            hang.set()
            within(5.0, lambda: not hear())
            assert not hear(), "a loop that hangs sends nothing"
            go_on.set()
            within(5.0, lambda: hear() == "WATCHDOG=1")
        finally:
            go_on.set()
            supervisor.stop()
            thread.join(12.0)
        within(5.0, lambda: "STOPPING=1" in hear())


@pytest.mark.parametrize(
    ("environ", "beats"),
    [({}, 0), ({"WATCHDOG_USEC": "1000"}, 1), ({"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}, 0), ({"WATCHDOG_USEC": "x"}, 0)],
)  # fmt: skip
def test_only_a_process_under_watch_sends_beats(
    environ: dict[str, str], beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    service = Service(environ)
    monkeypatch.setattr(service, "notify", sent.append)
    service.beat()
    assert sent == beats * ["WATCHDOG=1"]
    Service({"NOTIFY_SOCKET": "/nobody/listens"}).notify("READY=1")  # no error


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ConfigError("site.toml: Too many open files")])
def test_an_error_while_it_runs_ends_nothing_and_is_reported_once(tmp_path: Path, error: Exception) -> None:
    lines: list[str] = []
    turns = [0]

    def tick() -> None:
        turns[0] += 1
        raise error

    supervisor = supervised([child(tmp_path, "a")], tmp_path, lines)
    thread = threading.Thread(target=supervisor.run, args=(tick,))
    thread.start()
    within(5.0, lambda: turns[0] >= 3)
    assert thread.is_alive() and supervisor.all_running
    supervisor.stop()
    thread.join(12.0)
    assert len([line for line in lines if "Too many open files" in line]) == 1


def test_a_child_without_a_log_waits_for_one(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder of the logs should be")
    lines: list[str] = []
    with running(supervised([child(tmp_path, "a")], tmp_path, lines)):
        within(5.0, lambda: any("a ended (no log: " in line for line in lines))
        (tmp_path / "logs").unlink()
        within(5.0, lambda: part(tmp_path, "a").get("pid"))


def test_a_start_after_a_kill_reports_the_kill_and_one_after_an_end_does_not(tmp_path: Path) -> None:
    for ended, count in (("", 1), ("2026-11-23T02:10:00+00:00", 0)):
        state = tmp_path / str(count)
        state.mkdir()
        status = {"pid": 1, "since": "2026-11-23T02:00:00+00:00", "ended": ended, "children": []}
        (state / "status.json").write_text(json.dumps(status))
        with running(supervised([child(state, "a")], state)):
            within(5.0, lambda state=state: part(state, "a").get("pid"))
        texts = [incident["text"] for incident in read_incidents(state, 10)]
        assert len([text for text in texts if "was killed and has been started again" in text]) == count
        assert json.loads((state / "status.json").read_bytes())["ended"]


def test_a_failure_that_a_daemon_did_not_see_mended_does_not_hide_the_next_one(tmp_path: Path) -> None:
    killed = ("failure", "a was killed (SIGKILL)")

    def incidents() -> list[tuple[str, str]]:
        return [(incident["kind"], incident["text"]) for incident in read_incidents(tmp_path, 10)]

    for times in (1, 2):
        with running(supervised([child(tmp_path, "a")], tmp_path)):
            os.kill(within(5.0, lambda: part(tmp_path, "a").get("pid")), signal.SIGKILL)
            within(5.0, lambda times=times: incidents().count(killed) == times)
    assert incidents() == [killed, ("recovery", "a is started with the daemon"), killed]


def test_a_log_that_cannot_be_copied_is_emptied_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_files.shutil, "copyfile", full)
    log = tmp_path / "a.log"
    log.write_text("x" * 11)
    rotate_in_place(log, 10)
    assert log.stat().st_size == 0 and not log.with_name("a.log.1").exists()


def test_a_time_of_today_is_written_without_its_date() -> None:
    today = datetime.now(UTC).replace(hour=2, minute=14, second=5)
    assert clock_time(today.isoformat()) == "02:14" and clock_time(today.isoformat(), seconds=True) == "02:14:05"
    assert clock_time("2020-11-23T03:14:05+01:00") == "2020-11-23 02:14"
    assert clock_time(today.timestamp()) == "02:14" and clock_time(1e30) == "an unknown time"
    assert clock_time("soon") == "an unknown time"


def test_a_child_that_ends_again_and_again_is_not_reported_to_run_each_time(tmp_path: Path) -> None:
    timing = Timing(first_pause_s=0.01, longest_pause_s=0.01, recovered_s=0.1, tick_s=0.02)
    life = child(tmp_path, "a", "import time; time.sleep(0.15)")
    with running(supervised([life], tmp_path, timing=timing)):
        within(20.0, lambda: part(tmp_path, "a").get("restarts", 0) >= 7)
    texts = [incident["text"].split(",")[0] for incident in read_incidents(tmp_path, 100)]
    assert 1 <= texts.count("a runs again") <= 2, texts
    assert texts[-1] == "a keeps ending (exit code 0)"
