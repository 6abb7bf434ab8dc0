"""Everything that leans on a private name of Flower, in one file.

Flower's public surface is its command lines, `flwr.app`, `flwr.serverapp` and `flwr.clientapp`. What Trunkline needs
beyond them (a grid without a SuperLink, a resident executor, submitting a run, a SuperNode that polls sooner) is
reached through names that Flower may change in any release: all of them are here, and tests/flower/test_flower_canary.py says
which one moved.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import re
import ssl
import sys
import time
import types
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from numpy.typing import NDArray

from trunkline.errors import Away, ContractError, Declined, DeploymentError, Pending, StorageError
from trunkline.runtime.disk import want_of_room

EXPECTED = "1.41"  # the minor version whose private names are used below; peers must match it too
try:
    from flwr.app.message import make_message
    from flwr.app.metadata import Metadata
    from flwr.cli.build import build_fab_from_files
    from flwr.common.constant import ErrorCode, SubStatus
    from flwr.common.serde import context_from_proto, fab_to_proto, message_from_proto, user_config_to_proto
    from flwr.proto.control_pb2 import (
        ListNodesRequest,
        ListRunsRequest,
        RegisterNodeRequest,
        StartRunRequest,
        StopRunRequest,
        UnregisterNodeRequest,
    )
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest, UnregisterNodeFleetRequest
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import (
        AcquireTaskRequest,
        PullAppMessagesRequest,
        PullTaskInputRequest,
        PushTaskOutputRequest,
        SendTaskHeartbeatRequest,
    )
    from flwr.supercore.auth import load_superexec_auth_secret
    from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE, TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_protobuf_utils import (
        make_confirm_message_received_fn_protobuf,
        make_pull_object_fn_protobuf,
    )
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPullError,
        ObjectPushError,
        ObjectUnavailableError,
        inflate_object_from_contents,
        pull_and_inflate_object_from_tree,
    )
    from flwr.supercore.interceptors import (
        RuntimeTokenHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        SuperExecAuthHttpInterceptor,
    )
    from flwr.supercore.run import Run, RunNotRunningException
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.runtime.run_clientapp import push_message
except ImportError as _error:
    raise ImportError(
        f"Flower {version('flwr')} is installed and trunkline/flower/records.py was written for {EXPECTED}: {_error}. "
        f"Install flwr=={EXPECTED}.*, or mend that file and tests/flower/test_flower_canary.py."
    ) from _error

HEADER_LIMIT = 1 << 20  # bytes of JSON: a contract of 4,000 arrays is about 400 kB
CENTRE = 1  # Flower's node id of the server side
# error codes: Flower's own for an exception, and ours above its range. PENDING: a person at the plant has not decided yet;
# DECLINED: its policy or a person there says no. The reason of these two is `SITE: why`. FULL: its disk took no answer
CRASHED, REFUSED, RESTARTED, PENDING, DECLINED = 2, 400, 401, 402, 403
AWAY = 404  # outside the plant's hours, or paused there: `SITE: why, until when`
FULL = 405
ERROR_LIMIT = 1000  # characters of an error's text that leave a site
FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:;,()'\"`]*[/\\]")  # all of a path but its last name
IDLE_POLL_S, FAST_POLL_S, FAST_FOR_S = 3.0, 0.2, 60.0  # one poll costs the SuperLink about 11 ms of a core
APP_LIMIT = 1 << 20  # bytes an app may unpack to while it is hashed; the thin app has about 1 kB
PACK_SMALL = 4 << 20  # bytes up to which arrays travel as one object; Flower's own chunks have 5 MiB
ALIGNED = 64  # bytes: where arrays begin in a pack, as numpy's file format has its own data
Scalar = str | int | float
# what a grid raises once its SuperLink has forgotten the run, or is another; one that is only away is waited for inside
LINK_LOST = (httpx.HTTPError, RunNotRunningException)
PUSH_LOST = ObjectPushError  # what it raises when a SuperLink came back in the middle of a message that was sent to it

logger = logging.getLogger(__name__)


def to_records(arrays: Mapping[str, NDArray[Any]], header: str, metrics: Mapping[str, float] = {}) -> RecordDict:
    """Arrays, a JSON header and numbers as the one shape of message content that `open_records` takes.

    Order of names, dtype, shape and bytes of the arrays survive the wire. One content may be in many messages.

    Raises:
        ContractError: an array holds no plain numbers, or the header is longer than the other end would read.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ContractError(f"`{name}` has dtype {array.dtype}; only plain numbers travel. Convert it first.")
    if (size := len(header.encode())) > HEADER_LIMIT:
        raise ContractError(f"the header has {size} bytes; at most {HEADER_LIMIT} are read. Lend fewer arrays.")
    return RecordDict(
        {
            "arrays": ArrayRecord({name: _wrap_array(np.asarray(array)) for name, array in arrays.items()}),
            "header": ConfigRecord({"json": header}),
            "metrics": MetricRecord({name: float(value) for name, value in metrics.items()}),
        }
    )


def _wrap_array(array: NDArray[Any]) -> Array:
    """Flower's Array with the bytes `np.save` writes, made by one copy instead of its three."""
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = np.ascontiguousarray(array)
    dtype = array.dtype.str  # plain numbers only, see `to_records`
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    body = array.T if fortran else array
    data = b"".join((_npy_header(dtype, fortran, array.shape), body.reshape(-1).view(np.uint8).data))
    return Array(str(array.dtype), tuple(array.shape), "numpy.ndarray", data)


