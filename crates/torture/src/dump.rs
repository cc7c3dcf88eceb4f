//! The last witness: what the database says in the end.

use sqlx::Pool;

use crate::fault::Kind;
use crate::history::{Attempt, Audited, Claim, Delivery, History, Message, Observed, Resolved, Sample, Seen, Written};
use crate::site::{Site, Texts};

fn text(row: &Texts, index: usize) -> String {
    row.get(index).cloned().flatten().unwrap_or_default()
}

fn whole(row: &Texts, index: usize) -> Option<i64> {
    row.get(index).cloned().flatten().and_then(|t| t.parse().ok())
}

fn count(row: &Texts, index: usize) -> u32 {
    whole(row, index).unwrap_or_default().max(0) as u32
}

async fn read<Db: Site>(pool: &Pool<Db>, sql: String) -> Result<Vec<Texts>, sqlx::Error> {
    let mut connection = Db::acquire(pool).await?;
    Db::rows(&mut connection, sql).await
}

/// Reads everything into the history.
pub(crate) async fn dump<Db: Site>(pool: &Pool<Db>, history: &mut History) -> Result<(), sqlx::Error> {
    let messages = match Db::KIND {
        Kind::Postgres => {
            "select cast(m.id as text), m.topic, m.external_id,
                cast(cast(extract(epoch from m.due_at) * 1000 as bigint) as text), m.payload ->> 'body',
                array_to_string(m.deliveries || array(select l.delivery from postbox.late_delivery l where l.message = m.id), ',')
             from postbox.message m"
        }
        Kind::Sqlite => {
            "select hex(m.id), m.topic, m.external_id, cast(m.due_at as text), json_extract(m.payload, '$.body'), ''
             from postbox_message m"
        }
    };
    history.messages = read(pool, messages.into())
        .await?
        .iter()
        .map(|r| Message {
            id: text(r, 0),
            topic: text(r, 1),
            ext: text(r, 2),
            due_ms: whole(r, 3),
            body: r.get(4).cloned().flatten(),
            deliveries: text(r, 5).split(',').filter_map(|d| d.parse().ok()).collect(),
        })
        .collect();
    let deliveries = match Db::KIND {
        Kind::Postgres => {
            "select cast(d.delivery as text), d.state, s.name, cast(d.message as text), cast(d.attempt as text),
                cast(d.rev as text), d.note, cast(l.replay_of as text)
             from postbox.delivery d join postbox.subscription s on s.id = d.subscription
             left join postbox.late_delivery l on l.delivery = d.delivery"
        }
        Kind::Sqlite => {
            "select cast(d.id as text), d.state, s.name, hex(d.message), cast(d.attempt as text), cast(d.rev as text), d.note,
                cast(d.replay_of as text)
             from postbox_every d join postbox_subscription s on s.id = d.subscription"
        }
    };
    history.deliveries = read(pool, deliveries.into())
        .await?
        .iter()
        .map(|r| Delivery {
            id: whole(r, 0).unwrap_or_default(),
            state: text(r, 1),
            subscription: text(r, 2),
            message: text(r, 3),
            attempts: count(r, 4),
            rev: whole(r, 5).unwrap_or_default(),
            note: text(r, 6),
            replay_of: whole(r, 7),
        })
        .collect();
    let attempts = match Db::KIND {
        Kind::Postgres => {
            "select cast(t.delivery as text), cast(t.number as text), t.kind,
                cast(cast(extract(epoch from t.started_at) * 1000 as bigint) as text),
                cast(cast(extract(epoch from t.finished_at) * 1000 as bigint) as text), t.error,
                cast(a.worker as text) || '/' || cast(a.batch as text),
                cast(o.worker as text) || '/' || cast(o.batch as text)
             from postbox.attempts t
             left join postbox.attempt a on a.delivery = t.delivery and a.number = t.number
             left join postbox.outcome o on o.delivery = t.delivery and o.number = t.number"
        }
        Kind::Sqlite => {
            "select cast(o.delivery as text), cast(o.number as text), o.kind, cast(o.started_at as text),
                cast(o.finished_at as text), o.error, hex(a.worker) || '/' || a.batch, hex(o.worker) || '/' || o.batch
             from postbox_ended o
             left join postbox_attempt a on a.delivery = o.delivery and a.number = o.number
             union all
             select cast(a.delivery as text), cast(a.number as text), null, cast(a.started_at as text), null, null,
                hex(a.worker) || '/' || a.batch, null
             from postbox_attempt a
             where not exists (select 1 from postbox_outcome o where o.delivery = a.delivery and o.number = a.number)"
        }
    };
    history.attempts = read(pool, attempts.into())
        .await?
        .iter()
        .map(|r| Attempt {
            delivery: whole(r, 0).unwrap_or_default(),
            number: count(r, 1),
            outcome: r.get(2).cloned().flatten(),
            started_ms: whole(r, 3).unwrap_or_default(),
            finished_ms: whole(r, 4),
            error: text(r, 5),
            begun_by: r.get(6).cloned().flatten(),
            ended_by: r.get(7).cloned().flatten(),
        })
        .collect();
    history.claims = claims(pool).await?;
    history.written = written(pool).await?;
    let resolutions = format!(
        "select cast(delivery as text), cast(number as text), answer, source, state_after from {}",
        Db::postbox("resolution")
    );
    history.resolutions = read(pool, resolutions)
        .await?
        .iter()
        .map(|r| Resolved {
            delivery: whole(r, 0).unwrap_or_default(),
            number: count(r, 1),
            answer: text(r, 2),
            source: text(r, 3),
            state_after: text(r, 4),
        })
        .collect();
    let worker = if Db::KIND == Kind::Postgres { "cast(worker as text)" } else { "hex(worker)" };
    let observations = format!(
        "select cast(delivery as text), cast(number as text), {worker}, kind from {}",
        Db::postbox("observation")
    );
    history.observations = read(pool, observations)
        .await?
        .iter()
        .map(|r| Observed {
            delivery: whole(r, 0).unwrap_or_default(),
            number: count(r, 1),
            worker: text(r, 2),
            kind: text(r, 3),
        })
        .collect();
    let audit = match Db::KIND {
        Kind::Postgres => {
            "select cast(seq as text), action, cast(delivery as text), cast(rev_before as text), cast(rev_after as text),
                state_before, state_after, cast(cast(extract(epoch from at) * 1000 as bigint) as text), reason,
                detail ->> 'replayed_as'
             from postbox.audit"
        }
        Kind::Sqlite => {
            "select cast(seq as text), action, cast(delivery as text), cast(rev_before as text), cast(rev_after as text),
                state_before, state_after, cast(at as text), reason,
                cast(json_extract(detail, '$.replayed_as') as text)
             from postbox_audit"
        }
    };
    history.audit = read(pool, audit.into())
        .await?
        .iter()
        .map(|r| Audited {
            seq: whole(r, 0).unwrap_or_default(),
            action: text(r, 1),
            delivery: whole(r, 2),
            rev_before: whole(r, 3),
            rev_after: whole(r, 4),
            state_before: text(r, 5),
            state_after: text(r, 6),
            at_ms: whole(r, 7).unwrap_or_default(),
            reason: text(r, 8),
            replayed_as: whole(r, 9),
        })
        .collect();
    let effects = format!(
        "select ext, cast(delivery as text), cast(number as text), cast(clock as text) from {}",
        Db::table("effect")
    );
    history.effects = read(pool, effects)
        .await?
        .iter()
        .map(|r| Seen {
            ext: text(r, 0),
            delivery: whole(r, 1).unwrap_or_default(),
            number: count(r, 2),
            clock: whole(r, 3).unwrap_or_default(),
            done: true,
        })
        .collect();
    let business = format!("select ext from {}", Db::table("business"));
    history.business = read(pool, business).await?.iter().map(|r| text(r, 0)).collect();
    Ok(())
}

