//! What clients ask of a server of images and of a monitor, and a machine's file.

use runnel_agent::serve::fuzz as serve;
use runnel_vmm::api::{Verb, fuzz as api};
use runnel_vmm::config::WholeFile;

use crate::input::{lines, text};

const TOKEN: &str = "0123456789abcdef";
const REPOSITORIES: [&str; 4] = ["db", "team/db", "team/web", "web"];

/// Path, query, `Range`, `Authorization` and what the range is of; a line each.
pub fn serve_request(bytes: &[u8]) -> bool {
    let [path, query, range, authorization, length] = lines(bytes);
    let length = text(length).trim().parse().unwrap_or(10);
    let path = serve::reads_path(text(path));
    let query = serve::reads_page(text(query), &REPOSITORIES);
    let _ = serve::reads_range(range, length);
    if serve::admits(TOKEN, authorization) {
        assert!(authorization.len() >= TOKEN.len());
    }
    path && query
}

/// `VERB PATH`, and from the second line on the body.
pub fn api_request(bytes: &[u8]) -> bool {
    let [first, body] = lines(bytes);
    let Some((verb, path)) = text(first).split_once(' ') else {
        return false;
    };
    let verb = match verb {
        "GET" => Verb::Get,
        "PUT" => Verb::Put,
        "PATCH" => Verb::Patch,
        "DELETE" => Verb::Delete,
        _ => return false,
    };
    api::reads_request(verb, path, body)
}

/// A configuration file. The files that it names are not looked for.
pub fn config_file(bytes: &[u8]) -> bool {
    let Ok(file) = WholeFile::parse(text(bytes)) else {
        return false;
    };
    let _ = file.unknown_parts().count();
    let written = serde_json::to_string(&file).expect("what was read can be written");
    let again = WholeFile::parse(&written).expect("what was written can be read");
    let again = serde_json::to_string(&again).expect("what was read can be written");
    assert_eq!(again, written);
    true
}
