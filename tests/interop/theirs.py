"""What the packages from PyPI say: a list of questions as JSON on stdin, their answers on stdout."""

import json
import sys
from datetime import datetime, timezone

import stripe
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from standardwebhooks.webhooks import Webhook


def sign(q):
    if q["scheme"] == "standard":
        when = datetime.fromtimestamp(q["timestamp"], tz=timezone.utc)
        return Webhook(q["secret"]).sign(q["id"], when, q["body"])
    signed = f"{q['timestamp']}.{q['body']}"
    return f"t={q['timestamp']},v1={stripe.WebhookSignature._compute_signature(signed, q['secret'])}"


def verify(q):
    if q["scheme"] == "standard":
        Webhook(q["secret"]).verify(q["body"], q["headers"], json_parse=False)
    else:
        stripe.WebhookSignature.verify_header(q["body"], q["headers"]["stripe-signature"], q["secret"], 300)
    return "good"


def cloudevent(q):
    event = from_http_event(HTTPMessage(headers=q["headers"], body=q["body"].encode()))
    attributes = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in event.get_attributes().items()}
    return {"attributes": attributes, "data": event.get_data()}


def answer(q):
    try:
        return {"sign": sign, "verify": verify, "cloudevent": cloudevent}[q["do"]](q)
    except Exception as error:
        return f"refused: {error}"


json.dump([answer(q) for q in json.load(sys.stdin)], sys.stdout)
