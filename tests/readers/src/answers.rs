//! What a server says to an agent, and what an agent knows of its servers.

use runnel_agent::remote::fuzz;

use crate::input::{lines, text};

/// The longest answer that fits into a socket.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// An answer: head, framing and body.
pub fn http_answer(bytes: &[u8]) -> bool {
    bytes.len() <= ANSWER_BYTES_MAX && fuzz::reads_answer(bytes)
}

/// A URL, where a `Location` leads from it, and a `WWW-Authenticate`; a line each.
pub fn http_fields(bytes: &[u8]) -> bool {
    let [base, location, challenge] = lines(bytes).map(text);
    let url = fuzz::reads_url(base, location);
    let challenge = fuzz::reads_challenge(challenge);
    url && challenge
}

/// A server, then a file of credentials.
pub fn credentials(bytes: &[u8]) -> bool {
    let [server, file] = lines(bytes);
    fuzz::reads_credentials(file, text(server))
}
