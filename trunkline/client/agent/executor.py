"""The plant's resident worker: takes messages from the SuperNode and answers them with the INSTALLED ClientApp.

Stock Flower starts a process for every message, unpacks the app that the server sent and imports it. Here the app's
archive stays inert bytes: its digest is compared with the pins of this installation, and what runs is the code that the
plant's operator installed, in one process that keeps torch, the model and the site loaded.

Run as `python -m trunkline.client.agent.executor`, by `trunkline client start`.
"""

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

import trunkline
from trunkline.client.agent.activity import Activity, Task
from trunkline.client.policy.egress import Door
from trunkline.errors import ContractError, DeploymentError, StorageError, TrunklineError
from trunkline.flower.app_archive import app_digest
from trunkline.flower.errors import CRASHED, DECLINED, FULL, PENDING, REFUSED, RESTARTED, answer, error_reply
from trunkline.flower.runtime import CLIENT_APP, NodeRuntime, NodeTask
from trunkline.runtime import disk
from trunkline.runtime.incidents import Incidents, Kind
from trunkline.runtime.programs import accepts_connections, pinned_digests
from trunkline.runtime.storage import write_atomic

BEAT_S = 15.0  # a task's token expires 60 s after its last heartbeat
LEAVE_S = 6.0  # how long a task may go on after SIGTERM; the supervisor kills after 8
HOLD_S = 5.0  # between attempts to write the manifest
# without a sign of more room, before an answer is tried again that the disk did not take
ROOM_FIRST_S, ROOM_MOST_S = 5.0, 60.0
LONGEST_PAUSE_S = 5.0  # between attempts to reach a SuperNode that is down
PUSH_PAUSES_S = (0.5, 1.0, 2.0)  # a reply is the work of a whole round: three more attempts before it is given up

logger = logging.getLogger("trunkline.executor")


