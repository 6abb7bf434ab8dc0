"""Arrays, header and metrics as the records of a Flower message, and back."""

import io
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from trunkline.errors import ContractError

HEADER_LIMIT = 1 << 20  # bytes of JSON: a contract of 4,000 arrays is about 400 kB
PACK_SMALL = 4 << 20  # bytes up to which arrays travel as one object; Flower's own chunks have 5 MiB
ALIGNED = 64  # bytes: where arrays begin in a pack, as numpy's file format has its own data


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
