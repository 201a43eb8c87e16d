//! Where requests go: an origin (RFC 6454: scheme, host, port) and a target on it.

use std::fmt;

use runnel_snapshot::image::reference::without_secret;

/// The longest URL that is taken from a redirect or a challenge.
const URL_BYTES_MAX: usize = 8 << 10;

/// A server: who is given credentials, and whose connections are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Whether TLS is spoken.
    pub(super) tls: bool,
    /// A name or an address, an IPv6 address without its brackets.
    pub(super) host: String,
    /// The port, also where the scheme implies it.
    pub(super) port: u16,
}

/// A place on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) origin: Origin,
    /// Path and query, as they stand in a request.
    pub(super) target: String,
}

/// Text that is no URL this client speaks.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no URL: {reason}")]
pub struct BadUrl {
    text: String,
    reason: &'static str,
}

const EXPECTED: &str = "expected http(s)://host:port and a path";

impl Origin {
    /// The server of an image at `base`, which is a scheme, a host and a port.
    ///
    /// # Errors
    /// When it is none of a URL.
    pub fn parse(base: &str) -> Result<Self, BadUrl> {
        Ok(Url::parse(base)?.origin)
    }

    /// Whether nobody on the way can read what is sent there.
    pub(super) fn is_private(&self) -> bool {
        let address: Option<std::net::IpAddr> = self.host.parse().ok();
        self.tls || self.host == "localhost" || address.is_some_and(|address| address.is_loopback())
    }

    /// Whether a password for this server may go to `realm`, of which it says that it gives the token: on no way that is
    /// less private than the one to the server itself.
    pub(super) fn may_send_to(&self, realm: &Self) -> bool {
        match (self.tls, self.is_private()) {
            (true, _) => realm.tls,
            (false, true) => realm.is_private(),
            (false, false) => true,
        }
    }

    /// The `Host` of requests (RFC 9112 §3.2): the port only where it is not the scheme's own.
    pub(super) fn host_header(&self) -> String {
        let host = self.bracketed();
        if self.port == default_port(self.tls) {
            host
        } else {
            format!("{host}:{}", self.port)
        }
    }

    fn bracketed(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.host_header())
    }
}

impl Url {
    /// Reads an absolute URL.
    pub(super) fn parse(text: &str) -> Result<Self, BadUrl> {
        let refuse = |reason| BadUrl {
            text: without_secret(text).chars().take(200).collect(),
            reason,
        };
        let bad = || refuse(EXPECTED);
        // What goes into a request's first line must not end it.
        let clean = text.len() <= URL_BYTES_MAX && text.bytes().all(|c| c.is_ascii_graphic());
        let (scheme, rest) = text.split_once("://").filter(|_| clean).ok_or_else(bad)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err(bad()),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, target) = rest.split_at(end);
        let (host, port) = split_authority(authority, tls).map_err(refuse)?;
        let target = match target.as_bytes().first() {
            Some(b'/') => target.to_owned(),
            _ => format!("/{target}"),
        };
        Ok(Self {
            origin: Origin { tls, host, port },
            target,
        })
    }

    /// Where a `Location` leads that this URL was answered with (RFC 3986 §5, the forms that servers use).
    pub(super) fn join(&self, location: &str) -> Result<Self, BadUrl> {
        if location.contains("://") && !location.starts_with('/') {
            return Self::parse(location);
        }
        let scheme = if self.origin.tls { "https" } else { "http" };
        if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{scheme}://{rest}"));
        }
        if location.starts_with('/') {
            return Self::parse(&format!("{}{location}", self.origin));
        }
        let path = self.target.split('?').next().unwrap_or_default();
        let folder = &path[..path.rfind('/').map_or(0, |slash| slash + 1)];
        Self::parse(&format!("{}{folder}{location}", self.origin))
    }
}

impl fmt::Display for Url {
    /// Without the query: signed URLs carry secrets there, and this is for logs and errors.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.target.split('?').next().unwrap_or_default();
        write!(f, "{}{path}", self.origin)
    }
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

