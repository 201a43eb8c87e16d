//! Which paths there are: one table, from which requests are routed and against which the document is held.

use std::fmt;

use hyper::Method;

use super::error::RequestError;

/// The methods of this API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    Get,
    Put,
    Patch,
    Delete,
}

impl Verb {
    /// The one that `method` is, if this API has it.
    #[must_use]
    pub fn of(method: &Method) -> Option<Self> {
        match *method {
            Method::GET => Some(Self::Get),
            Method::PUT => Some(Self::Put),
            Method::PATCH => Some(Self::Patch),
            Method::DELETE => Some(Self::Delete),
            _ => None,
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        })
    }
}

/// What a path and a method lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Each is named after its path.
pub enum Endpoint {
    InstanceInfo,
    Version,
    GetMachineConfig,
    PutMachineConfig,
    PatchMachineConfig,
    BootSource,
    Drive,
    NetworkInterface,
    Entropy,
    GuestChannel,
    Serial,
    Logger,
    Actions,
    VmState,
    VmConfig,
    CreateSnapshot,
    CancelCreate,
    LoadSnapshot,
    CancelLoad,
    Progress,
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// How.
    pub verb: Verb,
    /// What; a part in braces stands for a name.
    pub path: &'static str,
    /// Where it leads.
    pub endpoint: Endpoint,
}

const fn route(verb: Verb, path: &'static str, endpoint: Endpoint) -> Route {
    Route { verb, path, endpoint }
}

/// All that is served.
pub const ROUTES: [Route; 20] = [
    route(Verb::Get, "/", Endpoint::InstanceInfo),
    route(Verb::Get, "/version", Endpoint::Version),
    route(Verb::Get, "/machine-config", Endpoint::GetMachineConfig),
    route(Verb::Put, "/machine-config", Endpoint::PutMachineConfig),
    route(Verb::Patch, "/machine-config", Endpoint::PatchMachineConfig),
    route(Verb::Put, "/boot-source", Endpoint::BootSource),
    route(Verb::Put, "/drives/{drive_id}", Endpoint::Drive),
    route(
        Verb::Put,
        "/network-interfaces/{iface_id}",
        Endpoint::NetworkInterface,
    ),
    route(Verb::Put, "/entropy", Endpoint::Entropy),
    route(Verb::Put, "/guest-channel", Endpoint::GuestChannel),
    route(Verb::Put, "/serial", Endpoint::Serial),
    route(Verb::Put, "/logger", Endpoint::Logger),
    route(Verb::Put, "/actions", Endpoint::Actions),
    route(Verb::Patch, "/vm", Endpoint::VmState),
    route(Verb::Get, "/vm/config", Endpoint::VmConfig),
    route(Verb::Put, "/snapshot/create", Endpoint::CreateSnapshot),
    route(Verb::Delete, "/snapshot/create", Endpoint::CancelCreate),
    route(Verb::Put, "/snapshot/load", Endpoint::LoadSnapshot),
    route(Verb::Delete, "/snapshot/load", Endpoint::CancelLoad),
    route(Verb::Get, "/snapshot/progress", Endpoint::Progress),
];

/// What Firecracker serves and this version of Runnel does not: the methods, and the path's first parts.
const LATER: [(&[Verb], &str); 9] = [
    (&[Verb::Get, Verb::Put, Verb::Patch], "/balloon"),
    (&[Verb::Put], "/cpu-config"),
    (&[Verb::Patch, Verb::Delete], "/drives"),
    (&[Verb::Get, Verb::Put, Verb::Patch], "/hotplug/memory"),
    (&[Verb::Put], "/metrics"),
    (&[Verb::Get, Verb::Put, Verb::Patch], "/mmds"),
    (&[Verb::Patch, Verb::Delete], "/network-interfaces"),
    (&[Verb::Put, Verb::Patch, Verb::Delete], "/pmem"),
    (&[Verb::Put], "/vsock"),
];

/// Finds out where a request leads, and to which name if its path has one.
///
/// In Firecracker's order: a body that must or must not be there comes before the path. Slashes before and one
/// after the path do not matter; parts too many do, while Firecracker ignores them.
pub(super) fn resolve(
    verb: Verb,
    path: &str,
    has_body: bool,
) -> Result<(Endpoint, Option<&str>), RequestError> {
    match (verb, has_body) {
        (Verb::Get, true) => return Err(RequestError::BodyOfGet),
        (Verb::Delete, true) => return Err(RequestError::BodyOfDelete),
        (Verb::Put, false) => return Err(RequestError::EmptyPut),
        (Verb::Patch, false) => return Err(RequestError::EmptyPatch),
        _ => {}
    }
    let path = path.trim_start_matches('/');
    for route in ROUTES.iter().filter(|route| route.verb == verb) {
        if let Some(name) = matches(route.path, path) {
            return match name {
                Some(name) => Ok((route.endpoint, Some(checked_name(name)?))),
                None => Ok((route.endpoint, None)),
            };
        }
    }
    if verb == Verb::Put && path.trim_end_matches('/') == "snapshot" {
        return Err(RequestError::NoSnapshotOperation);
    }
    let shown = path.chars().take(200).collect();
    match is_later(verb, path) {
        true => Err(RequestError::Later { verb, path: shown }),
        false => Err(RequestError::Unknown { verb, path: shown }),
    }
}

