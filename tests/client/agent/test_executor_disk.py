"""The worker while its disk takes no journal: a task that was claimed is neither lost nor claimed twice."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from trunkline.client.agent import executor as module
from trunkline.client.agent.executor import Executor, Timing
from trunkline.client.agent.task_journal import TaskJournal
from trunkline.errors import DeploymentError, StorageError
from trunkline.flower.errors import answer
from trunkline.flower.grid import LoopbackGrid
from trunkline.flower.records import to_records
from trunkline.flower.runtime import CLIENT_APP
from trunkline.runtime.incidents import read_incidents
from trunkline.runtime.programs import make_secret

app = ClientApp()


@app.train()
def train(message: Message, context: Any) -> Message:
    return Message(to_records({}, "{}"), reply_to=message)


class SuperNode:
    """One task to claim; what is done with it is written down."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.left = 1

    def acquire(self) -> tuple[str, str] | None:
        self.did.append("acquire")
        self.left -= 1
        return ("token", CLIENT_APP) if self.left >= 0 else None

    def task(self, address: str, token: str) -> "SuperNode":
        self.did.append(f"task {token}")
        grid = LoopbackGrid(app, [{}])
        self.context = grid.contexts[2]
        self.envelope = grid.create_message(to_records({}, "{}"), "train", 2, "7")
        self.envelope.metadata.__dict__["_message_id"] = "m"
        self.digest = "pinned"
        return self

    def pull_input(self) -> None: ...
    def pull_envelope(self) -> dict[str, Any]:
        return {"group_id": "7"}

    def resume(self, fields: dict[str, Any]) -> None: ...
    def beat(self) -> None: ...
    def close(self) -> None: ...
    def pull_message(self) -> Message:
        return self.envelope

    def push(self, reply: Message) -> None:
        self.did.append(f"push {reply.error.code if reply.has_error() else 'answer'}")

    def finish(self, completed: bool, details: str = "") -> None:
        self.did.append("finish")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> SuperNode:
    made = SuperNode()
    monkeypatch.setattr(module, "NodeTask", made.task)
    return made


def worker(tmp_path: Path, node: SuperNode) -> Executor:
    made = Executor(
        "127.0.0.1:9", make_secret(tmp_path / "secret"), tmp_path / "journal.json", app, lambda: {"pinned"},
        timing=Timing(retry_s=0.01),
    )  # fmt: skip
    made._runtime = node  # type: ignore[assignment]
    return made


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Let the n-th write of the journal fail, as a full disk lets it."""
    real, calls = TaskJournal.write, []

    def write(self: TaskJournal, *arguments: Any, **options: Any) -> None:
        calls.append(len(calls))
        if fails(calls[-1]):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise StorageError("journal.json: could not be written.") from error
        real(self, *arguments, **options)

    monkeypatch.setattr(TaskJournal, "write", write)
    return calls


def serve(made: Executor, node: SuperNode, until: str) -> None:
    turns = itertools.count()

    def over(seconds: float = 0.0) -> bool:
        return (until in node.did and node.left < 0) or next(turns) > 50

    made._stop.wait = made._stop.is_set = over  # type: ignore[method-assign, assignment]
    made.run()


DONE = ["push answer", "finish"]


def test_a_task_that_the_journal_does_not_take_is_kept_and_served_when_it_does(
    tmp_path: Path, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda n: n < 3)
    serve(worker(tmp_path, node), node, "finish")
    assert node.did == ["acquire", "task token", *DONE, "acquire"], "claimed once, and served"
    told = [(one["kind"], one["text"]) for one in read_incidents(tmp_path, 10)]
    assert [kind for kind, _ in told] == ["failure", "recovery"] and "its disk is full" in told[0][1]


def test_a_task_whose_envelope_the_journal_does_not_take_is_begun_again(
    tmp_path: Path, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda n: n in (1, 2))
    serve(worker(tmp_path, node), node, "finish")
    assert node.did == ["acquire", "task token", "task token", "task token", *DONE, "acquire"]
    assert not (tmp_path / "journal.json").exists()


def test_an_answer_that_was_handed_over_is_not_answered_again_because_the_disk_is_full(
    tmp_path: Path, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda n: n == 2)
    serve(worker(tmp_path, node), node, "finish")
    assert node.did == ["acquire", "task token", *DONE, "acquire"]


def test_a_task_that_has_expired_meanwhile_is_given_up(
    tmp_path: Path, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> None:
        raise DeploymentError("401: the token has expired")

    made = worker(tmp_path, node)
    made._journal.write("old", CLIENT_APP)
    monkeypatch.setattr(node, "pull_input", gone)
    with pytest.raises(DeploymentError):
        made._step()
    assert not (tmp_path / "journal.json").exists()


def test_while_an_answer_finds_no_room_the_next_task_waits_for_some(
    tmp_path: Path, node: SuperNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.query()
    def full(message: Message, context: Any) -> Message:
        raise OSError(28, "No space left on device")

    grid = LoopbackGrid(app, [{}])
    asked = Message(RecordDict(), 2, "query")
    asked.metadata.__dict__["_message_id"] = "m"
    reply = answer(app, asked, grid.contexts[2])
    assert reply.error.code == 405
    made, free, waited = worker(tmp_path, node), [100], []
    monkeypatch.setattr(module.disk, "free_bytes", lambda folder: free[0])
    for expected in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):
        made._conclude(asked, reply)
        assert made._room_s == expected
    made._stop.wait = lambda seconds: (
        (waited.append(seconds), len(waited) == 3 and free.append(free.pop() + 1))[1] and False
    )  # type: ignore[method-assign, assignment, func-returns-value]
    made._wait_for_room()
    assert len(waited) == 3, "until there was more room, and not the whole minute"
    assert len(read_incidents(tmp_path, 10)) == 1, "said once"
