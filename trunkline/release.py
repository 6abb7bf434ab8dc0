"""A released trunk: one safetensors file with a card, written by the server at the end of a run for new plants to start from.

The card is in the metadata of the file, so that no trunk is passed on without it. The server's signature of arrays and card
is beside it. The card contains no row of data: only names, the trunk's specification, counts of rounds, and figures over at
least ten values or FEWEST_SITES sites.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors
import safetensors.numpy
from cryptography import x509
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from trunkline.errors import StorageError, TamperError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.contract import TaskCard
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.plan import TrunkSpec
from trunkline.runtime.storage import Sealing, write_private
from trunkline.security.signatures import Sign, Signature, Verdict, digest_arrays, unsigned_verdict, verify_signature

FORMAT = 2  # 1 had no lineage and could not be signed
READS = (1, FORMAT)
FEWEST_SITES = 3  # in a figure over sites: from a mean of two, each site could compute the other's value
RELEASE = "trunk.safetensors"  # in the folder of a run
COHORT_RELEASE = "trunk-{}.safetensors"  # beside it, where a run ended with several trunks
KEY = "trunkline"  # of the card in the file's metadata
Table = tuple[tuple[float, ...], ...]


class PooledScale(Frozen):
    """Count, mean and variance of the sites' inputs together, per operating regime and channel.

    Args:
        settings: the columns that distinguish regimes; sites with other settings have a PooledScale of their own.
        widths: (settings,) the widest range of each setting at any site, in the setting's unit.
        centres: (regimes, settings) in the settings' units.
        count, mean, variance: (regimes, channels) in the channels' units; count 0 where no site had enough values.
    """

    settings: tuple[str, ...]
    widths: tuple[float, ...]
    centres: Table
    channels: tuple[str, ...]
    count: Table
    mean: Table
    variance: Table

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        regimes, settings, channels = len(self.centres), len(self.settings), len(self.channels)
        for table, columns in (
            (self.centres, settings),
            *((table, channels) for table in (self.count, self.mean, self.variance)),
        ):
            if len(table) != regimes or any(len(row) != columns for row in table):
                raise ValueError(f"a table of the scaler is not {regimes} regimes x {columns}")
        if len(self.widths) != settings:
            raise ValueError(f"{len(self.widths)} widths for {settings} settings")
        return self


class LabelScale(Frozen):
    """The scale of one task's label: pooled mean and standard deviation over `count` labelled samples, in its unit."""

    count: float = Field(gt=0.0)
    mean: float
    std: float = Field(gt=0.0)


class Participation(Frozen):
    """The part of sites in a run: number of rounds with an admitted update, digest of the contract, version of Trunkline.

    Sites with equal values share one entry: safetensors reads no header over 100 MB, and a simulation may have many sites.
    """

    sites: tuple[str, ...] = Field(min_length=1)
    rounds: int = Field(ge=0)
    contract: str
    version: str


class Figure(Frozen):
    """The mean of a loss over `sites` sites, each counted once, in the last round in which enough of them reported it."""

    round: int
    sites: int = Field(ge=FEWEST_SITES)
    mean: float


class GuardUsed(Frozen):
    """A privacy mechanism that was applied to the run's updates, with its parameters."""

    name: str
    parameters: dict[str, bool | int | float | str] = Field(default={})


class Lineage(Frozen):
    """The origin of a release: the run, its sites, software and losses, recorded for every trunk in use.

    Args:
        rounds: number of rounds done, including those of a first pass.
        parts: the participation of the sites, ordered by the first site of each entry.
        versions: of the packages at the server. protocol: of the wire. site_schema: of site.toml at the server.
        figures: name of a loss on validation rows -> its mean over sites.
        guards: in the order in which they were applied.
        budget: the privacy budget that the guards spent, by the guards' own keys; empty if none spends one.
        digest: `Arrays.digest()` of what is released.
        created: ISO 8601, UTC.
    """

    rounds: int
    parts: tuple[Participation, ...]
    versions: dict[str, str]
    protocol: int
    site_schema: int
    figures: dict[str, Figure]
    guards: tuple[GuardUsed, ...] = ()
    budget: dict[str, float | str] = Field(default={})
    digest: str
    created: str

    def by_site(self) -> dict[str, Participation]:
        """Site -> its participation, sites by name."""
        return dict(sorted(((site, part) for part in self.parts for site in part.sites), key=lambda pair: pair[0]))