/// Whether a later version may serve it: whoever asks for it has made no typing error.
fn is_later(verb: Verb, path: &str) -> bool {
    LATER.iter().any(|(verbs, first)| {
        let rest = path.strip_prefix(first.trim_start_matches('/'));
        verbs.contains(&verb) && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

/// Whether `path` is what `pattern` says, and which name it has where the pattern has braces.
fn matches<'p>(pattern: &str, path: &'p str) -> Option<Option<&'p str>> {
    let mut parts = path.split_terminator('/');
    let mut name = None;
    for expected in pattern.trim_start_matches('/').split_terminator('/') {
        if expected.starts_with('{') {
            // A name that is left out is an empty one, and not another path.
            name = Some(parts.next().unwrap_or(""));
        } else if parts.next() != Some(expected) {
            return None;
        }
    }
    parts.next().is_none().then_some(name)
}

fn checked_name(name: &str) -> Result<&str, RequestError> {
    if name.is_empty() {
        return Err(RequestError::EmptyId);
    }
    if !name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric()) {
        return Err(RequestError::InvalidId);
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(path: &str) -> Result<(Endpoint, Option<&str>), String> {
        resolve(Verb::Put, path, true).map_err(|error| error.to_string())
    }

    #[test]
    fn every_line_of_the_table_is_reached_and_no_path_is_there_twice() {
        for route in &ROUTES {
            let path = route.path.replace("{drive_id}", "a").replace("{iface_id}", "a");
            let has_body = matches!(route.verb, Verb::Put | Verb::Patch);
            assert_eq!(resolve(route.verb, &path, has_body).unwrap().0, route.endpoint);
        }
    }

    #[test]
    fn slashes_before_and_after_do_not_matter_and_parts_too_many_do() {
        assert_eq!(put("//machine-config/"), Ok((Endpoint::PutMachineConfig, None)));
        assert_eq!(put("/drives/root_1"), Ok((Endpoint::Drive, Some("root_1"))));
        assert!(
            put("/machine-config/more")
                .unwrap_err()
                .starts_with("Invalid request method and/or path: PUT")
        );
        assert!(put("/drives/a/b").is_err());
    }

    #[test]
    fn names_are_held_to_firecrackers_rules() {
        for path in ["/drives", "/drives/", "/network-interfaces"] {
            assert_eq!(put(path), Err("The ID cannot be empty.".to_owned()));
        }
        for path in ["/drives/a-b", "/drives/a%20b", "/drives/.."] {
            assert!(
                put(path).unwrap_err().contains("can only contain alphanumeric"),
                "{path}"
            );
        }
    }

    #[test]
    fn what_firecracker_serves_and_this_version_does_not_is_no_typing_error() {
        for (verb, path) in [
            (Verb::Put, "/vsock"),
            (Verb::Put, "/cpu-config/"),
            (Verb::Put, "/metrics"),
            (Verb::Get, "/mmds"),
            (Verb::Put, "/mmds/config"),
            (Verb::Get, "/balloon/hinting/status"),
            (Verb::Patch, "/hotplug/memory"),
            (Verb::Put, "/pmem/a"),
            (Verb::Patch, "/drives/a"),
            (Verb::Delete, "/network-interfaces/a"),
        ] {
            let has_body = matches!(verb, Verb::Put | Verb::Patch);
            let refusal = resolve(verb, path, has_body).unwrap_err().to_string();
            let name = path.trim_start_matches('/');
            assert_eq!(
                refusal,
                format!("{verb} {name} is not supported by this version of Runnel.")
            );
        }
    }

    #[test]
    fn unknown_paths_and_wrong_methods_are_refused_in_firecrackers_words() {
        assert_eq!(
            put("/foo"),
            Err("Invalid request method and/or path: PUT foo.".to_owned())
        );
        assert_eq!(
            put("/snapshot"),
            Err("Missing snapshot operation type.".to_owned())
        );
        let wrong = |verb, path, has_body| resolve(verb, path, has_body).unwrap_err().to_string();
        assert_eq!(
            wrong(Verb::Patch, "/boot-source", true),
            "Invalid request method and/or path: PATCH boot-source."
        );
        assert_eq!(
            put("/vsocks"),
            Err("Invalid request method and/or path: PUT vsocks.".to_owned())
        );
        assert_eq!(
            wrong(Verb::Get, "/version", true),
            "GET request cannot have a body."
        );
        assert_eq!(wrong(Verb::Put, "/foo", false), "Empty PUT request.");
        assert_eq!(wrong(Verb::Patch, "/vm", false), "Empty PATCH request.");
        assert_eq!(
            wrong(Verb::Delete, "/snapshot/create", true),
            "DELETE request cannot have a body."
        );
    }
}
