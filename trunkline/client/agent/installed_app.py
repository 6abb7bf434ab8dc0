"""What the executor runs: the ClientApp that the plant's operator has installed, on a fixed number of torch threads."""

import importlib
import os

from flwr.clientapp import ClientApp

from trunkline.errors import DeploymentError


def load_app(reference: str) -> ClientApp:
    """The installed ClientApp named `module:attribute`."""
    module, _, attribute = reference.partition(":")
    try:
        client_app = getattr(importlib.import_module(module), attribute or "app")
    except (ImportError, AttributeError) as error:
        raise DeploymentError(
            f"--app {reference}: {error}. Name an installed ClientApp as module:attribute."
        ) from error
    if not isinstance(client_app, ClientApp):
        raise DeploymentError(f"--app {reference}: is a {type(client_app).__name__}; expected a ClientApp.")
    return client_app


def set_torch_threads() -> None:
    """One torch thread unless TRUNKLINE_THREADS sets more: another order of sums would change the bytes."""
    import torch

    try:
        threads = int(os.environ.get("TRUNKLINE_THREADS", "1"))
        torch.set_num_threads(threads)
    except (ValueError, RuntimeError):
        raise DeploymentError(
            f"TRUNKLINE_THREADS={os.environ['TRUNKLINE_THREADS']!r}: expected a whole number from 1."
        ) from None