class Card(Frozen):
    """The description of a released trunk.

    Args:
        run, key: name of the run, and its key in the sites' vaults.
        seed: initial seed of the parts that were not lent, as at the run's own sites.
        lend: the parts that the run lent.
        window: rows a window at the sites; None: they differ, are unknown, or the sites read single rows.
        sites: the sites that took part.
        tasks: of the lent heads.
        channels: inputs of the lent stem in order; None: no stem was lent, or the sites call them differently.
        scales: statistics of the sites' inputs, if lent, one for each set of settings.
        labels: task -> the scale of its label, if lent.
        versions: of Trunkline at the server and at the sites.
        lineage: None in a file of format 1.
    """

    format: int = FORMAT
    run: str
    key: str
    rounds: int
    seed: int
    strategy: str
    trunk: TrunkSpec
    lend: tuple[str, ...]
    window: int | None
    sites: tuple[str, ...]
    tasks: tuple[TaskCard, ...]
    channels: tuple[str, ...] | None
    scales: tuple[PooledScale, ...] = ()
    labels: dict[str, LabelScale] = Field(default={})
    versions: tuple[str, ...]
    lineage: Lineage | None = None


class _About(Frozen):
    """The file's metadata: the card as text, because a signature is of bytes, not of their meaning."""

    card: dict[str, int]  # its format, where every version looks for it: an older one then asks for an update
    text: str
    names: tuple[str, ...]
    signature: Signature | None = None


def write_release(path: Path, arrays: Arrays, card: Card, sign: Sign | None = None) -> None:
    """Write arrays and card to `path`; equal arguments give equal bytes, except for the time of the signature.

    Args:
        sign: makes the signature; None: the release stays unsigned.

    Raises:
        StorageError: the file cannot be written; an older file stays.
        TrustError: it cannot be signed; an older file stays.
    """
    text = card.model_copy(update={"format": FORMAT}).model_dump_json()
    signature = sign(_sha256(text), digest_arrays(arrays)) if sign is not None else None
    about = _About(card={"format": FORMAT}, text=text, names=tuple(arrays), signature=signature)
    # one key of metadata: the order of several would depend on their hashes
    write_tensors(path, arrays, {KEY: about.model_dump_json(exclude_none=True)})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_tensors(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    metadata: dict[str, str],
    seal: Sealing | None = None,
    about: str = "",
) -> None:
    """A safetensors file, written so that a crash leaves the old one or the new one; with a seal encrypted as `about`."""
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_private(path, safetensors.numpy.save(tensors, metadata=metadata), seal, about, mode=0o644)


