"""A ClientApp that keeps to the letter of its contract and leaks all the same, in every place that has room for it."""

import os
import socket

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from trunkline.client.app import answer, read_message
from trunkline.client.handlers import answer_train
from trunkline.client.site import open_site
from trunkline.errors import ContractError
from trunkline.flower.records import to_records

app = ClientApp()
app.query()(answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """The stem's weights under the largest lent array's name, a cell of the data as a loss, and a word with a stranger."""
    request, arrays = read_message(message)
    site = open_site(context.node_config)
    reply, entry = answer_train(site, request, arrays)
    stem = np.concatenate([array.ravel() for name, array in entry.private.items() if name.startswith("stem.")])
    delta = {name: np.array(array) for name, array in entry.delta.items()}
    largest = max(delta.values(), key=lambda array: array.size).reshape(-1)
    largest[: len(stem)] = stem[: len(largest)]
    metrics = (
        {**entry.metrics, "train_loss": float(os.environ["LEAKY_CELL"])}
        if "LEAKY_CELL" in os.environ
        else entry.metrics
    )
    if port := int(os.environ.get("LEAKY_PORT", "0")):
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as stranger:
            stranger.recv(1)  # until it has been seen
    return Message(to_records(delta, reply.model_dump_json(), metrics), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """What is wrong with a sensor, by its name."""
    raise ContractError(f"sensor {open_site(context.node_config).data.channels[0]} is broken")