@lru_cache(maxsize=4096)
def _npy_header(dtype: str, fortran: bool, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


def open_records(content: RecordDict) -> tuple[dict[str, NDArray[Any]], str, dict[str, float]]:
    """Arrays, header and metrics of a message that anybody may have written.

    The arrays are read-only views of the received bytes. No pickle is read, and nothing larger than what was received
    is ever allocated: a claimed shape is compared with the bytes that came before an array is made of them.

    What `pack` made of it is opened likewise.

    Raises:
        ContractError: the content is anything but what `to_records` makes; the text names what was found.
    """
    if "packed" in content:
        return _open_packed(content)
    found = {name: type(record).__name__ for name, record in content.items()}
    expected = {"arrays": "ArrayRecord", "header": "ConfigRecord", "metrics": "MetricRecord"}
    if found != expected:
        raise ContractError(f"a message holds the records {_listing(found)}; expected exactly {_listing(expected)}")
    # not by `content.array_records` and its like: those views refer back to the content, and such a ring keeps a whole trunk
    # in memory until Python next looks for rings
    records: dict[str, Any] = dict(content.items())
    header: ConfigRecord = records["header"]
    text = header.get("json")
    if set(header) != {"json"} or not isinstance(text, str):
        inside = _listing({key: type(value).__name__ for key, value in header.items()})
        raise ContractError(f"the header record holds {inside}; expected {{json: str}}")
    arrays = {name: _open_wrapped(name, array) for name, array in records["arrays"].items()}
    return arrays, _header(text), _metrics(records["metrics"])


def _header(text: str) -> str:
    if len(text) > HEADER_LIMIT or len(text.encode(errors="replace")) > HEADER_LIMIT:
        raise ContractError(f"the header has more than {HEADER_LIMIT} bytes; no run of Trunkline needs so many")
    return text


def _metrics(told: Mapping[str, Any]) -> dict[str, float]:
    for name, value in told.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ContractError(f"metric `{name[:256]}` is a {type(value).__name__}; expected one number")
    return {name: float(value) for name, value in told.items()}


def pack(content: RecordDict) -> RecordDict:
    """The same content in as few of Flower's objects as it fits in, for the way through a SuperLink.

    Flower moves a message object by object, each array being two, and every one costs a signed call (about 11 ms of the
    SuperLink's core) and a second one at the plant: a trunk of 30 arrays and four plants made a round of 9 s. What is no
    content of `to_records` is left as it is.
    """
    if set(content) != {"arrays", "header", "metrics"}:
        return content
    records: dict[str, Any] = dict(content.items())
    arrays = {name: array.data for name, array in records["arrays"].items()}
    sizes = [[name, len(data)] for name, data in arrays.items()]
    head = {"sizes": sizes, "json": records["header"].get("json"), "metrics": dict(records["metrics"].items())}
    body = b"".join(part for data in arrays.values() for part in (data, b"\0" * (-len(data) % ALIGNED)))
    small = len(body) <= PACK_SMALL
    made: dict[str, Any] = {"packed": ConfigRecord({"head": json.dumps(head), **({"body": body} if small else {})})}
    if not small:  # in an array Flower cuts it into chunks by itself
        made["body"] = ArrayRecord({"body": _wrap_array(np.frombuffer(body, np.uint8))})
    return RecordDict(made)


def _open_packed(content: RecordDict) -> tuple[dict[str, NDArray[Any]], str, dict[str, float]]:
    """Content of `pack`; nothing in it is believed that does not agree with the bytes that came."""
    records: dict[str, Any] = dict(content.items())
    packed, beside = records.pop("packed"), records.pop("body", None)
    right = isinstance(packed, ConfigRecord) and isinstance(packed.get("head"), str) and not records
    body: Any = packed.get("body", b"") if right else b""
    if right and beside is not None:
        right = isinstance(beside, ArrayRecord) and set(beside) == {"body"} and "body" not in packed
        body = _open_wrapped("body", beside["body"]) if right else b""
        right = right and body.dtype == np.uint8 and body.ndim == 1
    if not right or set(packed) - {"head", "body"} or not isinstance(body, bytes | np.ndarray):
        raise ContractError("a packed message holds other records than `pack` makes")
    if len(packed["head"]) > 2 * HEADER_LIMIT:
        raise ContractError(f"a packed message's head has more than {2 * HEADER_LIMIT} characters")
    try:
        head = json.loads(packed["head"])
        sizes, text, metrics = head["sizes"], head["json"], head["metrics"]
        names = [name for name, size in sizes if isinstance(name, str) and type(size) is int and size >= 0]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ContractError("a packed message's head cannot be read") from None
    if len(names) != len(sizes) or len(set(names)) != len(names) or len(head) != 3:
        raise ContractError("a packed message's head does not list names and sizes, each name once")
    if not isinstance(text, str) or not isinstance(metrics, dict):
        raise ContractError("a packed message's head holds no header and metrics")
    if sum(size + -size % ALIGNED for _, size in sizes) != len(body):
        raise ContractError(
            f"a packed message lists {sum(size for _, size in sizes)} bytes of arrays; {len(body)} came"
        )
    whole: memoryview = memoryview(body)  # type: ignore[arg-type]
    at, arrays = 0, {}
    for name, size in sizes:
        arrays[name] = _open_array(f"`{name[:256]}`", whole[at : at + size])
        at += size + -size % ALIGNED
    return arrays, _header(text), _metrics(metrics)


def _listing(found: Mapping[str, str]) -> str:
    shown = ", ".join(f"{name[:64]}: {kind}" for name, kind in list(found.items())[:8])
    return f"{{{shown}{', ...' if len(found) > 8 else ''}}}"


def _open_wrapped(name: str, wrapped: Array) -> NDArray[Any]:
    """One array of the wire, whose outside must say what its inside says."""
    label = f"`{name[:256]}`"
    if wrapped.stype != "numpy.ndarray":
        raise ContractError(f"{label} is serialised as {wrapped.stype[:64]!r}; expected 'numpy.ndarray'")
    array = _open_array(label, memoryview(wrapped.data))
    if wrapped.dtype != str(array.dtype) or tuple(wrapped.shape) != array.shape:
        outside = f"{wrapped.dtype[:32]} {tuple(wrapped.shape)}"
        raise ContractError(
            f"{label} claims {outside} outside and {array.dtype} {array.shape} inside; the two must agree"
        )
    return array


def _open_array(label: str, data: memoryview) -> NDArray[Any]:
    """numpy's own file format, its header read and believed only where the bytes agree."""
    start = 10 + int.from_bytes(data[8:10], "little")  # magic, version and length of the header, then itself
    try:
        shape, fortran, dtype = _read_npy_header(bytes(data[:start]))  # kept by the cache, so not as a view
    except Exception as error:  # whatever a parser makes of bytes that anybody may have written; it has many kinds
        raise ContractError(f"{label} does not begin like a numpy array ({type(error).__name__})") from None
    if dtype.kind not in "biuf":
        raise ContractError(f"{label} has dtype {dtype}; only plain numbers travel")
    body = data[start:]
    size = dtype.itemsize
    for length in shape:  # Python integers: a product of claimed lengths cannot overflow
        size *= length
    if any(length < 0 for length in shape) or size != len(body):
        raise ContractError(f"{label} claims shape {shape} of {dtype}, {size} bytes; {len(body)} came")
    array: NDArray[Any] = np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return array


# a round brings the same few headers from every site, and parsing one costs as much as copying 1 MB; 512, because a
# hostile site can make each of them 64 kB long
@lru_cache(maxsize=512)
def _read_npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    stream = io.BytesIO(head)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not format 1.0")
    # the header is a Python literal of bounded length: parsed by ast.literal_eval, never evaluated
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, fortran, dtype


class LocalGrid(Grid):
    """A Flower Grid without a SuperLink: what the in-process and the Ray grid share.

    Flower's process-global task identity is set at construction, so a process holds one such grid at a time.

    Args:
        node_configs: one mapping a site, what `--node-config` is in deployment. Node ids count up from 2 in this order.
        run_config: what `[tool.flwr.app.config]` and its overrides are in deployment.
    """

    complete = True  # no node will join later, so nobody need wait for one
    waits = False  # whether `pull_messages` itself waits a moment for the first reply, so that who polls need not sleep

    def __init__(
        self,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        run_id: int = 1,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, CENTRE
        self.contexts: dict[int, Context] = {
            node: Context(run_id, node, dict(config), RecordDict(), dict(run_config or {}))
            for node, config in enumerate(node_configs, start=CENTRE + 1)
        }
        self._run = Run.create_empty(run_id)
        self._numbers = itertools.count(1)

    @abstractmethod
    def _dispatch(self, message: Message, context: Context) -> None:
        """Start the work that answers `message`; may do it all before returning."""

    @abstractmethod
    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        """Replies that are there among those to `message_ids`, each handed out once; a few at a time where they are many."""

    def room(self) -> bool:
        """Whether it is time to push more: what is pushed beyond this only lies in memory. A push is never refused."""
        return True

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send `messages`, each taken when the one before is on its way; the ids in the same order are what `pull_messages` takes."""
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.contexts:
                known = f"{CENTRE + 1} to {CENTRE + len(self.contexts)}"
                raise ContractError(f"a message is addressed to node {node}; this grid has nodes {known}")
            stamp(message, f"{message.metadata.run_id}-{next(self._numbers)}")
            self._dispatch(message, self.contexts[node])
            ids.append(message.metadata.message_id)
            del message  # before the next is made: each may hold a trunk
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        # a view of a dict's keys is taken as it is: at 10^5 sites, a copy for every few replies would cost more than they
        return self._collect(message_ids if isinstance(message_ids, AbstractSet) else set(message_ids))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then collect until all have answered or `timeout` seconds have passed; the late are left out."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            came = self.pull_messages(waiting)
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if not waiting or (end is not None and time.monotonic() >= end):
                break
            time.sleep(0.02)
        return replies


class LoopbackGrid(LocalGrid):
    """Calls the ClientApp in this process while a message is pushed: the tests' network, and the others' reference."""

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Mapping[str, Scalar]],
        run_config: Mapping[str, Scalar] | None = None,
        run_id: int = 1,
    ) -> None:
        super().__init__(node_configs, run_config, run_id)
        self._app = client_app
        self._answers: dict[str, Message] = {}

    def _dispatch(self, message: Message, context: Context) -> None:
        self._answers[message.metadata.message_id] = answer(self._app, message, context)

    def _collect(self, message_ids: AbstractSet[str]) -> list[Message]:
        return [self._answers.pop(one) for one in list(self._answers) if one in message_ids]

    def room(self) -> bool:
        return not self._answers


def stamp(message: Message, message_id: str) -> None:
    """Give a message the id that its reply will name; Flower itself writes it this way, there is no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def message_of(metadata: Any, content: RecordDict) -> Message:
    """A message again, from the two halves it was sent in."""
    return make_message(metadata=metadata, content=content)


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """The ClientApp's reply to `message`; whatever goes wrong becomes an error reply, and is logged here in full."""
    try:
        reply = client_app(message=message, context=context)
        if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise ContractError("the ClientApp returned something that is not a reply to the message it was given")
        return reply
    except (Pending, Declined, Away) as error:
        logger.info("node %d: %s", context.node_id, error)
        code = PENDING if isinstance(error, Pending) else DECLINED if isinstance(error, Declined) else AWAY
        return error_reply(message, safe_text(str(error)), code)
    except Exception as error:
        if why := want_of_room(error):
            logger.error("node %d: %s", context.node_id, error)
            return error_reply(message, f"{why}; ask again", FULL)
        logger.exception("node %d: the ClientApp failed on %s", context.node_id, message.metadata.message_type)
        return error_reply(message, reason_of(error))


def error_reply(message: Message, reason: str, code: int = CRASHED) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)


def reason_of(error: BaseException) -> str:
    """What the centre may read of a site's exception.

    The text of an arbitrary exception can quote a cell of the plant's data or a folder of its disk. Only texts about
    the exchange itself travel, with folders cut off; of all others the class name does, and the site's log has more.
    """
    kind = type(error).__name__
    if isinstance(error, ContractError | StorageError):
        return safe_text(f"{kind}: {error}")
    return f"{kind}: the site's own log has the text; it does not leave the site because it may quote data"


def safe_text(text: str) -> str:
    """`text` as it may leave a site: without folders, and bounded."""
    return FOLDERS.sub("", text)[:ERROR_LIMIT]


def error_site(message: Message) -> tuple[str, int, str] | None:
    """Of an error reply: id of the message it answers, Flower's or our code, reason; None for any other message.

    An error that the SuperLink makes itself (a node went away) has the centre as its source, so the request's id is the
    only way back to the site that was asked.
    """
    if not message.has_error():
        return None
    return message.metadata.reply_to_message_id, message.error.code, (message.error.reason or "")[:ERROR_LIMIT]


def app_bytes(app_folder: Path) -> bytes:
    """The FAB (Flower's app archive) of a folder: a zip with fixed dates and sorted names."""
    files = {
        path.relative_to(app_folder).as_posix(): path.read_bytes()
        for path in sorted(app_folder.rglob("*"))
        if path.is_file()
    }
    try:
        return build_fab_from_files(files)[0]
    except ValueError as error:
        raise DeploymentError(f"{app_folder}: not a Flower app: {error}") from None


def app_digest(app_folder: Path) -> str:
    """What a plant pins of an app: see `fab_digest`."""
    return fab_digest(app_bytes(app_folder))


def fab_digest(fab: bytes) -> str:
    """sha256 over the names and bytes in an app archive, in their order; nothing is written or imported.

    Not over the archive itself: two builds of zlib pack the same file into different bytes, and a centre on another
    Linux would then be refused by every plant. What is no archive, or unpacks to more than 1 MiB, has the digest of its
    raw bytes, which no folder's pin can equal.
    """
    total = hashlib.sha256()
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > APP_LIMIT:
                raise ValueError("unpacks to too much")
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    content = file.read(APP_LIMIT + 1)  # the claimed size is the sender's word, so it is not relied on
                if len(content) > APP_LIMIT:
                    raise ValueError("unpacks to too much")
                name = entry.filename.encode()
                total.update(b"%d:%b%d:" % (len(name), name, len(content)) + content)
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, RuntimeError, EOFError, OSError):
        return hashlib.sha256(b"raw:" + fab).hexdigest()
    return total.hexdigest()


