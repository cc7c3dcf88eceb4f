"""Publishing and consuming with asyncpg, in your own transactions.

Needs a migrated postbox (`postbox migrate up`) and DATABASE_URL. Checks what it does, and exits with 1
if something is not as it says. POSTBOX_SCHEMA names another schema than `postbox`.
"""

import asyncio
import json
import os
import uuid

import asyncpg

SCHEMA = os.environ.get("POSTBOX_SCHEMA", "postbox")
RUN = uuid.uuid4().hex[:8]  # so that it can run again
TOPIC = f"orders_{RUN}.placed"
SUBSCRIPTION = f"stock_{RUN}"


class OutOfStock(Exception):
    pass


async def place_order(db, order_id, cents, fail=False):
    """The order and its message commit together, or not at all."""
    async with db.transaction():
        await db.execute("insert into shop_order (id, cents) values ($1, $2)", order_id, cents)
        payload = json.dumps({"order_id": order_id, "cents": cents})
        await db.fetchval(f"select {SCHEMA}.publish($1, $2::jsonb, key => $3)", TOPIC, payload, str(order_id))
        if fail:
            raise OutOfStock("changed my mind")


async def handle_next(db):
    """Handles one delivery; False when there is none. Its success commits with the reservation."""
    delivery = None
    try:
        async with db.transaction():
            row = await db.fetchrow(f"select * from {SCHEMA}.next($1)", SUBSCRIPTION)
            if row is None:
                return False
            delivery = row["delivery"]
            order = json.loads(row["payload"])
            await db.execute("insert into reservation (order_id, attempt) values ($1, $2)", order["order_id"], row["attempt"])
            if order["cents"] > 1000:
                raise OutOfStock(f"order {order['order_id']} is too large")
    except OutOfStock as error:
        # Rolled back: the reservation is gone, and no attempt is counted until we say so.
        await db.fetchval(f"select {SCHEMA}.failed($1, $2, retry_after => '0 s')", delivery, str(error))
    return True


async def main():
    db = await asyncpg.connect(os.environ["DATABASE_URL"])
    await db.execute("create temporary table shop_order (id int primary key, cents int)")
    await db.execute("create temporary table reservation (order_id int primary key, attempt int)")
    await db.fetchval(f"select {SCHEMA}.subscribe($1, $2, max_attempts => 3)", SUBSCRIPTION, f"orders_{RUN}.*")

    await place_order(db, 1, 500)
    await place_order(db, 2, 5000)  # nobody can handle this one
    try:
        await place_order(db, 3, 100, fail=True)
    except OutOfStock:
        pass
    assert await db.fetchval("select count(*) from shop_order") == 2, "the third order was rolled back"
    assert await db.fetchval(f"select count(*) from {SCHEMA}.message where topic = $1", TOPIC) == 2, "its message, too"

    handled = 0
    while await handle_next(db):
        handled += 1
    assert handled == 4, f"one that succeeds, and three attempts at the other; not {handled}"
    reserved = [tuple(row) for row in await db.fetch("select order_id, attempt from reservation")]
    assert reserved == [(1, 1)], reserved

    standing = await db.fetch(
        f"""select d.state, d.attempt, d.note from {SCHEMA}.delivery d join {SCHEMA}.message m on m.id = d.message
            where m.topic = $1 order by d.delivery""",
        TOPIC,
    )
    standing = [tuple(row) for row in standing]
    assert standing == [("succeeded", 1, None), ("dead", 3, "order 2 is too large")], standing
    await db.close()
    print("asyncpg: 1 order reserved, 1 dead letter after 3 attempts, 1 rolled back without a trace")


asyncio.run(main())
