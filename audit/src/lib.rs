//! What a record says, for all who read records: the collector filters by it, the command line prints it, and
//! explanations and drafts of profiles begin with it.
//!
//! [`View`] is the way in. What is particular to a kind of event stands in one file of `family/`, as an
//! implementation of `Says`; the table in [`kind`] is the only list of kinds. One way through the modules:
//! `common` ← [`line`], [`refusal`], [`observe`] ← `family` ← [`kind`] ← [`view`] ← [`filter`]. Nothing here reads a
//! file or a clock.

mod common;
mod family;
pub mod filter;
pub mod kind;
pub mod line;
pub mod observe;
pub mod refusal;
pub mod view;

pub use self::{common::Verdict, kind::Kind, line::Line, view::View};