async fn claims<Db: Site>(pool: &Pool<Db>) -> Result<Vec<Claim>, sqlx::Error> {
    let sql = match Db::KIND {
        Kind::Postgres => {
            "select cast(c.worker as text) || '/' || cast(c.batch as text), cast(i.delivery as text), cast(i.rev as text),
                cast(i.attempt + 1 as text)
             from torture.claim c cross join lateral unnest(c.deliveries, c.revs, c.attempts) as i(delivery, rev, attempt)"
        }
        Kind::Sqlite => {
            "select hex(worker) || '/' || batch, cast(delivery as text), cast(rev as text), cast(attempt + 1 as text)
             from torture_claim"
        }
    };
    let claim = |r: &Texts| Claim {
        by: text(r, 0),
        delivery: whole(r, 1).unwrap_or_default(),
        rev: whole(r, 2).unwrap_or_default(),
        number: count(r, 3),
    };
    Ok(read(pool, sql.into()).await?.iter().map(claim).collect())
}

/// Outcomes, with those that are kept many in a row. Nobody's have the batch 0.
async fn written<Db: Site>(pool: &Pool<Db>) -> Result<Vec<Written>, sqlx::Error> {
    let sql = match Db::KIND {
        // A success that is kept so went the straight way: claimed at revision 1.
        Kind::Postgres => {
            "select case when o.batch <> 0 then cast(o.worker as text) || '/' || cast(o.batch as text) end,
                cast(o.delivery as text), cast(o.number as text), cast(o.rev as text)
             from postbox.outcome o
             union all
             select cast(p.worker as text) || '/' || cast(p.batch as text), cast(d.delivery as text), '1', '2'
             from postbox.outcome_part p cross join lateral unnest(p.deliveries) as d(delivery)"
        }
        Kind::Sqlite => {
            "select case when batch <> 0 then hex(worker) || '/' || batch end, cast(delivery as text),
                cast(number as text), cast(rev as text)
             from postbox_ended"
        }
    };
    let written = |r: &Texts| Written {
        by: r.first().cloned().flatten(),
        delivery: whole(r, 1).unwrap_or_default(),
        number: count(r, 2),
        rev: whole(r, 3).unwrap_or_default(),
    };
    Ok(read(pool, sql.into()).await?.iter().map(written).collect())
}

