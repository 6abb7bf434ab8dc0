"""The ClientApp: the same three handlers at a plant, on Ray and in the tests."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from trunkline.client.handlers import answer_decide, answer_evaluate, answer_offer, answer_probe, answer_train
from trunkline.client.site import open_site
from trunkline.errors import ContractError
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.header import read_header
from trunkline.protocol.messages import RoundRequest

app = ClientApp()


def _order(message: Message) -> tuple[RoundRequest, Arrays]:
    arrays, header, _ = open_records(message.content)
    try:
        return read_header(RoundRequest, header, "site"), Arrays(arrays)
    except ContractError as error:
        raise ContractError(f"the order was not understood. {str(error)[0].upper()}{str(error)[1:]}.") from None


@app.query()
def offer(message: Message, context: Context) -> Message:
    request, arrays = _order(message)
    if request.probe:
        site = open_site(context.node_config)
        with site.watched():
            reply, metrics = answer_probe(site, request, arrays)
        return Message(to_records({}, reply.model_dump_json(), metrics), reply_to=message)
    made, first = answer_offer(open_site(context.node_config, fresh=True), request)
    return Message(to_records(first, made.model_dump_json()), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    request, arrays = _order(message)
    site = open_site(context.node_config)
    with site.watched():
        reply, entry = answer_train(site, request, arrays)
    return Message(to_records(entry.delta, reply.model_dump_json(), entry.metrics), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    request, arrays = _order(message)
    answer = answer_decide if request.decide else answer_evaluate
    site = open_site(context.node_config)
    with site.watched():
        card = answer(site, request, arrays)
    return Message(to_records({}, card.model_dump_json()), reply_to=message)
