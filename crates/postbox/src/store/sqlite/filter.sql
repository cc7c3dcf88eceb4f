-- What a filter says of a delivery d, its subscription s and its message m. JSON arrays or null: ?2 states,
-- ?3 subscriptions, ?4 segments of topic patterns, ?5 keys, ?9 applications; ids or null: the message's
-- is at least ?7 and below ?8.
    and (?2 is null or case when d.state = 'running' and s.kind = 'operation' and not d.begun then 'pending' else d.state end
        in (select value from json_each(?2)))
    and (?3 is null or s.name in (select value from json_each(?3)))
    and (?5 is null or m.key in (select value from json_each(?5)))
    and (?4 is null or exists (
        -- As in the view postbox_match.
        select 1 from json_each(?4) t
        where case when t.value ->> '$[#-1]' = '>'
                then json_array_length(t.value) <= length(m.topic) - length(replace(m.topic, '.', '')) + 1
                else json_array_length(t.value) = length(m.topic) - length(replace(m.topic, '.', '')) + 1
            end
            and not exists (
                select 1 from json_each(t.value) p
                where p.value not in ('*', '>')
                    and p.value <> json_extract('["' || replace(m.topic, '.', '","') || '"]', '$[' || p.key || ']'))))
    and (?9 is null or s.application in (select value from json_each(?9)))
    and (?7 is null or d.message >= ?7 and d.last_message >= ?7) and (?8 is null or d.message < ?8 and d.first_message < ?8)