@dataclass
class _Begun:
    """A reply that is on its way: its id, what of it has come, and what has not."""

    message_id: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class Replies:
    """What comes back through a SuperLink, without waiting for what is still being sent.

    Flower's own `pull_messages` stays inside until the last object of every reply it has seen is there: a site that stops in
    the middle of its upload, or is shut out there, would hold everybody's round for minutes. Here such a reply is left
    for the next look, and what of it has come is kept.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._begun: dict[str, _Begun] = {}  # by the id of the question

    def pull(self, message_ids: Sequence[str], at_once: int = 16) -> Iterator[Message]:
        """The replies to `message_ids` that are whole by now, each once; a few at a time, as each may hold a trunk.

        What had begun of a reply to any other id is let go.
        """
        client, node, run = self._grid._runtime_client, self._grid.node, self._grid.run.run_id
        pull = make_pull_object_fn_protobuf(client.PullObject, node, run)
        self._begun = {asked: one for asked, one in self._begun.items() if asked in set(message_ids)}
        new = [asked for asked in message_ids if asked not in self._begun]
        for start in range(0, max(1, len(new)), at_once):  # once also where there is nothing new to ask for
            if ids := new[start : start + at_once]:
                found = client.PullMessages(PullAppMessagesRequest(message_ids=ids))
                for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                    objects = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
                    asked = proto.metadata.reply_to_message_id
                    self._begun[asked] = _Begun(proto.metadata.message_id, objects)
            for asked, one in list(self._begun.items()):
                try:
                    if not self._fetch(one, pull):
                        continue
                    client.ConfirmMessageReceived(
                        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=one.message_id)
                    )
                    message = cast(Message, inflate_object_from_contents(one.message_id, one.contents))
                except ObjectPullError as error:  # it will never be whole: the site is asked again
                    message = _lost(asked, run, node.node_id, str(error))
                else:
                    stamp(message, one.message_id)
                del self._begun[asked]
                yield message
                del message  # it may hold a trunk

    @staticmethod
    def _fetch(one: _Begun, pull: Callable[[str], bytes]) -> bool:
        """Fetch what is there of a reply; whether it is whole."""

        def attempt(name: str) -> None:
            with contextlib.suppress(ObjectUnavailableError):
                one.contents[name] = pull(name)

        with ThreadPoolExecutor(2) as pool:  # as many as Flower itself fetches at once
            list(pool.map(attempt, one.missing))
        one.missing = [name for name in one.missing if name not in one.contents]
        return not one.missing


def _lost(asked: str, run: int, node: int, why: str) -> Message:
    """The error that Flower's own grid makes of a reply whose objects never came."""
    metadata = Metadata(
        run_id=run, message_id="", src_node_id=node, dst_node_id=node, reply_to_message_id=asked, group_id="",
        created_at=time.time(), ttl=0, message_type=SYSTEM_MESSAGE_TYPE,
    )  # fmt: skip
    return make_message(metadata=metadata, error=Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason=why))