/// Some deliveries that are in an end state now; they are looked at again in the end.
pub(crate) async fn sample<Db: Site>(pool: &Pool<Db>) -> Result<Vec<(i64, Sample)>, sqlx::Error> {
    let (view, id) = match Db::KIND {
        Kind::Postgres => ("postbox.delivery", "delivery"),
        Kind::Sqlite => ("postbox_every", "id"),
    };
    let sql = format!(
        "select cast({id} as text), state, cast(rev as text) from {view}
         where state in ('succeeded', 'dead', 'cancelled') order by {id} desc limit 300"
    );
    let rows = read(pool, sql).await?;
    let sample = |r: &Texts| Sample { state: text(r, 1), rev: whole(r, 2).unwrap_or_default() };
    Ok(rows.iter().map(|r| (whole(r, 0).unwrap_or_default(), sample(r))).collect())
}

/// How many deliveries are not at an end, and some of them in words.
pub(crate) async fn unfinished<Db: Site>(pool: &Pool<Db>) -> Result<(i64, String), sqlx::Error> {
    let (view, id) = match Db::KIND {
        Kind::Postgres => ("postbox.delivery", "delivery"),
        Kind::Sqlite => ("postbox_every", "id"),
    };
    let sql = format!(
        "select cast(d.{id} as text), d.state, s.name, cast(d.attempt as text), d.note
         from {view} d join {} s on s.id = d.subscription
         where d.state in ('pending', 'running', 'in_doubt') order by 1 limit 1000",
        Db::postbox("subscription")
    );
    let rows = read(pool, sql).await?;
    let told: Vec<String> = (rows.iter().take(5))
        .map(|r| {
            format!("{} {} of {} after {} attempts ({})", text(r, 0), text(r, 1), text(r, 2), text(r, 3), text(r, 4))
        })
        .collect();
    Ok((rows.len() as i64, told.join("; ")))
}

/// What must not be left once all is quiet and the workers have stopped.
pub(crate) async fn leftovers<Db: Site>(pool: &Pool<Db>) -> Result<Vec<String>, sqlx::Error> {
    let mut left = Vec::new();
    for (table, what) in [("lease", "leases are left"), ("worker", "workers are left, though all have stopped")] {
        let rows = read(pool, format!("select cast(count(*) as text) from {}", Db::postbox(table))).await?;
        let n = rows.first().map_or(0, |r| count(r, 0));
        if n > 0 {
            left.push(format!("{n} {what}"));
        }
    }
    Ok(left)
}

/// Sessions that sit in a transaction and do nothing, with their age in milliseconds.
pub(crate) async fn idle_in_transaction<Db: Site>(pool: &Pool<Db>) -> Result<Vec<String>, sqlx::Error> {
    if Db::KIND == Kind::Sqlite {
        return Ok(Vec::new());
    }
    let sql = "select application_name, cast(cast(extract(epoch from clock_timestamp() - state_change) * 1000 as bigint) as text), query
         from pg_stat_activity
         where datname = current_database() and state like 'idle in transaction%' and pid <> pg_backend_pid()
             and clock_timestamp() - state_change > interval '2 s'";
    let rows = read(pool, sql.into()).await?;
    let told = |r: &Texts| {
        let last: String = text(r, 2).chars().take(80).collect();
        format!(
            "a session of `{}` has been idle in a transaction for {} ms; it said last: {last}",
            text(r, 0),
            text(r, 1)
        )
    };
    Ok(rows.iter().map(told).collect())
}
