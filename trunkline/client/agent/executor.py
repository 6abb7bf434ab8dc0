"""The site's worker process: it takes messages from the SuperNode and answers them with the INSTALLED ClientApp.

Flower itself starts a process for every message, unpacks the app that the server sent and imports it. Here the archive of
the app is never unpacked: its digest is compared with the pins of this installation. The code that runs is the code that
the plant's operator installed, in one process that keeps torch, the model and the site loaded.

Run as `python -m trunkline.client.agent.executor`, by `trunkline client start`.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

import trunkline
from trunkline.client.agent.activity import Activity, AgentTask
from trunkline.client.agent.installed_app import load_app, set_torch_threads
from trunkline.client.agent.task_incidents import TaskIncidents, round_of
from trunkline.client.agent.task_journal import TaskJournal
from trunkline.client.policy.egress import EgressFilter
from trunkline.errors import ContractError, DeploymentError, StorageError, TrunklineError
from trunkline.flower.app_archive import app_digest
from trunkline.flower.errors import CRASHED, FULL, REFUSED, RESTARTED, answer, error_reply
from trunkline.flower.runtime import CLIENT_APP, NodeRuntime, NodeTask
from trunkline.models.tasks import describe_tasks
from trunkline.runtime import disk
from trunkline.runtime.programs import accepts_connections, pinned_digests

logger = logging.getLogger("trunkline.executor")


@dataclass(frozen=True)
class Timing:
    """Waits of the executor, in seconds."""

    poll_s: float = 0.1  # between questions for a task
    heartbeat_s: float = 15.0  # a task's token expires 60 s after its last heartbeat
    farewell_s: float = 6.0  # how long a task may continue after SIGTERM; the supervisor kills after 8 s
    retry_s: float = 5.0  # between attempts to write the journal or the manifest
    # without more room on the disk, until a reply is tried again that the disk did not take
    first_room_s: float = 5.0
    longest_room_s: float = 60.0
    longest_pause_s: float = 5.0  # between attempts to reach a SuperNode that is down
    push_pauses_s: tuple[float, ...] = (0.5, 1.0, 2.0)  # a reply is the work of a round: retried before it is given up


class Executor:
    """Answers one message at a time until `stop`.

    Args:
        address: the SuperNode's Runtime API, host:port on loopback.
        pins: read before each task: the digests of the apps whose messages are answered.
        egress_filter: every reply passes through it, whatever made it; None: a test's app that is not Trunkline's own.
        site: its name, for the incidents, which are beside the journal in the site's state folder.
    """

    def __init__(
        self,
        address: str,
        secret: Path,
        journal: Path,
        client_app: ClientApp,
        pins: Callable[[], set[str]],
        egress_filter: EgressFilter | None = None,
        site: str = "",
        timing: Timing = Timing(),
    ) -> None:
        self.address = address
        self.state = journal.parent
        self.incidents = TaskIncidents(self.state, site)
        self.activity = Activity(self.state)
        self._claimed: tuple[str, str] | None = None  # a task that is not in the journal yet
        self._room_s = 0.0  # how long to wait for room before the next task; 0: the last reply could be kept
        self.app = client_app
        self.pins = pins
        self.timing = timing
        self.egress_filter = egress_filter
        self._journal = TaskJournal(journal)
        self._runtime = NodeRuntime(address, secret)
        self._stop = threading.Event()
        self._app_s = 0.0  # that the ClientApp took for its last reply
        self._current: tuple[NodeTask, str, str, dict[str, Any]] | None = None
        self._answering = threading.Lock()  # held by what answers the current task: the work or the farewell

    def run(self) -> None:
        """Serve until `stop`. The loop waits for a SuperNode that is down; no failure ends it."""
        pause = self.timing.poll_s
        while not self._stop.is_set():
            try:
                worked = self._step()
                pause = self.timing.poll_s
                self.incidents.recover("the journal can be written again; tasks are taken", "journal")
                if worked:
                    self._wait_for_room()
                    continue
            except DeploymentError as error:
                pause = min(max(2 * pause, 0.2), self.timing.longest_pause_s)
                logger.warning("%s Trying again in %.1f s.", error, pause)
            except (StorageError, OSError) as error:
                pause = self.timing.retry_s
                logger.error("%s No task is taken without a journal. Trying again in %.0f s.", error, pause)
                cause = disk.disk_error_text(error) or "it cannot be written"
                self.incidents.note(
                    "failure",
                    f"no task is taken: {self.state} holds no journal ({cause})",
                    "Free space there.",
                    "journal",
                )
            self._stop.wait(pause)

    def stop(self) -> None:
        """Take no further task; one that is being answered has `farewell_s` seconds before an error reply ends it and the process."""
        self._stop.set()
        farewell = threading.Timer(self.timing.farewell_s, self._leave)
        farewell.daemon = True
        farewell.start()

    def _step(self) -> bool:
        """Answer for the task in the journal, or take the next one; False if there was none."""
        record = self._journal.read()
        if record is not None:
            self._recover(record)
            return True
        if self._claimed is None and (claimed := self._runtime.acquire()) is not None:
            self._claimed = claimed
        if self._claimed is None:
            return False
        token, kind = self._claimed
        self._journal.write(token, kind)  # first of all: from now on only this token can free the SuperNode
        self._claimed = None
        self._serve(token, kind)
        return True

    def _wait_for_room(self) -> None:
        """After a reply that the disk did not take: wait until there is more room, or `_room_s` has passed."""
        end, before = time.monotonic() + self._room_s, disk.free_bytes(self.state)
        while time.monotonic() < end and disk.free_bytes(self.state) <= before and not self._stop.wait(0.5):
            pass

    def _recover(self, record: dict[str, Any]) -> None:
        """Answer for a task that a former process, or a failed connection, did not finish.

        An error reply is enough: the server asks again, and a site answers the same round twice with the same bytes.
        """
        envelope = record.get("envelope")
        if envelope is None and not record.get("answered"):
            logger.info("resuming a task that was claimed and not begun")
            try:
                self._serve(record["token"], str(record.get("type", "")))
            except (StorageError, OSError):
                raise  # the task can still begin once there is room
            except BaseException:
                self._journal.clear()  # one attempt only: an expired token cannot be answered
                raise
            self._journal.clear()
            return
        task = NodeTask(self.address, record["token"])
        try:
            task.resume(envelope or {})
            task.beat()
            if not record.get("answered"):
                farewell = error_reply(task.envelope, "the site's worker restarted; ask again", RESTARTED)
                if (checked := self._filter(task.envelope, farewell)) is None:
                    return
                task.push(checked)
            task.finish(False, "the worker restarted")
            logger.info("answered for the task from before the restart: the server will ask again")
            self.incidents.note(
                "recovery", "the worker was restarted during a task; the server was asked to repeat the request",
                round=round_of(task.envelope), remedy="Nothing to do: the reply will be the same.",
            )  # fmt: skip
        except DeploymentError as error:
            if not accepts_connections(self.address, 2.0):
                raise  # the SuperNode is down, not the token: the journal is still worth keeping
            logger.info("the task from before the restart has expired (%s)", error)
        finally:
            task.close()
        self._journal.clear()

    def _serve(self, token: str, kind: str) -> None:
        """One task from input to output. Whatever fails in between, the SuperNode gets a reply before the output."""
        began = time.monotonic()
        task = NodeTask(self.address, token)
        done = threading.Event()
        try:
            task.pull_input()
            envelope = task.pull_envelope()
            self._journal.write(token, kind, envelope)
            threading.Thread(
                target=_keep_alive, args=(task, done, self.timing.heartbeat_s), name="heartbeat", daemon=True
            ).start()
            self._current = (task, token, kind, envelope)
            question, drafted = self._reply(task, kind)
            with self._answering:
                self._current = None
                reply = self._filter(question, drafted)
                if reply is None:
                    return  # stopped before the manifest could be written: the next worker reads the journal
                self._hand_over(task, reply)
                try:
                    self._journal.write(token, kind, envelope, answered=True)
                except StorageError as error:  # matters only if the process ends before the next line
                    logger.error("%s", error)
                task.finish(not reply.has_error(), reply.error.reason or "" if reply.has_error() else "")
                self._journal.clear()
            self._conclude(task.envelope, reply)
            outcome = f"error {reply.error.code}" if reply.has_error() else "a reply"
            message_type, seconds = task.envelope.metadata.message_type, time.monotonic() - began
            logger.info(
                "%s: %s after %.2f s, of which the app took %.2f s", message_type, outcome, seconds, self._app_s
            )
        finally:
            self._current = None
            self.activity.end()
            done.set()
            task.close()

    def _conclude(self, request: Message, reply: Message) -> None:
        """Record the end of a task in activity and incidents."""
        task = self.activity.doing or AgentTask(request.metadata.message_type)
        self.activity.end(f"error {reply.error.code}: {reply.error.reason}" if reply.has_error() else "answered")
        if not reply.has_error():
            self._room_s = 0.0
        elif reply.error.code == FULL:
            self._room_s = min(max(2 * self._room_s, self.timing.first_room_s), self.timing.longest_room_s)
        self.incidents.report_reply(task, task.round or round_of(request), reply)

    def _filter(self, request: Message, reply: Message) -> Message | None:
        """The reply that may leave, recorded in the manifest; None: stopped while the manifest could not be written.

        Until it is recorded nothing leaves, and the server waits as long as its deadline allows.
        """
        while self.egress_filter is not None:
            try:
                passed = self.egress_filter.check(request, reply)
                self.incidents.recover(
                    "the manifest can be written again; replies leave", "manifest", round_of(request)
                )
                return passed
            except TrunklineError as error:
                logger.error(
                    "%s Nothing leaves without its line in the manifest. Trying again in %.0f s.",
                    error,
                    self.timing.retry_s,
                )
                text = f"a reply is held back, because the manifest cannot be written: {error}"
                remedy = "Nothing is lost: it leaves when the manifest can be written."
                self.incidents.note("failure", text, remedy, "manifest", round_of(request))
            if self._stop.wait(self.timing.retry_s):
                return None
        return reply

    def _reply(self, task: NodeTask, kind: str) -> tuple[Message, Message]:
        """The message (only its envelope if it was refused unread) and the reply to it."""
        if kind != CLIENT_APP:
            logger.error("refused a task of type %s", kind)
            self.incidents.note(
                "refusal", f"refused a task of type {kind}", f"This site answers {CLIENT_APP} only.", f"type {kind}"
            )
            refusal = error_reply(task.envelope, f"this site answers {CLIENT_APP} only, not {kind}", REFUSED)
            return task.envelope, refusal
        if task.digest not in self.pins():
            logger.error("refused the app %s: it is not the one installed here; none of its code was run", task.digest)
            reason = (
                f"the app {task.digest[:16]} is not pinned at this site; none of its code was run. "
                "Submit the thin app of the Trunkline version that the sites have installed."
            )
            remedy = "Update Trunkline here or at the server, so that both have the same version."
            text = f"refused the app {task.digest}: it is not the one installed here; none of its code was run"
            self.incidents.note("refusal", text, remedy, f"app {task.digest}", round_of(task.envelope))
            return task.envelope, error_reply(task.envelope, reason, REFUSED)
        try:
            message = task.pull_message()
        except ContractError as error:
            logger.error("%s", error)
            self.incidents.note("refusal", f"refused a message: {error}", "", "message", round_of(task.envelope))
            return task.envelope, error_reply(task.envelope, str(error), CRASHED)
        self.activity.begin(AgentTask.from_message(message))
        assert task.context is not None  # pull_input sets it
        began = time.monotonic()
        reply = answer(self.app, message, task.context)
        self._app_s = time.monotonic() - began
        return message, reply

    def _hand_over(self, task: NodeTask, reply: Message) -> None:
        for pause in self.timing.push_pauses_s:
            try:
                task.push(reply)
                return
            except DeploymentError as error:
                logger.warning("%s Trying again in %.1f s.", error, pause)
                time.sleep(pause)
        task.push(reply)

    def _leave(self) -> None:
        """Out of time: answer with an error instead of the result, and end the process."""
        if not self._answering.acquire(timeout=1.0):
            return  # the main thread is sending the reply and ends by itself
        if self._current is None:
            self._answering.release()
            return
        task, token, kind, envelope = self._current
        try:
            farewell = error_reply(task.envelope, "the site is shutting down; ask again", RESTARTED)
            task.push(self.egress_filter.check(task.envelope, farewell) if self.egress_filter is not None else farewell)
            self._journal.write(token, kind, envelope, answered=True)
            task.finish(False, "the site is shutting down")
            self._journal.clear()
            logger.info("shut down during a task; the server was asked to repeat the request")
        except TrunklineError as error:
            logger.warning("shut down during a task, without a reply: %s", error)
        logging.shutdown()
        os._exit(0)  # the work in the main thread cannot be interrupted


def _keep_alive(task: NodeTask, done: threading.Event, pause_s: float) -> None:
    while not done.wait(pause_s):
        try:
            task.beat()
        except DeploymentError as error:
            if not done.is_set():
                logger.warning("%s", error)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trunkline.client.agent.executor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--runtime", required=True, help="the SuperNode's Runtime API, host:port")
    parser.add_argument("--secret", required=True, type=Path, help="the file shared with the SuperNode")
    parser.add_argument("--journal", required=True, type=Path)
    parser.add_argument("--app", default="trunkline.client.app:app", help="module:attribute of the installed ClientApp")
    parser.add_argument("--pins", type=Path, help="file of further app digests to answer, one a line")
    parser.add_argument("--poll", type=float, default=0.1, help="seconds between questions for a task")
    parser.add_argument("--site", default="site", help="name in the log")
    parser.add_argument(
        "--folder", type=Path, help="the site's folder: every reply is checked against its policy and contracts"
    )
    parser.add_argument("--state", type=Path, help="the site's state, with contracts and manifest")
    parser.add_argument("--server", default="", help="address of the server, for the manifest")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format=f"%(asctime)s {options.site.replace('%', '%%')} %(levelname)s %(message)s",
    )
    for chatty in ("flwr", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        set_torch_threads()
        installed = app_digest(Path(trunkline.__file__).parent / "app")
        client_app = load_app(options.app)
        executor = Executor(
            options.runtime,
            options.secret,
            options.journal,
            client_app,
            lambda: pinned_digests(installed, options.pins),
            EgressFilter(options.folder, options.state, options.server, describe_tasks) if options.folder else None,
            options.site,
            Timing(poll_s=options.poll),
        )
    except TrunklineError as error:
        logger.error("%s", error)
        sys.exit(1)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, lambda *_: executor.stop())
    logger.info("ready: %s, pid %d, answers the app %s", options.app, os.getpid(), installed[:16])
    executor.run()
    logger.info("ended")


if __name__ == "__main__":
    main()
