//! A key that is no field, and a topic that is none.
use postbox::Message;

#[derive(serde::Serialize, Message)]
#[message(topic = "orders.placed", key = order)]
struct OrderPlaced {
    order_id: i64,
}

#[derive(serde::Serialize, Message)]
#[message(topic = "orders..placed")]
struct BadTopic {}

fn main() {}