class Journal:
    """The claimed task on disk, so that a successor can answer for it; stock Flower would wait a minute instead.

    Three stages: claimed (token only), known (the envelope too, enough for an error reply), answered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, token: str, kind: str, envelope: dict[str, Any] | None = None, answered: bool = False) -> None:
        record = {"token": token, "type": kind, "envelope": envelope, "answered": answered}
        write_atomic(self.path, json.dumps(record).encode())

    def read(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("the journal cannot be read (%s) and is set aside", error)
            self.clear()
            return None
        return record if isinstance(record, dict) and isinstance(record.get("token"), str) else None

    def clear(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be removed ({error.strerror}).") from error


class Executor:
    """Answers one message at a time until told to stop.

    Args:
        address: the SuperNode's Runtime API, host:port on loopback.
        pins: read before each task: the digests of the apps whose messages are answered.
        door: every reply goes through it, whatever made it; None: an app that is not Trunkline's own, in a test.
        site: its name, for the incidents, which lie beside the journal in the plant's state folder.
    """

    def __init__(
        self,
        address: str,
        secret: Path,
        journal: Path,
        client_app: ClientApp,
        pins: Callable[[], set[str]],
        poll_s: float = 0.1,
        door: Door | None = None,
        site: str = "",
    ) -> None:
        self.address = address
        self.state = journal.parent
        self.incidents = Incidents(self.state, site)
        self.activity = Activity(self.state)
        self._claimed: tuple[str, str] | None = None  # a task that the journal has not taken yet
        self._room_s = 0.0  # how long to wait for room before the next task; 0: the last answer could be kept
        self.app = client_app
        self.pins = pins
        self.poll_s = poll_s
        self.door = door
        self._journal = Journal(journal)
        self._runtime = NodeRuntime(address, secret)
        self._stop = threading.Event()
        self._app_s = 0.0  # that the ClientApp took for its last answer
        self._current: tuple[NodeTask, str, str, dict[str, Any]] | None = None
        self._answering = threading.Lock()  # whoever holds it answers the current task: the work or the farewell

    def run(self) -> None:
        """Serve until `stop`. A SuperNode that is down is waited for; nothing here ends the loop by itself."""
        pause = self.poll_s
        while not self._stop.is_set():
            try:
                worked = self._step()
                pause = self.poll_s
                self._over("the journal can be written again; tasks are taken", "journal")
                if worked:
                    self._wait_for_room()
                    continue
            except DeploymentError as error:
                pause = min(max(2 * pause, 0.2), LONGEST_PAUSE_S)
                logger.warning("%s Trying again in %.1f s.", error, pause)
            except (StorageError, OSError) as error:
                pause = HOLD_S
                logger.error("%s Without a journal no task is taken. Trying again in %.0f s.", error, pause)
                why = disk.disk_error_text(error) or "it cannot be written"
                self._note(
                    "failure",
                    f"no task is taken: {self.state} holds no journal ({why})",
                    "Free space there.",
                    "journal",
                )
            self._stop.wait(pause)

    def stop(self) -> None:
        """Take no further task; one in flight has LEAVE_S seconds before an error reply ends it and the process."""
        self._stop.set()
        farewell = threading.Timer(LEAVE_S, self._leave)
        farewell.daemon = True
        farewell.start()

    def _step(self) -> bool:
        """Answer for a journalled task, or take the next one; False when there was nothing to do."""
        left = self._journal.read()
        if left is not None:
            self._recover(left)
            return True
        if self._claimed is None and (claimed := self._runtime.acquire()) is not None:
            self._claimed = claimed
        if self._claimed is None:
            return False
        token, kind = self._claimed
        self._journal.write(token, kind)  # before anything else: from here on only this token can free the SuperNode
        self._claimed = None
        self._serve(token, kind)
        return True

    def _wait_for_room(self) -> None:
        """Where the disk did not take the last answer: until there is more room, or it is time to try again all the same."""
        end, before = time.monotonic() + self._room_s, disk.free_bytes(self.state)
        while time.monotonic() < end and disk.free_bytes(self.state) <= before and not self._stop.wait(0.5):
            pass

    def _recover(self, left: dict[str, Any]) -> None:
        """Answer for a task that a predecessor, or a failed connection, left behind.

        An error reply is enough: the centre asks again, and a site answers the same round twice with the same bytes.
        """
        envelope = left.get("envelope")
        if envelope is None and not left.get("answered"):
            logger.info("going on with a task that was claimed and not begun")
            try:
                self._serve(left["token"], str(left.get("type", "")))
            except (StorageError, OSError):
                raise  # it was not begun, and can be once there is room
            except BaseException:
                self._journal.clear()  # once only: if the token has expired there is nothing left to answer
                raise
            self._journal.clear()
            return
        task = NodeTask(self.address, left["token"])
        try:
            task.resume(envelope or {})
            task.beat()
            if not left.get("answered"):
                farewell = error_reply(task.envelope, "the site's worker restarted; ask again", RESTARTED)
                if (checked := self._let_out(task.envelope, farewell)) is None:
                    return
                task.push(checked)
            task.finish(False, "the worker restarted")
            logger.info("answered for the task of before the restart: the centre will ask again")
            self.incidents.note(
                "recovery", "the worker was restarted within a task; the centre was told to ask again",
                round=_round_of(task.envelope), remedy="Nothing to do: the answer will be the same.",
            )  # fmt: skip
        except DeploymentError as error:
            if not accepts_connections(self.address, 2.0):
                raise  # the SuperNode is down, not the token: the journal is still worth keeping
            logger.info("the task of before the restart is gone (%s)", error)
        finally:
            task.close()
        self._journal.clear()

    def _serve(self, token: str, kind: str) -> None:
        """One task from input to output. Whatever happens in between, the SuperNode gets a reply before the output."""
        began = time.monotonic()
        task = NodeTask(self.address, token)
        done = threading.Event()
        try:
            task.pull_input()
            envelope = task.pull_envelope()
            self._journal.write(token, kind, envelope)
            threading.Thread(target=_keep_alive, args=(task, done), name="heartbeat", daemon=True).start()
            self._current = (task, token, kind, envelope)
            made = self._reply(task, kind)
            with self._answering:
                self._current = None
                reply = self._let_out(*made)
                if reply is None:
                    return  # told to end before the manifest could be written: the journal tells the next worker
                self._hand_over(task, reply)
                try:
                    self._journal.write(token, kind, envelope, answered=True)
                except StorageError as error:  # only a restart at this very moment would miss it
                    logger.error("%s", error)
                task.finish(not reply.has_error(), reply.error.reason or "" if reply.has_error() else "")
                self._journal.clear()
            self._told(task.envelope, reply)
            what = f"error {reply.error.code}" if reply.has_error() else "a reply"
            asked, whole = task.envelope.metadata.message_type, time.monotonic() - began
            logger.info("%s: %s after %.2f s, of which the app took %.2f s", asked, what, whole, self._app_s)
        finally:
            self._current = None
            self.activity.end()
            done.set()
            task.close()

    def _told(self, request: Message, reply: Message) -> None:
        """What became of a task, for who looks: once where it goes on like that."""
        doing = self.activity.doing or Task(request.metadata.message_type)
        self.activity.end(f"error {reply.error.code}: {reply.error.reason}" if reply.has_error() else "answered")
        round, run = doing.round or _round_of(request), doing.run or "an unnamed run"
        if not reply.has_error():
            self._room_s = 0.0
            self._over(f"orders of {run} are answered again", f"order {doing.run}", round)
            self._over("answers can be kept again", "room", round)
            return
        code, text = reply.error.code, f"{run}, {doing.what}: {reply.error.reason}"
        if code == FULL:
            self._room_s = min(max(2 * self._room_s, ROOM_FIRST_S), ROOM_MOST_S)
            text = f"an answer could not be kept in {self.state}: {reply.error.reason}"
            remedy = f"Free space there ({disk.describe_free(self.state)} now): the centre asks again, and the round is not lost."
            self._note("failure", text, remedy, "room", round)
        elif code == DECLINED:
            self._note(
                "refusal",
                text,
                "`trunkline client contracts` shows what was decided, and how.",
                f"order {doing.run}",
                round,
            )
        elif code == PENDING:
            self._note("note", text, "`trunkline client accept` or `refuse` decides.", f"order {doing.run}", round)
        elif code in (CRASHED, REFUSED) and doing.run:  # else the app itself was refused, which was said with its name
            kind: Kind = "refusal" if code == REFUSED else "failure"
            self._note(
                kind, text, "logs/executor.log of the state folder has the whole of it.", f"order {doing.run}", round
            )

    def _note(self, kind: Kind, text: str, remedy: str, about: str, round: int | None = None) -> None:
        self.incidents.note(kind, text, round=round, remedy=remedy, about=about)

    def _over(self, text: str, about: str, round: int | None = None) -> None:
        self.incidents.note("recovery", text, round=round, about=about)

    def _let_out(self, request: Message, reply: Message) -> Message | None:
        """What of `reply` may leave, once it is in the manifest; None: told to end while it could not be written.

        Until then nothing leaves and the centre hears nothing: its deadline decides how long it waits.
        """
        while self.door is not None:
            try:
                passed = self.door.pass_(request, reply)
                self._over("the manifest can be written again; answers leave", "manifest", _round_of(request))
                return passed
            except TrunklineError as error:
                logger.error(
                    "%s Nothing leaves without its line in the manifest. Trying again in %.0f s.", error, HOLD_S
                )
                text = f"an answer is held back, because the manifest takes no line: {error}"
                remedy = "Nothing is lost: it leaves when the manifest can be written."
                self._note("failure", text, remedy, "manifest", _round_of(request))
            if self._stop.wait(HOLD_S):
                return None
        return reply

    def _reply(self, task: NodeTask, kind: str) -> tuple[Message, Message]:
        """The question, without its content where that was not looked at, and the answer to it."""
        if kind != CLIENT_APP:
            logger.error("refused a task of type %s", kind)
            self._note(
                "refusal", f"refused a task of type {kind}", f"This site answers {CLIENT_APP} only.", f"type {kind}"
            )
            refusal = error_reply(task.envelope, f"this site answers {CLIENT_APP} only, not {kind}", REFUSED)
            return task.envelope, refusal
        if task.digest not in self.pins():
            logger.error("refused the app %s: it is not the one installed here; nothing of it was run", task.digest)
            reason = (
                f"the app {task.digest[:16]} is not pinned at this site; nothing of it was run. "
                "Submit the thin app of the Trunkline version that the sites have installed."
            )
            remedy = "Update Trunkline here or at the centre, so that both have the same version."
            text = f"refused the app {task.digest}: it is not the one installed here; nothing of it was run"
            self._note("refusal", text, remedy, f"app {task.digest}", _round_of(task.envelope))
            return task.envelope, error_reply(task.envelope, reason, REFUSED)
        try:
            message = task.pull_message()
        except ContractError as error:
            logger.error("%s", error)
            self._note("refusal", f"refused a message: {error}", "", "message", _round_of(task.envelope))
            return task.envelope, error_reply(task.envelope, str(error), CRASHED)
        self.activity.begin(Task.of(message))
        assert task.context is not None  # pull_input sets it
        began = time.monotonic()
        reply = answer(self.app, message, task.context)
        self._app_s = time.monotonic() - began
        return message, reply

    def _hand_over(self, task: NodeTask, reply: Message) -> None:
        for pause in PUSH_PAUSES_S:
            try:
                task.push(reply)
                return
            except DeploymentError as error:
                logger.warning("%s Trying again in %.1f s.", error, pause)
                time.sleep(pause)
        task.push(reply)

    def _leave(self) -> None:
        """Out of time: answer with an error in place of the work, and end the process around it."""
        if not self._answering.acquire(timeout=1.0):
            return  # the reply is being handed over at this moment; the main thread ends by itself
        if self._current is None:
            self._answering.release()
            return
        task, token, kind, envelope = self._current
        try:
            farewell = error_reply(task.envelope, "the site is shutting down; ask again", RESTARTED)
            task.push(self.door.pass_(task.envelope, farewell) if self.door is not None else farewell)
            self._journal.write(token, kind, envelope, answered=True)
            task.finish(False, "the site is shutting down")
            self._journal.clear()
            logger.info("shut down within a task; the centre was told to ask again")
        except TrunklineError as error:
            logger.warning("shut down within a task, without an answer: %s", error)
        logging.shutdown()
        os._exit(0)  # the work holds the main thread and cannot be interrupted from here


def _keep_alive(task: NodeTask, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        try:
            task.beat()
        except DeploymentError as error:
            if not done.is_set():
                logger.warning("%s", error)


def _round_of(message: Message) -> int | None:
    """The round that the centre gave the message's group."""
    group = message.metadata.group_id
    return int(group) if group.isascii() and group.isdigit() and len(group) < 10 else None


