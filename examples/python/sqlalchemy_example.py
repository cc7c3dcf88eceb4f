"""Publishing and consuming with SQLAlchemy (on psycopg), in your own transactions.

Needs a migrated postbox (`postbox migrate up`) and DATABASE_URL. Checks what it does, and exits with 1
if something is not as it says. POSTBOX_SCHEMA names another schema than `postbox`.
"""

import json
import os
import uuid

from sqlalchemy import create_engine, make_url, text

SCHEMA = os.environ.get("POSTBOX_SCHEMA", "postbox")
RUN = uuid.uuid4().hex[:8]  # so that it can run again
TOPIC = f"mails_{RUN}.wanted"
SUBSCRIPTION = f"mailer_{RUN}"


class NoSuchAddress(Exception):
    pass


def order_mail(db, customer, address, fail=False):
    """The request and its message commit together, or not at all."""
    with db.begin():
        db.execute(text("insert into mail_request values (:customer)"), {"customer": customer})
        db.execute(
            text(f"select {SCHEMA}.publish(:topic, cast(:payload as jsonb))"),
            {"topic": TOPIC, "payload": json.dumps({"customer": customer, "address": address})},
        )
        if fail:
            raise NoSuchAddress("changed my mind")


def handle_next(db):
    """Handles one delivery; False when there is none. A failure is counted in the same transaction."""
    with db.begin():
        row = db.execute(text(f"select * from {SCHEMA}.next(:name)"), {"name": SUBSCRIPTION}).one_or_none()
        if row is None:
            return False
        try:
            with db.begin_nested():  # what the handler did is undone, the delivery stays ours
                db.execute(text("insert into mail values (:customer)"), {"customer": row.payload["customer"]})
                if "@" not in row.payload["address"]:
                    raise NoSuchAddress(f"no such address: {row.payload['address']}")
        except NoSuchAddress as error:
            db.execute(
                text(f"select {SCHEMA}.failed(:delivery, :error, retry_after => '0 s')"),
                {"delivery": row.delivery, "error": str(error)},
            )
        return True


def main():
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")
    engine = create_engine(url)
    with engine.connect() as db:
        with db.begin():
            db.execute(text("create temporary table mail_request (customer text primary key)"))
            db.execute(text("create temporary table mail (customer text primary key)"))
            db.execute(
                text(f"select {SCHEMA}.subscribe(:name, :pattern, max_attempts => 2)"),
                {"name": SUBSCRIPTION, "pattern": f"mails_{RUN}.*"},
            )
        order_mail(db, "ana", "ana@example.org")
        order_mail(db, "bob", "nowhere")  # nobody can handle this one
        try:
            order_mail(db, "eve", "eve@example.org", fail=True)
        except NoSuchAddress:
            pass

        handled = 0
        while handle_next(db):
            handled += 1
        assert handled == 3, f"one that succeeds, and two attempts at the other; not {handled}"
        with db.begin():
            mails = db.execute(text("select customer from mail")).scalars().all()
            assert mails == ["ana"], mails
            standing = db.execute(
                text(
                    f"""select d.state, d.attempt, d.note from {SCHEMA}.delivery d
                        join {SCHEMA}.message m on m.id = d.message where m.topic = :topic order by d.delivery"""
                ),
                {"topic": TOPIC},
            ).all()
        standing = [tuple(row) for row in standing]
        assert standing == [("succeeded", 1, None), ("dead", 2, "no such address: nowhere")], standing
    print("SQLAlchemy: 1 mail, 1 dead letter after 2 attempts, 1 rolled back without a trace")


main()
