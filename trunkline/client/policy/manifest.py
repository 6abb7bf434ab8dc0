"""The manifest: one signed and chained line for everything that left a site, as `egress` writes it and a person reads it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.client.policy.contracts import in_bytes, plain
from trunkline.client.state.identity import records_key
from trunkline.security.encryption import Seal, find_seal
from trunkline.security.hash_chain import Chain, Link
from trunkline.security.keys import key_id

if TYPE_CHECKING:
    from rich.console import Console

MANIFEST, PURPOSE = "manifest.jsonl", "manifest"


def chain_of(state: Path, seal: Seal | None) -> Chain:
    return Chain(state / MANIFEST, PURPOSE, seal)


def read_manifest(state: Path, run: str = "") -> tuple[list[Link], str]:
    """The lines of a site's manifest, of one run or all, each line of it verified; and the id of the key that signed them.

    Raises:
        TamperError: it is not what was written; the text names the first line that is not.
        TrustError, StorageError: key or seal cannot be used.
    """
    seal = find_seal(state)
    chain = chain_of(state, seal)
    if not (chain.path.exists() or chain.path.with_name(f"{MANIFEST}.head").exists()):
        return [], ""
    key = records_key(state, seal).public_key()
    return [link for link in chain.read(key) if run in ("", link.body["run"])], key_id(key)


def dumped(link: Link) -> str:
    """A line of JSON for other tools: its number, time and hash beside what it says."""
    return json.dumps({"n": link.number, "at": link.at, "hash": link.hash, **link.body})


def intact(links: list[Link], signer: str) -> str:
    return f"intact: {len(links)} lines, signed by {signer[:16] or 'nobody'}"


def print_manifest(links: list[Link], signer: str, console: "Console") -> None:
    """A line a reply, and what it comes to."""
    from rich.table import Table
    from rich.text import Text

    table = Table("time (UTC)", "run", "round", "what", "tensors", "numbers", "bytes", "norm", "sha256")
    table.columns[1].overflow = table.columns[3].overflow = "fold"
    for link in links:
        body = link.body
        what = body["kind"] if body["error"] is None else f"error {body['error'][0]}: {body['error'][1]}"
        norm = sum(tensor[4] ** 2 for tensor in body["tensors"]) ** 0.5
        cells = (
            link.at[5:19].replace("T", " "), body["run"], str(body["round"]), what, str(len(body["tensors"])),
            str(len(body["metrics"])), in_bytes(body["bytes"]), f"{norm:.3g}" if body["tensors"] else "-", body["sha256"][:8],
        )  # fmt: skip
        table.add_row(*(Text(plain(cell)) for cell in cells))
    console.print(table)
    to = sorted({link.body["to"] for link in links})
    total = in_bytes(sum(link.body["bytes"] for link in links))
    console.print(Text(f"{total} in {len(links)} replies, to {plain(', '.join(to)) or 'nobody'}"))
    console.print(Text("--json has every tensor, every number and the header of each reply."))
    console.print(Text(intact(links, signer)))