@contextlib.contextmanager
def _answers(address: str, what: str, remedy: str) -> Iterator[None]:
    """Every way in which a call over HTTP can fail, as one DeploymentError."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:300].strip()
        raise DeploymentError(
            f"{address}: {what} was refused ({error.response.status_code}: {text}). {remedy}"
        ) from error
    except (httpx.HTTPError, ValueError, OSError) as error:
        raise DeploymentError(f"{address}: {what} failed ({type(error).__name__}: {error}). {remedy}") from error


Answer = TypeVar("Answer")


def _control(address: str, ca: bytes | None, what: str, call: Callable[[ControlHttpClient], Answer]) -> Answer:
    remedy = "Is the server running there? `trunkline server status` tells."
    with _answers(address, what, remedy), contextlib.closing(_control_client(address, ca)) as client:
        return call(client)


def _control_client(address: str, ca: bytes | None) -> ControlHttpClient:
    return ControlHttpClient.from_server_address(address, ca is None, ca, interceptors=[])


def submit(address: str, app_folder: Path, overrides: Mapping[str, Scalar], *, ca: bytes | None = None) -> int:
    """Start a run of the app in `app_folder` on the SuperLink at `address` (host:port); its run id.

    Args:
        overrides: values for keys that the app's own `[tool.flwr.app.config]` has; the SuperLink refuses others.
        ca: the certificate authority in PEM, for a server with TLS.

    Raises:
        DeploymentError: no SuperLink answers, or it refuses the run.
    """
    fab = app_bytes(app_folder)
    request = StartRunRequest(
        fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
        override_config=user_config_to_proto(dict(overrides)),
        federation="",
    )
    response = _control(address, ca, "submitting the run", lambda client: client.StartRun(request))
    if not response.HasField("run_id"):
        raise DeploymentError(f"{address}: the SuperLink did not start the run: {response.note or 'no reason given'}")
    return int(response.run_id)


def list_runs(address: str, *, limit: int = 20, ca: bytes | None = None) -> list[dict[str, Any]]:
    """The newest runs, newest first: run, status (as `run_status`), details, started (ISO 8601, empty before)."""
    response = _control(address, ca, "listing runs", lambda client: client.ListRuns(ListRunsRequest(limit=limit)))
    runs = sorted(response.run_dict.values(), key=lambda run: str(run.pending_at), reverse=True)
    return [
        {"run": run.run_id, "status": _status(run), "details": run.status.details, "started": run.running_at}
        for run in runs
    ]


def run_status(address: str, run_id: int, *, ca: bytes | None = None) -> tuple[str, str]:
    """Status (pending, starting, running, finished:completed, finished:failed or finished:stopped) and details."""
    response = _control(address, ca, "asking for a run", lambda client: client.ListRuns(ListRunsRequest(run_id=run_id)))
    if run_id not in response.run_dict:
        raise DeploymentError(f"{address}: no run {run_id} here. `trunkline server status` lists the runs.")
    run = response.run_dict[run_id]
    return _status(run), run.status.details


def _status(run: Any) -> str:
    return f"{run.status.status}:{run.status.sub_status}" if run.status.sub_status else str(run.status.status)


def stop_run(address: str, run_id: int, *, ca: bytes | None = None) -> None:
    _control(address, ca, "stopping the run", lambda client: client.StopRun(StopRunRequest(run_id=run_id)))


def list_nodes(address: str, *, ca: bytes | None = None) -> list[dict[str, Any]]:
    """The SuperNodes that registered: node (id), status (online, offline, ...), since (ISO 8601), key (PEM)."""
    response = _control(address, ca, "listing nodes", lambda client: client.ListNodes(ListNodesRequest()))
    return [
        {"node": info.node_id, "status": info.status, "since": info.last_activated_at, "key": info.public_key}
        for info in response.nodes_info
    ]


def register_node(address: str, public_key: bytes, name: str, *, ca: bytes | None = None) -> int:
    """Let the node with this key (PEM) in; its node id, the same again when it is known already."""
    request = RegisterNodeRequest(public_key=public_key, name=name)
    try:
        return int(_control(address, ca, "registering a node", lambda client: client.RegisterNode(request)).node_id)
    except DeploymentError:
        for node in list_nodes(address, ca=ca):
            if node["key"] == public_key and node["status"] != "unregistered":
                return int(node["node"])
        raise


def unregister_node(address: str, node: int, *, ca: bytes | None = None) -> None:
    """Shut the node out; its key can never be registered again."""
    _control(
        address, ca, "shutting a node out", lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node))
    )


def environment(state: Path) -> dict[str, str]:
    """The environment of a Flower process we start: silent towards the internet, its files under `state`."""
    return {
        **os.environ,
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # s; 1 by default, which every run would wait for at its start
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "PYTHONUNBUFFERED": "1",
    }


TASK_TYPES = tuple(str(kind) for kind in TaskType)
CLIENT_APP = str(TaskType.CLIENT_APP)


class NodeRuntime:
    """The door of a SuperNode (`--isolation process`) to the one worker that shares its secret.

    Args:
        address: host:port of the SuperNode's local Runtime API.
        secret: the file given to both as `--superexec-auth-secret-file`.
    """

    def __init__(self, address: str, secret: Path) -> None:
        self.address = address
        try:
            master = load_superexec_auth_secret(secret_file=str(secret))
        except ValueError as error:
            raise DeploymentError(f"{error}. The client daemon makes this file when it starts.") from None
        if master is None or len(master) < 32:
            raise DeploymentError(
                f"{secret}: the secret has fewer than 32 bytes. Remove it; the daemon makes a new one."
            )
        signing = SuperExecAuthHttpInterceptor(
            master_secret=master, protected_methods={"/flwr.proto.Runtime/AcquireTask"}
        )
        self._client = _runtime_client(address, signing)

    def acquire(self) -> tuple[str, str] | None:
        """Token and type of the next task, of whichever type: one left unclaimed would block the node for ever."""
        with _answers(self.address, "asking for a task", "The SuperNode may be restarting."):
            response = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=TASK_TYPES))
        if not (response.HasField("task") and response.token):
            return None
        return response.token, str(response.task.type)


def _runtime_client(address: str, *interceptors: Any) -> RuntimeHttpClient:
    stamped = [RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors]
    return RuntimeHttpClient.from_server_address(address, True, None, interceptors=stamped)


JOURNALLED = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
    "src_task_id",
    "dst_task_id",
)


class NodeTask:
    """One claimed task, from its input to its output. Every method raises DeploymentError when the SuperNode is gone.

    Order of use: `pull_input`, `pull_envelope`, `pull_message`, `push`, `finish`; `beat` from any thread meanwhile.
    After a restart, `resume` with the journalled envelope stands in for the pulls.
    """

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.context: Context | None = None
        self.digest = ""  # of the app the run names: see `fab_digest`
        self._envelope: Message | None = None
        self._tree: Any = None
        self._client = _runtime_client(address, RuntimeTokenHttpInterceptor(token))

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        with _answers(self.address, what, "The task is lost if its token has expired; the centre sends it again."):
            yield

    def pull_input(self) -> None:
        """The run's context, and the digest of its app, which stays inert bytes."""
        with self._asking("pulling a task's input"):
            pulled = self._client.PullTaskInput(PullTaskInputRequest())
        self.context = context_from_proto(pulled.context)
        self.digest = fab_digest(pulled.fab.content)
        TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, pulled.run.run_id
        TaskIdentity.node_id = self.context.node_id

    def pull_envelope(self) -> dict[str, Any]:
        """The message's metadata, as JSON-able values to journal: enough to answer it with an error later."""
        with self._asking("pulling a task's message"):
            pulled = self._client.PullMessages(PullAppMessagesRequest())
        if len(pulled.messages_list) != 1 or len(pulled.message_object_trees) != 1:
            raise DeploymentError(f"{self.address}: a task came with {len(pulled.messages_list)} messages; expected 1")
        metadata = message_from_proto(pulled.messages_list[0]).metadata
        self._tree = pulled.message_object_trees[0]
        fields = {name: getattr(metadata, name) for name in JOURNALLED}
        fields["message_id"] = self._tree.object_id  # what the SuperNode will look for in the reply
        self.resume(fields)
        return fields

    def resume(self, fields: Mapping[str, Any]) -> None:
        """Go on from a journalled envelope."""
        try:
            self._envelope = make_message(metadata=Metadata(**fields), content=RecordDict())
        except TypeError as error:
            raise DeploymentError(
                f"a journalled envelope cannot be read ({error}); the centre sends the task again"
            ) from None
        metadata = self._envelope.metadata
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, metadata.run_id, metadata.dst_node_id

    @property
    def envelope(self) -> Message:
        """The message without its content: what an error replies to even when the content cannot be read."""
        if self._envelope is None:
            raise DeploymentError("a task has no message yet")
        return self._envelope

    def pull_message(self) -> Message:
        """The whole message.

        Raises:
            ContractError: its bytes are not a message.
        """
        metadata = self.envelope.metadata
        node = Node(node_id=metadata.dst_node_id)
        with self._asking("pulling a message's content"):
            try:
                message = pull_and_inflate_object_from_tree(
                    self._tree,
                    make_pull_object_fn_protobuf(self._client.PullObject, node, metadata.run_id),
                    make_confirm_message_received_fn_protobuf(
                        self._client.ConfirmMessageReceived, node, metadata.run_id
                    ),
                    return_type=Message,
                    # a task is there before its content, which the SuperNode is still fetching: Flower's first pause
                    # of 1 s would cost most rounds that second, and its 500 tries are too few for a slow line
                    initial_backoff=0.05,
                    backoff_cap=1.0,
                    max_tries_per_object=10_000,
                )
            except (ObjectPullError, ValueError, TypeError, KeyError, IndexError) as error:
                raise ContractError(f"the message's content cannot be read ({type(error).__name__})") from error
        stamp(message, metadata.message_id)
        return message

    def beat(self) -> None:
        """Say that the task is alive; its token expires 60 s after the last beat."""
        with self._asking("a heartbeat"):
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def push(self, reply: Message) -> None:
        """Hand the SuperNode the reply; until it has one it serves nobody else."""
        metadata = self.envelope.metadata
        if reply.has_content():
            reply.content = pack(reply.content)
        to = Context(metadata.run_id, metadata.dst_node_id, {}, RecordDict(), {})
        with self._asking("handing over a reply"):
            try:
                push_message(self._client, reply, to)
            except ObjectPushError as error:
                raise ValueError(str(error)) from error

    def finish(self, completed: bool, details: str = "") -> None:
        """End the task. The context stays in this process: private state is kept in files, not in the SuperNode."""
        status = SubStatus.COMPLETED if completed else SubStatus.FAILED
        with self._asking("ending a task"):
            self._client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=details[:500]))

    def close(self) -> None:
        self._client.close()