fn split_authority(authority: &str, tls: bool) -> Result<(String, u16), &'static str> {
    // User and password in a URL are never right here.
    if authority.contains('@') {
        return Err(EXPECTED);
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or(EXPECTED)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| EXPECTED)?;
            match rest {
                "" => (host, None),
                rest => (host, Some(rest.strip_prefix(':').ok_or(EXPECTED)?)),
            }
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = match port {
        None | Some("") => default_port(tls),
        Some(port) => port.parse().map_err(|_| "a port is a number from 0 to 65535")?,
    };
    if host.is_empty() || host.contains(['/', '\\']) {
        return Err(EXPECTED);
    }
    Ok((host.to_ascii_lowercase(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_takes_no_way_that_is_less_private_than_that_to_its_server() {
        let may_send = |server: &str, realm: &str| {
            let (server, realm) = (Origin::parse(server).unwrap(), Origin::parse(realm).unwrap());
            server.may_send_to(&realm)
        };
        let (with_tls, here, in_the_clear) =
            ("https://far.example", "http://127.0.0.1:80", "http://far.example");
        for server in [with_tls, here, in_the_clear] {
            assert!(
                may_send(server, server) && may_send(server, "https://auth.example"),
                "{server}"
            );
        }
        assert!(may_send(here, "http://localhost:81"));
        assert!(may_send(in_the_clear, "http://auth.example"));
        assert!(!may_send(with_tls, "http://auth.example"));
        assert!(!may_send(with_tls, here));
        assert!(!may_send(here, "http://auth.example"));
    }

    #[test]
    fn what_is_sent_with_tls_or_stays_on_this_host_is_private() {
        let is_private = |base: &str| Origin::parse(base).unwrap().is_private();
        for base in [
            "https://far",
            "http://127.0.0.1:5000",
            "http://[::1]:5000",
            "http://localhost",
        ] {
            assert!(is_private(base), "{base}");
        }
        for base in [
            "http://far",
            "http://10.0.0.1:5000",
            "http://localhost.far",
            "http://127.0.0.1.far",
        ] {
            assert!(!is_private(base), "{base}");
        }
    }

    #[test]
    fn origins_are_told_apart_by_scheme_host_and_port() {
        let origin = |text: &str| Url::parse(text).unwrap().origin;
        assert_eq!(origin("http://a/x"), origin("HTTP://A:80/y?z"));
        assert_eq!(origin("https://a"), origin("https://a:443/"));
        for other in ["https://a/x", "http://a:81/x", "http://b/x"] {
            assert_ne!(origin("http://a/x"), origin(other));
        }
        assert_eq!(origin("http://[::1]:7070/x").host_header(), "[::1]:7070");
        assert_eq!(origin("https://a/x").host_header(), "a");
    }

    #[test]
    fn redirects_lead_where_browsers_would_go() {
        let from = Url::parse("http://a:7070/v2/web/blobs/x?y").unwrap();
        for (location, to, target) in [
            ("https://b/c?sig=1#frag", "https://b/c", "/c?sig=1"),
            ("//b/c", "http://b/c", "/c"),
            ("/c?next=http://x/", "http://a:7070/c", "/c?next=http://x/"),
            ("c", "http://a:7070/v2/web/blobs/c", "/v2/web/blobs/c"),
            ("https://b?c", "https://b/", "/?c"),
        ] {
            let url = from.join(location).unwrap();
            assert_eq!(
                (url.to_string().as_str(), url.target.as_str()),
                (to, target),
                "{location}"
            );
        }
    }

    #[test]
    fn what_could_smuggle_a_request_or_a_password_is_no_url() {
        for text in [
            "",
            "a/b",
            "ftp://a/",
            "http://",
            "http://:80/",
            "http://a:99999/",
            "http://u:p@a/",
            "http://a/x\r\nHost: b",
            "http://a/x y",
            "http://[a]/",
            "http://[::1]x/",
        ] {
            assert!(Url::parse(text).is_err(), "{text}");
        }
        let told = Url::parse("http://a:99999/").unwrap_err().to_string();
        assert!(told.contains("65535"), "{told}");
        assert!(Url::parse(&format!("http://a/{}", "x".repeat(URL_BYTES_MAX))).is_err());
    }
}
