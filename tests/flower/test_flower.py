"""What crosses the wire opens to what was packed, and anything else is refused by name."""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import threading
import time
import tracemalloc
import types
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.nodestate import NodeStateFactory
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as drawn

import trunkline
from trunkline.errors import ContractError, DataError, StorageError
from trunkline.flower.app_archive import app_bytes, app_digest, fab_digest
from trunkline.flower.errors import error_site, reason_of
from trunkline.flower.grid import LoopbackGrid, stamp
from trunkline.flower.processes import supernode_main, whole_or_nothing
from trunkline.flower.records import HEADER_LIMIT, PACK_SMALL, open_records, pack, to_records
from trunkline.flower.replies import Replies
from trunkline.server.rounds.messaging import ask
from trunkline.server.rounds.superlink import transport_of

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower with pathspec 1.x
DTYPES = st.sampled_from(["float32", "float64", "float16", "int64", "uint8", "bool", ">f4"])
ARRAYS = drawn.arrays(DTYPES, drawn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


WAYS = {"as it is": lambda content: content, "packed": pack}


@pytest.mark.parametrize("way", WAYS)
@given(st.dictionaries(st.text(max_size=20), ARRAYS, max_size=4), st.text(max_size=50), st.booleans())
@settings(deadline=None)
def test_what_is_packed_is_what_is_opened(way: str, arrays: dict[str, Any], header: str, turned: bool) -> None:
    arrays = {name: array.T if turned else array for name, array in arrays.items()}
    found, text, metrics = open_records(WAYS[way](to_records(arrays, header, {"loss": 0.25})))
    assert list(found) == list(arrays) and text == header and metrics == {"loss": 0.25}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
        assert not found[name].flags.writeable


def test_a_large_pack_travels_in_flowers_own_chunks_and_a_small_one_as_one_object() -> None:
    small = pack(to_records({"w": np.ones(10, np.float32)}, "{}"))
    assert set(small) == {"packed"}
    arrays = {"a": np.arange(PACK_SMALL // 8, dtype=np.float32), "b": np.ones((PACK_SMALL // 4,), np.float32)}
    large = pack(to_records(arrays, "{}"))
    assert set(large) == {"packed", "body"}
    found, _, _ = open_records(large)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    other = RecordDict({"x": ConfigRecord({"y": 1})})
    assert pack(other) is other, "what is not ours is left alone"


def head_of(content: RecordDict) -> dict[str, Any]:
    return dict(json.loads(str(content.config_records["packed"]["head"])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head["sizes"].append(["w", 200]), "each name once"),
        (lambda head: head["sizes"].append(["v", 200]), "lists 368"),
        (lambda head: head["sizes"].__setitem__(0, ["w", -1]), "names and sizes"),
        (lambda head: head["sizes"].__setitem__(0, ["w", 10**18]), "lists 1000"),
        (lambda head: head["sizes"].__setitem__(0, ["w", True]), "names and sizes"),
        (lambda head: head["sizes"].__setitem__(0, ["w", 150]), "bytes; 22 came"),
        (lambda head: head["sizes"].__setitem__(0, [1, 168]), "names and sizes"),
        (lambda head: head.pop("json"), "cannot be read"),
        (lambda head: head.update(json=3), "no header"),
        (lambda head: head.update(metrics=[1]), "no header"),
        (lambda head: head.update(metrics={"loss": "x"}), "expected one number"),
        (lambda head: head.update(more=1), "names and sizes"),
    ],
)
def test_a_pack_that_lies_about_itself_is_refused(change: Any, words: str) -> None:
    content = pack(to_records({"w": np.ones(10, np.float32)}, "{}"))
    head = head_of(content)
    change(head)
    content.config_records["packed"]["head"] = json.dumps(head)
    with pytest.raises(ContractError, match=words):
        open_records(content)


@given(st.integers(0, 10**6), st.integers(0, 255))
@settings(deadline=None)
def test_any_byte_of_a_pack_may_be_anything_and_only_a_contract_error_comes_of_it(place: int, byte: int) -> None:
    content = pack(to_records({"w": np.ones(10, np.float32), "v": np.ones((2, 3))}, '{"a": 1}', {"loss": 1.0}))
    record = content.config_records["packed"]
    body, head = bytearray(record["body"]), bytearray(str(record["head"]).encode())
    if place % 2:
        body[place // 2 % len(body)] = byte
    else:
        head[place // 2 % len(head)] = byte % 128
    record["body"], record["head"] = bytes(body), head.decode()
    with contextlib.suppress(ContractError):
        open_records(content)


@given(ARRAYS, st.booleans())
@settings(deadline=None)
def test_the_bytes_of_an_array_are_those_that_numpy_and_flower_write(array: np.ndarray, turned: bool) -> None:
    array = array.T if turned else array
    packed = to_records({"w": array}, "{}").array_records["arrays"]["w"]
    stream = io.BytesIO()
    np.save(stream, array)
    assert packed.data == stream.getvalue()
    assert packed == Array(array)


def test_an_opened_message_is_freed_as_soon_as_nobody_uses_it() -> None:
    gc.disable()
    try:
        content = to_records({"w": np.zeros(3)}, "{}")
        open_records(content)
        left = weakref.ref(content)
        del content
        assert left() is None
    finally:
        gc.enable()


def claimed(
    data: bytes, shape: tuple[int, ...] = (2,), dtype: str = "float32", stype: str = "numpy.ndarray"
) -> RecordDict:
    content = to_records({}, "{}")
    content["arrays"] = ArrayRecord({"w": Array(dtype, shape, stype, data)})
    return content


def npy(array: Any, **change: Any) -> bytes:
    """A numpy file whose header says something else than its body."""
    stream = io.BytesIO()
    head = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **change}
    np.lib.format.write_array_header_1_0(stream, head)
    return stream.getvalue() + array.tobytes()


PAIR = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (RecordDict(), "expected exactly"),
        (RecordDict({**to_records({}, "{}"), "more": MetricRecord()}), "more: MetricRecord"),
        (RecordDict({**to_records({}, "{}"), "arrays": ConfigRecord()}), "arrays: ConfigRecord"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": b"{}"})}), "json: bytes"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": "", "x": 1})}), "x: int"),
        (RecordDict({**to_records({}, "{}"), "header": ConfigRecord({"json": " " * (HEADER_LIMIT + 1)})}), "header"),
        (RecordDict({**to_records({}, "{}"), "metrics": MetricRecord({"a": [1.0, 2.0]})}), "`a` is a list"),
        (claimed(npy(PAIR), stype="pickle"), "serialised as 'pickle'"),
        (claimed(b"not numpy"), "does not begin like a numpy array"),
        (claimed(b""), "does not begin like a numpy array"),
        (claimed(npy(PAIR, descr="|O"), dtype="object"), "only plain numbers"),
        (claimed(npy(PAIR, descr="<M8[s]"), dtype="datetime64[s]"), "only plain numbers"),
        (claimed(npy(PAIR), shape=(3,)), "must agree"),
        (claimed(npy(PAIR), dtype="float64"), "must agree"),
        (claimed(npy(PAIR, shape=(3,)), shape=(3,)), "12 bytes; 8 came"),
        (claimed(npy(PAIR, shape=(10**9, 10**9)), shape=(10**9, 10**9)), "8 came"),
        (claimed(npy(PAIR, shape=(2**62, 4)), shape=(2**62, 4)), "8 came"),
        (claimed(npy(PAIR, shape=(-1, -2)), shape=(-1, -2)), "8 came"),
        (claimed(npy(PAIR) + b"tail"), "12 came"),
    ],
)
def test_anything_else_is_refused_by_name_and_allocates_nothing(content: RecordDict, named: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ContractError) as caught:
            open_records(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert named in str(caught.value)
    assert peak < 4 * HEADER_LIMIT


def test_what_would_be_refused_is_not_sent() -> None:
    with pytest.raises(ContractError, match="`w` has dtype object"):
        to_records({"w": np.array([None])}, "{}")
    with pytest.raises(ContractError, match="header"):
        to_records({}, " " * (HEADER_LIMIT + 1))


def test_a_site_that_raises_costs_one_error_reply_and_its_data_stays_home() -> None:
    app = ClientApp()

    @app.train()
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["site"] == "a":
            raise ValueError("could not convert string to float: '73.1 bar'")
        return Message(to_records({}, "{}"), reply_to=message)

    grid = LoopbackGrid(app, [{"site": "a"}, {"site": "b"}])
    ids = grid.push_messages([Message(to_records({}, "{}"), node, "train") for node in grid.get_node_ids()])
    bad, good = grid.pull_messages(ids)
    assert error_site(good) is None
    failed = error_site(bad)
    assert failed is not None and failed[0] == ids[0] and "ValueError" in failed[2] and "73.1" not in failed[2]
    assert grid.pull_messages(ids) == [], "each reply is handed out once"


def test_only_texts_about_the_exchange_leave_a_site_and_without_folders() -> None:
    assert reason_of(StorageError("/srv/plant/vault/r1.st: disk full")) == "StorageError: r1.st: disk full"
    assert "12.5" not in reason_of(DataError("press.csv line 3: found 12.5"))


def test_a_pin_follows_the_content_and_not_how_it_is_packed(tmp_path: Path) -> None:
    packed = app_bytes(Path(trunkline.__file__).parent / "app")
    again = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed)) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert again.getvalue() != packed and fab_digest(again.getvalue()) == fab_digest(packed)
    assert fab_digest(packed) == app_digest(Path(trunkline.__file__).parent / "app")

    (tmp_path / "pyproject.toml").write_bytes((Path(trunkline.__file__).parent / "app" / "pyproject.toml").read_bytes())
    assert app_digest(tmp_path) == fab_digest(packed)
    (tmp_path / "extra.py").write_text("")
    assert app_digest(tmp_path) != fab_digest(packed), "one more file, even an empty one, is another app"


