//! What is known of who may pull: the file that `docker login`, `skopeo login` and their like write
//! (containers-auth.json(5)), and what servers ask for (RFC 7235 challenges, as registries use them).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::url::Origin;

/// The longest credentials file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why credentials cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file cannot be read.
    #[error("the credentials in {path} cannot be read")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file makes no sense.
    #[error("the credentials in {path} make no sense: expected what `skopeo login --authfile` writes")]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// A secret for one server.
#[derive(Clone, PartialEq, Eq, Deserialize)]
struct Login {
    /// `user:password` in base64.
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    /// A bearer's token, sent as it is.
    #[serde(default, alias = "registrytoken")]
    registry_token: String,
}

/// Secrets by server.
#[derive(Clone, Default, Deserialize)]
pub struct Credentials {
    #[serde(default)]
    auths: BTreeMap<String, Login>,
}

impl Credentials {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn read(path: &Path) -> Result<Self, CredentialsError> {
        let unreadable = |source| CredentialsError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        let file = File::open(path).map_err(unreadable)?;
        file.take(FILE_BYTES_MAX)
            .read_to_end(&mut text)
            .map_err(unreadable)?;
        Self::parse(&text).map_err(|source| CredentialsError::Malformed {
            path: path.to_owned(),
            source,
        })
    }

    /// Reads what such a file holds.
    pub(super) fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// A bearer's token for one server: `host` or `host:port`.
    #[must_use]
    pub fn with_token(host: &str, token: &str) -> Self {
        let login = Login {
            auth: String::new(),
            username: String::new(),
            password: String::new(),
            registry_token: token.to_owned(),
        };
        Self {
            auths: BTreeMap::from([(host.to_owned(), login)]),
        }
    }

    fn login(&self, origin: &Origin) -> Option<&Login> {
        // Files name servers as people do: with or without scheme, port and path.
        let exact = origin.host_header();
        let full = format!("{}:{}", origin.host, origin.port);
        self.auths.iter().find_map(|(key, login)| {
            let host = key.split_once("://").map_or(key.as_str(), |(_, rest)| rest);
            let host = host.split('/').next().unwrap_or_default();
            (host == exact || host == full).then_some(login)
        })
    }

    /// The `Authorization` that is sent without being asked for: a token meant for this server.
    pub(super) fn bearer(&self, origin: &Origin) -> Option<String> {
        let token = &self.login(origin)?.registry_token;
        is_printable(token).then(|| format!("Bearer {token}"))
    }

    /// The `Authorization` of user and password.
    pub(super) fn basic(&self, origin: &Origin) -> Option<String> {
        let login = self.login(origin)?;
        if !login.username.is_empty() {
            return Some(basic(&login.username, &login.password));
        }
        // `serve` takes its token as any user's password, too.
        if login.auth.is_empty() && is_printable(&login.registry_token) {
            return Some(basic("runnel", &login.registry_token));
        }
        is_printable(&login.auth).then(|| format!("Basic {}", login.auth))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.auths.keys()).finish()
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}")))
}

/// Whether text can stand in a request's head.
pub(super) fn is_printable(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
}

/// What a server that answers 401 wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password.
    Basic,
    /// A token that `realm` gives to whom it knows, or to anyone.
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// Reads one `WWW-Authenticate`; only the first scheme of each counts, as registries send them.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let parameters = parameters(rest);
        let get = |name: &str| parameters.get(name).cloned();
        Some(Self::Bearer {
            realm: get("realm")?,
            service: get("service"),
            scope: get("scope"),
        })
    }
}

/// `name="value", name=value`: a quoted value may hold commas and escaped quotes.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([' ', ',', '\t']).to_ascii_lowercase();
        let mut value = String::new();
        let mut chars = after.char_indices();
        let mut end = after.len();
        if after.starts_with('"') {
            chars.next();
            while let Some((at, c)) = chars.next() {
                match c {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => value.extend(chars.next().map(|(_, c)| c)),
                    c => value.push(c),
                }
            }
        } else {
            end = after.find(',').unwrap_or(after.len());
            value.push_str(after[..end].trim());
        }
        found.insert(name, value);
        rest = &after[end..];
    }
    found
}

/// A text as part of a query (RFC 3986 §2.3: all but unreserved characters escaped).
pub(super) fn escape(text: &str) -> String {
    use fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, c| {
        if c.is_ascii_alphanumeric() || b"-._~".contains(&c) {
            out.push(char::from(c));
        } else {
            let _ = write!(out, "%{c:02X}"); // writing to a String cannot fail
        }
        out
    })
}

/// The file of credentials of whoever names none: `$REGISTRY_AUTH_FILE`, else `~/.docker/config.json` if there is one.
#[must_use]
pub fn usual_credentials() -> Option<PathBuf> {
    let named = std::env::var_os("REGISTRY_AUTH_FILE").map(PathBuf::from);
    named.or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".docker/config.json")).filter(|path| path.is_file())
    })
}

#[cfg(test)]
mod tests {
    use super::super::url::Url;
    use super::*;

    #[test]
    fn challenges_of_registries_are_understood() {
        let text = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:web:pull,push""#;
        assert_eq!(
            Challenge::parse(text),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("registry.example".into()),
                scope: Some("repository:web:pull,push".into()),
            })
        );
        assert_eq!(
            Challenge::parse(r#"Basic realm="runnel""#),
            Some(Challenge::Basic)
        );
        assert_eq!(Challenge::parse("basic"), Some(Challenge::Basic));
        for text in [
            "",
            "Bearer",
            "Bearer service=x",
            "Negotiate",
            "Bearer =\"",
            "Bearer realm",
        ] {
            assert_eq!(Challenge::parse(text), None, "{text}");
        }
        let odd = parameters(r#"a="x\"y", B=z , c="unclosed"#);
        assert_eq!(
            (odd["a"].as_str(), odd["b"].as_str(), odd["c"].as_str()),
            ("x\"y", "z", "unclosed")
        );
    }

    #[test]
    fn a_secret_goes_to_its_server_alone() {
        let file = r#"{"auths": {
            "a.example": {"auth": "dTpw"},
            "b.example:5000": {"username": "u", "password": "p"},
            "https://c.example/v1/": {"registrytoken": "t0ken"},
            "e.example": {}
        }}"#;
        let credentials: Credentials = serde_json::from_str(file).unwrap();
        let origin = |text: &str| Url::parse(text).unwrap().origin;
        let basic = |text: &str| credentials.basic(&origin(text));
        assert_eq!(basic("https://a.example/").as_deref(), Some("Basic dTpw"));
        assert_eq!(basic("http://b.example:5000/").as_deref(), Some("Basic dTpw"));
        assert_eq!(
            credentials.bearer(&origin("https://c.example/")).as_deref(),
            Some("Bearer t0ken")
        );
        for other in [
            "https://a.example:444/",
            "https://b.example/",
            "https://d.example/",
            "https://e.example/",
        ] {
            assert_eq!(
                (basic(other), credentials.bearer(&origin(other))),
                (None, None),
                "{other}"
            );
        }
        assert!(!format!("{credentials:?}").contains("dTpw"));
    }

    #[test]
    fn queries_are_escaped() {
        assert_eq!(
            escape("repository:team/web:pull"),
            "repository%3Ateam%2Fweb%3Apull"
        );
    }
}
