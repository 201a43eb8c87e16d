//! The commands, a file each.

pub(crate) mod agent;
mod complete;
pub(crate) mod console;
pub(crate) mod doctor;
pub(crate) mod fork;
pub(crate) mod image;
pub(crate) mod inspect;
mod loading;
pub(crate) mod logs;
pub(crate) mod optimize;
pub(crate) mod ps;
pub(crate) mod resume;
mod rewrite;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod shell;
pub(crate) mod snapshot;
mod squash;
pub(crate) mod stop;
pub(crate) mod vcpus;
pub(crate) mod verify;
pub(crate) mod wait;

/// Why a command failed: an error of whatever it used. Its trace is printed.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;