def load_app(reference: str) -> ClientApp:
    """The ClientApp named `module:attribute`, from what is installed here."""
    module, _, attribute = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute or "app")
    except (ImportError, AttributeError) as error:
        raise DeploymentError(
            f"--app {reference}: {error}. Name an installed ClientApp as module:attribute."
        ) from error
    if not isinstance(found, ClientApp):
        raise DeploymentError(f"--app {reference}: is a {type(found).__name__}; expected a ClientApp.")
    return found


def set_threads() -> None:
    """One torch thread unless TRUNKLINE_THREADS says otherwise: equal bytes do not survive another order of sums."""
    import torch

    try:
        threads = int(os.environ.get("TRUNKLINE_THREADS", "1"))
        torch.set_num_threads(threads)
    except (ValueError, RuntimeError):
        raise DeploymentError(
            f"TRUNKLINE_THREADS={os.environ['TRUNKLINE_THREADS']!r}: expected a whole number from 1."
        ) from None


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
        "--folder", type=Path, help="the site's folder: every reply is held to its policy and contracts"
    )
    parser.add_argument("--state", type=Path, help="the site's state, with contracts and manifest")
    parser.add_argument("--centre", default="", help="whom the replies go to, for the manifest")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format=f"%(asctime)s {options.site.replace('%', '%%')} %(levelname)s %(message)s",
    )
    for chatty in ("flwr", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        set_threads()
        own = app_digest(Path(trunkline.__file__).parent / "app")
        client_app = load_app(options.app)
        executor = Executor(
            options.runtime,
            options.secret,
            options.journal,
            client_app,
            lambda: pinned_digests(own, options.pins),
            options.poll,
            Door(options.folder, options.state, options.centre) if options.folder else None,
            options.site,
        )
    except TrunklineError as error:
        logger.error("%s", error)
        sys.exit(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: executor.stop())
    logger.info("ready: %s, pid %d, answers the app %s", options.app, os.getpid(), own[:16])
    executor.run()
    logger.info("ended")


if __name__ == "__main__":
    main()
