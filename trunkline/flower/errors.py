"""Error replies: their codes, and the texts that may leave a site."""

import re

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from trunkline.errors import Away, ContractError, Declined, Pending, StorageError, TrunklineError
from trunkline.flower.processes import logger
from trunkline.runtime.disk import disk_error_text

# error codes: Flower's own for an exception, and ours above its range. PENDING: a person at the plant has not decided yet;
# DECLINED: its policy or a person there says no. The reason of these two is `SITE: why`. FULL: its disk took no answer
CRASHED, REFUSED, RESTARTED, PENDING, DECLINED = 2, 400, 401, 402, 403
AWAY = 404  # outside the plant's hours, or paused there: `SITE: why, until when`
FULL = 405
ERROR_LIMIT = 1000  # characters of an error's text that leave a site
FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:;,()'\"`]*[/\\]")  # all of a path but its last name


class MessageLost(TrunklineError):
    """A message got lost on its way to the SuperLink; its site has not seen it."""


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
        if problem := disk_error_text(error):
            logger.error("node %d: %s", context.node_id, error)
            return error_reply(message, f"{problem}; ask again", FULL)
        logger.exception("node %d: the ClientApp failed on %s", context.node_id, message.metadata.message_type)
        return error_reply(message, reason_of(error))


def error_reply(message: Message, reason: str, code: int = CRASHED) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=message)


def reason_of(error: BaseException) -> str:
    """What the server may read of a site's exception.

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

    An error that the SuperLink makes itself (a node went away) has the server as its source, so the request's id is the
    only way back to the site that was asked.
    """
    if not message.has_error():
        return None
    return message.metadata.reply_to_message_id, message.error.code, (message.error.reason or "")[:ERROR_LIMIT]
