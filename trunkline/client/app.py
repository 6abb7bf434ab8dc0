"""The ClientApp: the same handlers at a plant, on Ray and in the tests."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from trunkline.client.handlers import answer_decide, answer_fit, answer_offer, answer_score, answer_train
from trunkline.client.site import open_site
from trunkline.errors import ContractError
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.header import read_request
from trunkline.protocol.messages import DecideRequest, FitQuery, OfferRequest, Request, TrainRequest

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """The reply to a request of any kind."""
    request, arrays = read_message(message)
    if isinstance(request, OfferRequest):
        offer, first = answer_offer(open_site(context.node_config, fresh=True), request)
        return Message(to_records(first, offer.model_dump_json()), reply_to=message)
    site = open_site(context.node_config)
    with site.watched():
        if isinstance(request, TrainRequest):
            reply, entry = answer_train(site, request, arrays)
            return Message(to_records(entry.delta, reply.model_dump_json(), entry.metrics), reply_to=message)
        if isinstance(request, FitQuery):
            reply, metrics = answer_fit(site, request, arrays)
            return Message(to_records({}, reply.model_dump_json(), metrics), reply_to=message)
        if isinstance(request, DecideRequest):
            card = answer_decide(site, request, arrays)
        else:
            card = answer_score(site, request, arrays)
        return Message(to_records({}, card.model_dump_json()), reply_to=message)


def read_message(message: Message) -> tuple[Request, Arrays]:
    """What a message asks, and the lent arrays beside it."""
    arrays, header, _ = open_records(message.content)
    try:
        request = read_request(header)
        if request.message_type != message.metadata.message_type:
            raise ContractError(
                f"a message of type {message.metadata.message_type!r} carries a request of the kind {request.kind!r}"
            )
    except ContractError as error:
        raise ContractError(f"the request was not understood. {str(error)[0].upper()}{str(error)[1:]}.") from None
    return request, Arrays(arrays)
