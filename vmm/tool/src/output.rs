//! What commands print: text for people, JSON for scripts.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

use clap::Args;
use serde::Serialize;

/// How a command's result is printed.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print JSON, for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Standard output takes no more.
#[derive(Debug, thiserror::Error)]
#[error("standard output cannot be written to")]
pub(crate) struct OutputError(#[from] io::Error);

/// Prints text, which ends its own lines.
///
/// # Errors
/// When standard output takes no more.
pub(crate) fn print(text: &str) -> Result<(), OutputError> {
    print_bytes(text.as_bytes())
}

/// Prints bytes that come from elsewhere, as they are.
///
/// # Errors
/// When standard output takes no more.
pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}

/// Prints JSON.
///
/// # Errors
/// When standard output takes no more.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), OutputError> {
    let mut text = serde_json::to_string_pretty(value).map_err(io::Error::from)?;
    text.push('\n');
    print(&text)
}

/// Tells people a line, on standard error. Where that takes nothing, nobody wants to know.
pub(crate) fn tell(text: impl Display) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Whether `--verbose` was given: then what is started says more in its log, too.
pub(crate) fn is_verbose() -> bool {
    tracing::enabled!(tracing::Level::DEBUG)
}

/// Whether standard output was closed by whoever reads it.
pub(crate) fn is_closed(error: &(dyn Error + 'static)) -> bool {
    let is_closed = |error: &(dyn Error + 'static)| {
        let error = error.downcast_ref();
        error.is_some_and(|OutputError(source)| source.kind() == io::ErrorKind::BrokenPipe)
    };
    std::iter::successors(Some(error), |&error| error.source()).any(is_closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("reading /x failed")]
    struct Outer(#[source] io::Error);

    #[test]
    fn standard_output_alone_is_what_readers_close() {
        let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed(&OutputError(closed())));
        assert!(!is_closed(&OutputError(io::ErrorKind::StorageFull.into())));
        assert!(!is_closed(&Outer(closed())));
    }
}
