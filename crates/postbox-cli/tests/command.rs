//! The tests of the command in one program, a file each. Those of one file: `scripts/test --test command bulk::`.

mod place;

mod bad_input;
mod bulk;
mod cli;
mod denied;
mod flow;
mod keys;
mod schedules;
mod serve;
mod serve_check;