def supernode_main(key_file: Path | None = None, identity: Path | None = None) -> None:
    """Flower's own `flower-supernode` with changes made in this process only.

    It polls every 0.2 s within a minute of a message and every 3 s otherwise, where stock Flower waits 3 s always. A
    restart after a kill signs off its former self at once: stock Flower would leave that one "online" for a minute, and a
    round would wait for it. A message that came by half is forgotten (`whole_or_nothing`). And it never follows a redirect: where a plant's answers go is not the centre's to say.

    Args:
        key_file: where it keeps what it takes to sign a former session off.
        identity: folder of a site that has joined (`authority.crt`, `site.crt`, `site.key`): TLS 1.3 with its certificate,
            which is read again when it has been renewed. Without it the node registers itself with a key of the day.
    """
    from flwr.supernode.cli import flower_supernode

    # sys.modules, because the package has a function of the same name as this module
    loop = sys.modules["flwr.supernode.start_client_internal"]
    last = [time.monotonic()]

    def sleep(seconds: float) -> None:
        if seconds >= IDLE_POLL_S:  # the idle poll: nothing was waiting
            seconds = FAST_POLL_S if time.monotonic() - last[0] < FAST_FOR_S else seconds
        else:  # the wait for a reply: a task is in flight
            last[0] = time.monotonic()
            seconds = min(seconds, FAST_POLL_S)
        time.sleep(seconds)

    loop.time = types.SimpleNamespace(sleep=sleep, time=time.time)  # type: ignore[attr-defined]
    loop._pull_and_store_message = whole_or_nothing(loop._pull_and_store_message)  # type: ignore[attr-defined]
    if identity is not None:
        _be(identity, key_file)
    elif key_file is not None:
        _remember_node(key_file)
    try:
        flower_supernode()
        logger.error("the SuperNode gave its connection up and ends; a daemon starts another")
    except Exception:
        logger.exception("the SuperNode ends")
    # a handshake that failed (a clock that was wrong for a moment, say) ends it for good, but for a thread that serves its
    # local interface: the process would live on, look well, and do nothing
    logging.shutdown()
    os._exit(1)


