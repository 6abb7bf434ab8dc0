"""The smallest apps that show what a deployment does: no torch, no site, a line of JSON for every reply."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from trunkline.errors import ContractError
from trunkline.flower.errors import error_site
from trunkline.flower.records import open_records, to_records

client_app = ClientApp()
server_app = ServerApp()
CALLS = 0


@client_app.train()
def add_one(message: Message, context: Context) -> Message:
    """Answer every array plus one; say who answered and for the how-manieth time."""
    global CALLS
    CALLS += 1
    arrays, header, _ = open_records(message.content)
    asked = json.loads(header)
    if asked.get("fail"):
        raise ContractError(f"{os.sep}plant{os.sep}secret{os.sep}rows.csv: asked to fail")
    if marker := asked.get("sleep_once"):
        Path(marker).parent.mkdir(parents=True, exist_ok=True)
        if not Path(marker).exists():
            Path(marker).write_text(str(os.getpid()))
            time.sleep(60.0)
    if (marker := asked.get("full_once")) and not Path(marker).exists():
        Path(marker).touch()
        with Path("/dev/full").open("wb", buffering=0) as disk:
            disk.write(b"x")
    if asked.get("not_a_reply"):
        return message
    said = json.dumps({"pid": os.getpid(), "calls": CALLS, "site": context.node_config.get("site", "")})
    return Message(to_records({name: array + 1 for name, array in arrays.items()}, said), reply_to=message)


@server_app.main()
def ask(grid: Grid, context: Context) -> None:
    """Ask every connected node `rounds` times; one JSON line a reply in the file `out`. A failed site is asked again."""
    out = Path(str(context.run_config["out"]))
    header = str(context.run_config["header"])
    wanted = int(context.run_config["nodes"])
    end = time.monotonic() + 60.0
    while len(nodes := list(grid.get_node_ids())) < wanted and time.monotonic() < end:
        time.sleep(0.1)
    array = np.zeros((2, 3), np.float32)
    for _ in range(int(context.run_config["rounds"])):
        for node in nodes:
            array = _ask(grid, node, array, header, out, end, retries=int(context.run_config["retries"]))


def _ask(grid: Grid, node: int, array: np.ndarray, header: str, out: Path, end: float, retries: int) -> np.ndarray:
    for _ in range(retries + 1):
        began = time.monotonic()
        (asked,) = grid.push_messages([Message(to_records({"w": array}, header), node, "train", ttl=120.0)])
        while not (replies := list(grid.pull_messages([asked]))):
            if time.monotonic() > end:
                raise TimeoutError("no reply")
            time.sleep(0.1)
        seconds = time.monotonic() - began
        failed = error_site(replies[0])
        with out.open("a") as file:
            if failed is not None:
                said = {"error": failed[1], "reason": failed[2], "to_request": failed[0] == asked}
            else:
                arrays, text, _ = open_records(replies[0].content)
                array = arrays["w"]
                said = {"value": float(array[0, 0]), **json.loads(text)}
            file.write(json.dumps({"node": node, "seconds": seconds, **said}) + "\n")
        if failed is None:
            break
    return array
