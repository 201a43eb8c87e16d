//! An error as people read it: with why.

use std::error::Error;

/// The error and its causes in one line, for logs, reports and clients that get a reason as text. A cause that a text
/// ends with already, as some of Firecracker's do, is not said again.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    #[error("no such chunk")]
    struct Innermost;

    #[derive(Debug, Error)]
    #[error("reading the index")]
    struct Plain(#[source] Innermost);

    #[derive(Debug, Error)]
    #[error("opening the image: {0}")]
    struct SaysItself(#[source] Plain);

    #[test]
    fn causes_follow_in_order_and_none_is_said_twice() {
        assert_eq!(with_causes(&Innermost), "no such chunk");
        assert_eq!(with_causes(&Plain(Innermost)), "reading the index: no such chunk");
        assert_eq!(
            with_causes(&SaysItself(Plain(Innermost))),
            "opening the image: reading the index: no such chunk"
        );
    }
}
