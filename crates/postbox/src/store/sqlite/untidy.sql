-- Whether there is something to remove.
select exists (select 1 from postbox_dedup where expires_at <= c.now)
    or exists (select 1 from postbox_part p where p.at < c.now - 86400000
        and not exists (select 1 from postbox_lease l where l.batch = p.batch))
    or exists (select 1 from postbox_inbox i where i.expires_at <= c.now)
    or exists (select 1 from postbox_quarantine q where q.ended_at < c.now - 2592000000)
from postbox_clock c
