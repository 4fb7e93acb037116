//! Profiles as pure values.
//!
//! The way of a rule: YAML is read into a [`Profile`](document::Profile) by [`document`]; the profiles that
//! [select](selector) a container are united into a [`Policy`](policy::Policy); [`image`] compiles that into a
//! policy image, pure bytes for the kernel's maps; `evaluate` of each section gives the verdict that the kernel gives on it.
//! A section of profiles ([`exec`], …) is a folder: its reader, policy, image and evaluation. Nothing here reads a file, a clock or a kernel, so all of it can be fuzzed and replayed anywhere.

pub mod automaton;
pub mod digest;
pub mod document;
pub mod exec;
pub mod explain;
pub mod glob;
pub mod image;
pub mod learn;
pub mod mode;
pub mod origin;
pub mod policy;
pub mod problem;
mod read;
pub mod selector;
pub mod session;
pub mod text;