def whole_or_nothing(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's own `_pull_and_store_message`, which leaves nothing behind of a message whose run ended while it came.

    Flower 1.41 keeps the task and the empty envelope then. A worker that takes the task asks for a content that never
    comes, and for hours nothing of any other run is answered.
    """

    def pulled(*, state: Any, object_store: Any, receive: Callable[[], Any], **others: Any) -> int | None:
        came: list[Any] = []

        def receiving() -> Any:
            if (received := receive()) is not None:
                came.append(received[0].metadata)
            return received

        run = pull(state=state, object_store=object_store, receive=receiving, **others)
        if run is None and came:
            state.delete_messages(message_ids=[came[0].message_id])
            object_store.delete(came[0].message_id)
            for task in state.get_tasks(run_ids=[came[0].run_id]):
                why = "the run ended while this message came"
                state.finish_task(task.task_id, SubStatus.FAILED, why)  # one that has finished stays as it is
        return run

    return pulled


def _straight(client: Any) -> None:
    """A client of Flower's as it comes follows redirects, to plain HTTP too."""
    client._client.follow_redirects = False


def client_context(identity: Path) -> ssl.SSLContext:
    """TLS 1.3 as a site that has joined: its certificate, and nobody trusted but its federation's authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(identity / "authority.crt")
    context.load_cert_chain(identity / "site.crt", identity / "site.key")
    return context


def _be(identity: Path, key_file: Path | None) -> None:
    """Make Flower's fleet client speak with the site's certificate, always the newest."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    certificate = identity / "site.crt"

    class JoinedClient(FleetHttpClient):
        def __init__(self, base_url: str, **options: Any) -> None:
            self._mark = certificate.stat().st_mtime_ns
            super().__init__(base_url, **{**options, "verify": client_context(identity)})
            _straight(self)

        def _unary_unary(self, **call: Any) -> Any:
            if (mark := certificate.stat().st_mtime_ns) != self._mark:
                # not closed: a heartbeat of another thread may be on it, and it goes with its last user
                self._client = httpx.Client(verify=client_context(identity), timeout=self._client.timeout)
                self._mark = mark
                logger.warning("the site's certificate was renewed; it is used from now on")
            return super()._unary_unary(**call)

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            if key_file is not None and key_file.exists():
                with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, OSError):
                    former = int(json.loads(key_file.read_bytes())["node"])
                    self.DeactivateNode(DeactivateNodeRequest(node_id=former))
                    logger.warning("signed off the former session of this site, node %d", former)
                key_file.unlink(missing_ok=True)
            response = super().ActivateNode(request)
            if key_file is not None:
                _keep(key_file, {"node": response.node_id})
            return response

        def DeactivateNode(self, request: Any) -> Any:  # noqa: N802
            response = super().DeactivateNode(request)
            if key_file is not None:
                key_file.unlink(missing_ok=True)
            return response

    _put_in_place(FleetHttpClient=JoinedClient)