@pytest.mark.parametrize("made", [b"", b"PK\x03\x04 cut short", b"\x00" * 100])
def test_what_is_no_archive_has_a_digest_nobody_pins(made: bytes) -> None:
    assert len(fab_digest(made)) == 64 and fab_digest(made) != fab_digest(made + b"x")


def test_an_archive_that_unpacks_to_too_much_is_hashed_without_unpacking_it() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", b"\x00" * (64 << 20))
    tracemalloc.start()
    try:
        fab_digest(stream.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_the_thin_app_ships_no_code_and_lets_a_run_be_named() -> None:
    import tomllib

    folder = Path(trunkline.__file__).parent / "app"
    assert [path.name for path in folder.iterdir()] == ["pyproject.toml"]
    app = tomllib.loads((folder / "pyproject.toml").read_text())
    assert app["project"]["dependencies"] == []
    assert set(app["tool"]["flwr"]["app"]["config"]) == {"run-toml", "out", "resume", "state"}
    assert json.loads(json.dumps(app["tool"]["flwr"]["app"]["components"])) == {
        "serverapp": "trunkline.server.app:app",
        "clientapp": "trunkline.client.app:app",
    }


class Link:
    """The SuperLink's side of a grid: replies with the objects of theirs that have come so far.

    Args:
        replies: id of a question -> its reply. What is in `here` is there; what is in `lost` never comes any more.
    """

    node = Node(node_id=1)

    def __init__(self, replies: dict[str, Message]) -> None:
        self.replies, self.asked, self.confirmed = replies, [], []  # type: ignore[var-annotated]
        self.contents = {
            asked: {one: obj.deflate() for one, obj in get_all_nested_objects(reply).items()}
            for asked, reply in replies.items()
        }
        self.here = {one for objects in self.contents.values() for one in objects}
        self.lost: set[str] = set()
        self._runtime_client, self.run = self, types.SimpleNamespace(run_id=1)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802 - Flower's names
        self.asked += list(request.message_ids)
        found = [self.replies[one] for one in request.message_ids if one in self.replies]
        protos = [message_to_proto(remove_content_from_message(one)) for one in found]
        return types.SimpleNamespace(messages_list=protos, message_object_trees=[get_object_tree(one) for one in found])

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        every = {one: data for objects in self.contents.values() for one, data in objects.items()}
        there = request.object_id in self.here
        content = every[request.object_id] if there else b""
        known = request.object_id not in self.lost
        return types.SimpleNamespace(object_found=known, object_available=there, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def replied(value: float, asked: str, node: int) -> Message:
    LoopbackGrid(ClientApp(), [{}])  # Flower's task identity
    question = Message(to_records({}, "{}"), node, "train")
    stamp(question, asked)
    reply = Message(pack(to_records({"w": np.full(3, value, np.float32)}, "{}")), reply_to=question)
    stamp(reply, reply.object_id)
    return reply


def test_a_reply_that_is_half_there_holds_nobody_up() -> None:
    link = Link({"q1": replied(1.0, "q1", 2), "q2": replied(2.0, "q2", 3), "q3": replied(3.0, "q3", 4)})
    replies = Replies(link)
    own = {
        one: set(objects) - set(link.contents["q1" if one != "q1" else "q2"]) for one, objects in link.contents.items()
    }
    late = next(iter(own["q1"] - {link.replies["q1"].object_id}))
    gone = next(iter(own["q3"] - {link.replies["q3"].object_id}))
    link.here -= {late, gone}

    def values(found: Any) -> dict[str, Any]:
        return {
            one.metadata.reply_to_message_id: one.error.code
            if one.has_error()
            else open_records(one.content)[0]["w"][0]
            for one in found
        }

    began = time.monotonic()
    assert values(replies.pull(["q1", "q2", "q3"])) == {"q2": 2.0}, "who is whole is not held up"
    assert values(replies.pull(["q1", "q3"])) == {}
    assert time.monotonic() - began < 2.0
    link.here.add(late)
    link.lost.add(gone)
    assert values(replies.pull(["q1", "q3"])) == {"q1": 1.0, "q3": 3}, (
        "3: its objects never came, so the site is asked again"
    )
    assert link.asked == ["q1", "q2", "q3"], "a SuperLink tells of each reply once"
    assert link.confirmed == [link.replies[one].metadata.message_id for one in ("q2", "q1")]


def test_a_message_whose_run_ended_while_it_came_leaves_nothing_that_holds_the_next_one_up() -> None:
    """Found by a drill: the worker took the task that was left and asked for its content for hours."""
    store = ObjectStoreFactory().store()
    state = NodeStateFactory(ObjectStoreFactory()).state()
    state.set_node_id(2)
    state.store_run(types.SimpleNamespace(run_id=1, primary_task_type=TaskType.SERVER_APP, fab_hash="f"))  # type: ignore[arg-type]
    LoopbackGrid(ClientApp(), [{}])  # Flower's task identity
    question = Message(to_records({"w": np.ones(3, np.float32)}, "{}"), 2, "train")
    question.metadata.__dict__["_run_id"] = 1
    stamp(question, question.object_id)
    ended: list[bool] = [True]

    def content(run: int, name: str) -> bytes:
        if ended:
            raise RunNotRunningException
        return get_all_nested_objects(question)[name].deflate()

    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")

    def pull() -> int | None:
        return whole_or_nothing(loop._pull_and_store_message)(
            state=state, object_store=store, node_config={}, get_run=None, get_fab=None, trusted_entities=None,
            receive=lambda: (remove_content_from_message(question), get_object_tree(question)),
            pull_object=content, confirm_message_received=lambda run, name: None,
        )  # fmt: skip

    assert pull() is None
    assert [task.status.status for task in state.get_tasks()] == ["finished"]
    assert not state.get_messages_legacy(), "an envelope without content would be given to the next task"
    ended.clear()
    assert pull() == 1, "and the same message, asked again, comes whole"
    (waiting,) = state.get_tasks(statuses=["pending"])
    assert waiting.run_id == 1
    assert [one.metadata.message_id for one in state.get_messages_legacy()] == [question.metadata.message_id]


def test_a_supernode_that_gives_its_connection_up_ends_whatever_thread_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found by a drill: with a clock that was an hour back for a moment, a process was left that did nothing for ever."""
    import flwr.supernode.cli as cli

    processes = multiprocessing.get_context("fork")  # Flower is imported here; a new process would import it again
    gave_up = processes.Event()

    def give_up() -> None:
        threading.Thread(target=time.sleep, args=(60,)).start()
        gave_up.set()

    monkeypatch.setattr(cli, "flower_supernode", give_up)
    supernode = processes.Process(target=supernode_main)
    supernode.start()
    supernode.join(10.0)
    exit_code = supernode.exitcode
    supernode.kill()
    assert gave_up.is_set() and exit_code == 1


def test_a_superlink_that_comes_back_in_the_middle_of_a_message_is_sent_it_again() -> None:
    """Found by a drill: Flower's own error for it ended the run."""
    link: Any = Link({"q1": replied(1.0, "q1", 2)})
    left = [ObjectPushError("o", 1, "s")]

    def push(messages: Any) -> list[str]:
        if left:
            raise left.pop()
        return ["q1"]

    link.get_node_ids, link.push_messages = lambda: [2], push
    asked = ask(transport_of(link), "train", {2: lambda: to_records({}, "{}")}, round=1, deadline_s=10.0, resend_s=0.1)
    (answer,) = asked
    assert answer.content is not None and answer.tries == 2 and "push session" in answer.lost
