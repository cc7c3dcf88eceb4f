"""Handlers behind URLs, in Python: postbox pushes each message here, signed.

    CRM_SECRET=whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw uvicorn app:app --port 8000

What an answer means: 2xx: done. 400, 422 and other 4xx: never again, a dead letter with the words of the answer.
503 and other 5xx, or none: again, with the same id. So an id that was seen before is answered like the first time,
and nothing is done for it.
"""

import json
import os
import sqlite3

from fastapi import FastAPI, HTTPException, Request
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

app = FastAPI()
webhook = Webhook(os.environ["CRM_SECRET"])
db = sqlite3.connect(os.environ.get("CRM_DATABASE", "crm.db"), isolation_level=None)
db.executescript(
    """
    create table if not exists seen (id text primary key);
    create table if not exists customer_order (order_id integer primary key, cents integer not null);
    create table if not exists charge (key text primary key, order_id integer not null, cents integer not null);
    """
)


async def signed(request: Request) -> dict:
    """The body of a request that was signed with the secret, not longer than five minutes ago."""
    body = await request.body()
    try:
        webhook.verify(body, dict(request.headers), json_parse=False)
    except WebhookVerificationError as error:
        raise HTTPException(401, f"the signature is not good: {error}")
    return json.loads(body) if body else {}


def cents_of(order: dict) -> int:
    if not isinstance(order.get("cents"), int) or order["cents"] < 0:
        raise HTTPException(422, f"order {order.get('order_id')} has no amount")
    return order["cents"]


@app.post("/events")
async def events(request: Request):
    """At least once: the id and the effect commit together, so that what comes again changes nothing."""
    order = await signed(request)
    cents = cents_of(order)
    db.execute("begin immediate")
    try:
        new = db.execute("insert into seen values (?) on conflict do nothing", [request.headers["webhook-id"]]).rowcount
        if new:
            db.execute("insert into customer_order values (?, ?)", [order["order_id"], cents])
        db.execute("commit")
    except BaseException:
        db.execute("rollback")
        raise
    return {"status": "done" if new else "seen before"}


@app.post("/charges")
async def charge(request: Request):
    """An operation: the key is the same for every attempt at one delivery, and charges once."""
    order = await signed(request)
    cents = cents_of(order)
    key = request.headers["idempotency-key"]
    db.execute("insert into charge values (?, ?, ?) on conflict do nothing", [key, order["order_id"], cents])
    if order.get("crash"):  # it happened, and whoever called does not learn it
        raise HTTPException(500, "something went wrong after the charge")
    return {"charged": cents}


@app.get("/charges/find")
async def find(request: Request):
    """Asked when nobody saw how a charge ended."""
    await signed(request)
    found = db.execute("select cents from charge where key = ?", [request.headers["idempotency-key"]]).fetchone()
    return {"status": "done", "charged": found[0]} if found else {"status": "not_done"}


@app.get("/report")
async def report():
    orders = db.execute("select order_id, cents from customer_order order by order_id").fetchall()
    charges = db.execute("select order_id, cents from charge order by order_id").fetchall()
    return {"orders": orders, "charges": charges}