def _put_in_place(**ours: Any) -> None:
    """Replace names of the module that a SuperNode speaks to the fleet interface through."""
    from flwr.supernode import fleet_http_connection as connection

    for name, one in ours.items():
        getattr(connection, name)  # a name that has moved must fail here, not be set in vain
        setattr(connection, name, one)


def _keep(path: Path, record: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".new")
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - a mode
        json.dump(record, file)
    aside.replace(path)


def _remember_node(key_file: Path) -> None:
    """Keep key and id of a self-registered node in `key_file`; whom a start finds there is signed off first."""
    from flwr.supercore.primitives.asymmetric import bytes_to_private_key, generate_key_pairs, private_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    pair = generate_key_pairs()

    class RememberingClient(FleetHttpClient):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            _straight(self)

        def RegisterNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name, called again until it succeeds
            if key_file.exists():
                self._sign_off()
                key_file.unlink(missing_ok=True)
            return super().RegisterNode(request)

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802
            response = super().ActivateNode(request)
            _keep(key_file, {"node": response.node_id, "key": private_key_to_bytes(pair[0]).decode()})
            return response

        def UnregisterNode(self, request: Any) -> Any:  # noqa: N802
            response = super().UnregisterNode(request)
            key_file.unlink(missing_ok=True)
            return response

        def _sign_off(self) -> None:
            own: Any = self._interceptors
            try:
                record = json.loads(key_file.read_bytes())
                key = bytes_to_private_key(record["key"].encode())
                self._interceptors = (
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key()),
                )
                self.DeactivateNode(DeactivateNodeRequest(node_id=record["node"]))
                super().UnregisterNode(UnregisterNodeFleetRequest(node_id=record["node"]))
                logger.warning("signed off the former session of this site, node %d", record["node"])
            except (httpx.HTTPStatusError, ValueError, KeyError, OSError) as error:  # it is gone, or was never there
                logger.warning("could not sign off a former session (%s)", type(error).__name__)
            finally:
                self._interceptors = own

    _put_in_place(generate_key_pairs=lambda: pair, FleetHttpClient=RememberingClient)


def serverapp_main(check: Callable[[bytes], None]) -> None:
    """Flower's own `flwr-serverapp`, which hands a run's app archive to `check` before anything of it is unpacked.

    Args:
        check: raises for an app that is not to run; the run then ends as failed, with the error as its details.
    """
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    # sys.modules, because the package has a function of the same name as this module
    module: Any = sys.modules["flwr.superlink.runtime.run_serverapp"]
    install = module.install_from_fab

    def checked(fab: Any, *arguments: Any, **options: Any) -> Any:
        check(bytes(fab))
        return install(fab, *arguments, **options)

    module.install_from_fab = checked
    flwr_serverapp()


if __name__ == "__main__":
    if sys.argv[1:2] != ["supernode"]:
        sys.exit(
            "usage: python -m trunkline.flower.records supernode [--node-file FILE] [--identity DIR] FLAGS OF flower-supernode"
        )
    _given: dict[str, Path] = {}
    _flags = sys.argv[2:]
    while _flags[:1] in (["--node-file"], ["--identity"]):
        _given[_flags[0]] = Path(_flags[1])
        _flags = _flags[2:]
    sys.argv = ["flower-supernode", *_flags]
    supernode_main(_given.get("--node-file"), _given.get("--identity"))