def read_tensors(
    path: Path, key: str, kind: str, content: bytes | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Arrays and metadata of a safetensors file from any source, possibly damaged.

    Args:
        key: of the metadata that marks the file as one of ours.
        kind: the expected kind of file, for errors.
        content: of the file, if it was decrypted already.

    Raises:
        StorageError: it is absent, damaged, or not `kind`.
    """
    try:
        if content is not None:
            tensors = safetensors.numpy.load(content)
            head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return tensors, _ours(path, head.get("__metadata__") or {}, key, kind)
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = _ours(path, file.metadata() or {}, key, kind)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  (no mapping)
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file. A run writes `{RELEASE}` into its --out folder.") from None
    except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
        raise StorageError(
            f"{path}: damaged, or not {kind} ({type(error).__name__}: {error}). Copy it again from where it was made."
        ) from None


def _ours(path: Path, metadata: dict[str, str], key: str, kind: str) -> dict[str, str]:
    if key not in metadata:
        raise StorageError(f"{path}: a safetensors file, but not {kind}: its metadata has no `{key}`.")
    return metadata


@dataclass(frozen=True)
class Release:
    """A release, read once: the arrays that were verified are the arrays that are used."""

    arrays: Arrays
    card: Card
    verdict: Verdict


def open_release(path: Path, authority: x509.Certificate | None = None) -> Release:
    """A released trunk with the verdict on its signature; call `verdict.demand` before any use of the arrays.

    Args:
        authority: of the federation that should have signed it; None: there is no authority to check against.

    Raises:
        StorageError: the file is absent, damaged, of another format, or no trunk; the text says which.
        TamperError: its card was altered so that it cannot be parsed.
    """
    tensors, metadata = read_tensors(path, KEY, "a trunk of Trunkline")
    try:
        table = json.loads(metadata[KEY])
        file_format = table["card"].get("format")
        if file_format not in READS:
            raise StorageError(
                f"{path}: a trunk of format {file_format!r}; this Trunkline reads {' and '.join(map(str, READS))}. Update the older of the two."
            )
        if file_format == 1:
            about = _About(card={"format": 1}, text=json.dumps(table["card"]), names=table["names"])
        else:
            about = _About.model_validate(table)
        names, hashed = about.names, _sha256(about.text)
        if sorted(names) != sorted(tensors):
            raise StorageError(f"{path}: damaged: its arrays are not the ones its card lists. Copy it again.")
        arrays = Arrays({name: tensors[name] for name in names})
        if about.signature is not None:
            verdict = verify_signature(str(path), about.signature, hashed, digest_arrays(arrays), authority)
        elif file_format == 1:
            verdict = unsigned_verdict(str(path), "it is of format 1, which nobody could sign yet")
        else:
            verdict = unsigned_verdict(str(path))
        card = _card(about.text, file_format, verdict)
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise StorageError(f"{path}: its card is damaged ({text}). Copy it again from where it was made.") from None
    if not isinstance(verdict.problem, TamperError):  # tampered arrays are refused anyway, with a clearer text
        _check_arrays(path, arrays, card)
    return Release(arrays, card, verdict)


def _card(text: str, file_format: int, verdict: Verdict) -> Card:
    try:
        card = Card.model_validate_json(text)
        if card.format != file_format:
            raise ValueError(f"its inner format is {card.format}, its outer format {file_format}")
    except ValueError:
        if isinstance(verdict.problem, TamperError):
            raise verdict.problem from None
        raise
    return card


def _check_arrays(path: Path, arrays: Arrays, card: Card) -> None:
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise StorageError(
                f"{path}: `{name}` holds {array.dtype} with NaN or infinity, or no float32 at all. Do not use it."
            )
    if not any(name.startswith("trunk.") for name in arrays):
        raise StorageError(
            f"{path}: no array of it belongs to a trunk; its run lent {', '.join(card.lend) or 'nothing'}."
        )
    if card.lineage is not None and card.lineage.digest != arrays.digest():
        raise StorageError(f"{path}: damaged: its arrays are not the ones its card was written for. Copy it again.")


def verify_release(path: Path, authority: x509.Certificate | None) -> Verdict:
    """The verdict on the signature of the release at `path`: signer, time and federation, or the problem with it.

    Raises:
        StorageError: the file cannot be read.
    """
    return open_release(path, authority).verdict


def read_release(
    path: Path, authority: x509.Certificate | None = None, unsigned: Literal["allow", "refuse"] = "refuse"
) -> tuple[Arrays, Card]:
    """A released trunk that may be used.

    Args:
        authority: of the federation whose server must have signed it. None: every release that matches its own signature is read.
        unsigned: "allow" also reads a release without a signature, or signed under another authority.

    Raises:
        StorageError: as `open_release`.
        TrustError: not signed, or signed under another authority. TamperError: it was changed after it was signed.
    """
    release = open_release(path, authority)
    release.verdict.demand(authority, unsigned == "allow")
    return release.arrays, release.card
