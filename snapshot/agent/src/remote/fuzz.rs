//! What is read of a server, for whoever feeds it strange bytes: the readers, and what must hold of all they accept.

use super::Credentials;
use super::answer::Answer;
use super::connection::Connection;
use super::credentials::{Challenge, escape, is_printable};
use super::url::{Origin, Url};

/// The longest body that is read whole here.
const BODY_BYTES_MAX: u64 = 16 << 10;

/// Reads `bytes` as an answer, and half of its body in pieces before the rest. Whether it is one.
///
/// # Panics
/// When more comes out of it than went in.
#[must_use]
pub fn reads_answer(bytes: &[u8]) -> bool {
    let Some(mut answer) = Connection::of_bytes(bytes)
        .ok()
        .and_then(|connection| Answer::read(connection).ok())
    else {
        return false;
    };
    assert!(answer.head.status >= 200, "an interim answer is none");
    if let Some((first, last, _)) = answer.head.content_range() {
        // What a range may be is its reader's to say; that it is two numbers is said here.
        let _ = first.checked_sub(last);
    }
    let mut piece = [0; 7];
    let half = answer.length().unwrap_or(0) / 2;
    if answer.skip(half.min(BODY_BYTES_MAX)).is_err() || answer.read_some(&mut piece).is_err() {
        return false;
    }
    let Ok(rest) = answer.read_rest(BODY_BYTES_MAX) else {
        return false;
    };
    assert!(rest.len() <= bytes.len(), "a body is no longer than its answer");
    if let Some(connection) = answer.finish() {
        assert!(connection.ahead.is_empty(), "a connection that is kept is clean");
    }
    true
}

/// Reads `base` as a URL, and `location` as where it leads to. Whether both are.
///
/// # Panics
/// When a URL that was taken cannot stand in a request.
#[must_use]
pub fn reads_url(base: &str, location: &str) -> bool {
    let Ok(base) = Url::parse(base) else {
        return false;
    };
    check_url(&base);
    match base.join(location) {
        Ok(led) => check_url(&led),
        Err(_) => return false,
    }
    true
}

fn check_url(url: &Url) {
    assert!(url.target.starts_with('/'), "{url}: a target is a path");
    assert!(
        is_printable(&url.target) && !url.target.contains('#'),
        "{url}: a target ends no line"
    );
    assert!(!url.origin.host.is_empty(), "{url}: a server has a name");
    assert!(
        is_printable(&url.origin.host_header()),
        "{url}: a server's name ends no line"
    );
    // What is shown of a server leads to it again.
    let shown = url.origin.to_string();
    let again = Origin::parse(&shown).expect("a server that is shown is a URL");
    assert_eq!(again, url.origin, "{shown}");
}

/// Reads `text` as what a server that answers 401 wants. Whether it is.
///
/// # Panics
/// When a parameter that is sent on can end a request's line.
#[must_use]
pub fn reads_challenge(text: &str) -> bool {
    match Challenge::parse(text) {
        None => false,
        Some(Challenge::Basic) => true,
        Some(Challenge::Bearer { service, scope, .. }) => {
            for value in service.iter().chain(&scope) {
                let escaped = escape(value);
                assert!(escaped.is_empty() || is_printable(&escaped), "{escaped:?}");
            }
            true
        }
    }
}

/// Reads `text` as a file of credentials, and what of it goes to `server`. Whether it is such a file.
///
/// # Panics
/// When a secret can end a request's line.
#[must_use]
pub fn reads_credentials(text: &[u8], server: &str) -> bool {
    let Ok(credentials) = Credentials::parse(text) else {
        return false;
    };
    if let Ok(origin) = Origin::parse(server) {
        for header in [credentials.bearer(&origin), credentials.basic(&origin)]
            .into_iter()
            .flatten()
        {
            let (_, secret) = header.split_once(' ').expect("a scheme comes first");
            assert!(is_printable(secret), "a secret ends no line");
        }
    }
    true
}
