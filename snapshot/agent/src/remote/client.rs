//! Requests to one store: redirects followed, challenges answered, stale connections replaced, deadlines kept.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use runnel_snapshot::shell::shell_word;
use serde::Deserialize;

use super::answer::Answer;
use super::connection::Connection;
use super::credentials::{Challenge, Credentials, escape, is_printable};
use super::error::RemoteError;
use super::kept::KeptConnections;
use super::pool::Pool;
use super::url::{Origin, Url};
use crate::traffic::Traffic;

/// The most redirects from a request to its answer.
const REDIRECTS_MAX: usize = 5;

/// The longest answer of a server that gives out tokens.
const TOKEN_BYTES_MAX: u64 = 64 << 10;

/// What a busy server that names no time is given.
const BUSY_SECONDS: u64 = 1;

/// The longest that a busy server's word is taken for.
const BUSY_SECONDS_MAX: u64 = 60;

/// Why a server that wants to know who asks answers 401.
const NEEDS_CREDENTIALS: &str = "it wants credentials";
const OTHER_CREDENTIALS: &str = "it does not take these credentials";

/// How long a request waits for a busy server itself; beyond, whoever asked is told.
const BUSY_WAIT: Duration = Duration::from_secs(2);

/// How often a request comes back to a busy server.
const BUSY_TRIES: usize = 3;

/// How servers are talked to.
#[derive(Clone, Debug)]
pub struct RemoteSettings {
    /// Connections that are kept to a server.
    pub connections: usize,
    /// How many of them are opened as an image is, before there is anything to ask for.
    pub connections_ahead: usize,
    /// How long finding an address, connecting and shaking hands may each take.
    pub connect_deadline: Duration,
    /// How long a server may be silent in the middle of something.
    pub idle_deadline: Duration,
    /// How long a round trip may take before a read that would need two of them is cut into parts, over several
    /// connections.
    pub near: Duration,
    /// Certificates of the authorities to trust, in place of the system's.
    pub authorities: Option<PathBuf>,
    /// Who to be.
    pub credentials: Credentials,
    /// Connections that are open already. Clones share them, as they share everything that these are made with.
    pub kept: KeptConnections,
}

impl Default for RemoteSettings {
    fn default() -> Self {
        Self {
            connections: 32,
            connections_ahead: 16,
            connect_deadline: Duration::from_secs(5),
            idle_deadline: Duration::from_secs(10),
            near: Duration::from_millis(3),
            authorities: None,
            credentials: Credentials::default(),
            kept: KeptConnections::default(),
        }
    }
}

/// The client of one store.
pub(super) struct Client {
    base: Origin,
    settings: RemoteSettings,
    /// What the base is sent, once it is known what it wants.
    authorization: Mutex<Option<String>>,
    /// Until when the store wants to be left alone, and with which status it said so.
    busy: Mutex<Option<(Instant, u16)>>,
    traffic: Arc<Traffic>,
}

/// What a request carries beyond its target.
#[derive(Clone, Copy, Default)]
pub(super) struct Asked<'a> {
    /// The first byte, and how many.
    pub(super) range: Option<(u64, u64)>,
    pub(super) accept: Option<&'a str>,
}

/// An answer and where it came from.
pub(super) struct Found {
    pub(super) answer: Answer,
    pub(super) url: Url,
}

impl Client {
    pub(super) fn new(base: Origin, settings: RemoteSettings) -> Self {
        Self::counting(base, settings, Arc::default())
    }

    /// One whose bytes are counted together with others'.
    pub(super) fn counting(base: Origin, settings: RemoteSettings, traffic: Arc<Traffic>) -> Self {
        let authorization = settings.credentials.bearer(&base);
        Self {
            base,
            settings,
            authorization: Mutex::new(authorization),
            busy: Mutex::default(),
            traffic,
        }
    }

    pub(super) fn base(&self) -> &Origin {
        &self.base
    }

    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Opens connections to the base in advance.
    pub(super) fn warm_up(&self) -> Result<(), RemoteError> {
        self.pool(&self.base)?
            .warm_up(self.settings.connections_ahead, &self.traffic);
        Ok(())
    }

    /// Asks for `url` until there is an answer of 200 or 206, or one that it is an error to get.
    pub(super) fn get(&self, url: &Url, asked: Asked<'_>) -> Result<Found, RemoteError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match self.rest(tries).and_then(|()| self.get_now(url, asked)) {
                Err(error @ RemoteError::Busy { .. }) => error,
                other => return other,
            };
            if tries >= BUSY_TRIES {
                return Err(error);
            }
        }
    }

    /// Leaves a busy store alone: waits if it is for a moment, else fails without asking it.
    fn rest(&self, tries: usize) -> Result<(), RemoteError> {
        let Some((until, status)) = *lock(&self.busy) else {
            return Ok(());
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        if left > BUSY_WAIT || tries > BUSY_TRIES {
            return Err(RemoteError::Busy {
                origin: self.base.clone(),
                status,
                seconds: left.as_secs() + 1,
            });
        }
        thread::sleep(left);
        Ok(())
    }

    fn get_now(&self, url: &Url, asked: Asked<'_>) -> Result<Found, RemoteError> {
        let mut url = url.clone();
        let mut challenged = false;
        for _ in 0..=REDIRECTS_MAX {
            let authorization = match url.origin == self.base {
                true => lock(&self.authorization).clone(),
                // Elsewhere a redirect's own signature is what counts, and secrets are nobody's business.
                false => None,
            };
            let answer = self.ask(&url, asked, authorization.as_deref())?;
            match answer.head.status {
                200 | 206 => return Ok(Found { answer, url }),
                301 | 302 | 303 | 307 | 308 => url = self.redirected(&url, answer)?,
                401 if !challenged && url.origin == self.base => {
                    challenged = true;
                    self.answer_challenge(&url, authorization, answer)?;
                }
                _ => return Err(self.refusal(&url, answer)),
            }
        }
        Err(RemoteError::Redirect {
            url: url.to_string(),
            reason: format!("there were {REDIRECTS_MAX} redirects before it"),
        })
    }

    /// One request and the head of its answer. One that was sent on a connection which the server had closed by then
    /// is sent again on a new one: it only reads.
    fn ask(&self, url: &Url, asked: Asked<'_>, authorization: Option<&str>) -> Result<Answer, RemoteError> {
        let head = request_head(url, asked, authorization);
        let pool = self.pool(&url.origin)?;
        let connection = pool.borrow(&self.traffic)?;
        let used = connection.used;
        let (doing, source) = match exchange(connection, &head) {
            Ok(answer) => return Ok(answer),
            Err((_, source)) if used && was_closed(&source) => {
                pool.forget(); // the others were closed with it, most likely
                match exchange(pool.open(&self.traffic)?, &head) {
                    Ok(answer) => return Ok(answer),
                    Err(failed) => failed,
                }
            }
            Err(failed) => failed,
        };
        pool.forget();
        Err(match source.kind() {
            io::ErrorKind::InvalidData => RemoteError::Answer {
                url: url.to_string(),
                reason: source.to_string(),
            },
            _ => RemoteError::Broken {
                origin: url.origin.clone(),
                doing,
                source,
            },
        })
    }

    /// Into how many parts a read of the base should be cut.
    pub(super) fn parts_for(&self, bytes: u64, parts_max: u64) -> u64 {
        match self.pool(&self.base) {
            Ok(pool) => pool.parts_for(bytes, self.settings.near, parts_max),
            Err(_) => 1, // the read itself will say it
        }
    }

    /// Gives an answer's connection back, if it can serve another request.
    pub(super) fn finish(&self, found: Found) {
        let Found { answer, url } = found;
        if let (Some(connection), Ok(pool)) = (answer.finish(), self.pool(&url.origin)) {
            pool.put_back(connection);
        }
    }

    /// The error of a body that broke off.
    pub(super) fn broken(&self, url: &Url, source: io::Error) -> RemoteError {
        if let Ok(pool) = self.pool(&url.origin) {
            pool.forget();
        }
        RemoteError::Broken {
            origin: url.origin.clone(),
            doing: "reading an answer",
            source,
        }
    }

    fn redirected(&self, url: &Url, answer: Answer) -> Result<Url, RemoteError> {
        let refused = |reason: &str| RemoteError::Redirect {
            url: url.to_string(),
            reason: reason.to_owned(),
        };
        let to = url.join(
            answer
                .head
                .field("location")
                .ok_or_else(|| refused("it does not say where to"))?,
        )?;
        if url.origin.tls && !to.origin.tls {
            return Err(refused("it leads from https to http"));
        }
        self.finish(Found {
            answer,
            url: url.clone(),
        });
        Ok(to)
    }

    /// Finds out what to send to a store that answered 401, or why there is nothing.
    fn answer_challenge(&self, url: &Url, sent: Option<String>, answer: Answer) -> Result<(), RemoteError> {
        let challenges: Vec<Challenge> = answer
            .head
            .fields("www-authenticate")
            .filter_map(Challenge::parse)
            .collect();
        self.finish(Found {
            answer,
            url: url.clone(),
        });
        let mut authorization = lock(&self.authorization);
        if *authorization != sent {
            return Ok(()); // another thread was faster
        }
        let denied = |reason| RemoteError::Denied {
            url: url.to_string(),
            status: 401,
            advice: how_to_log_in(reason, &url.origin),
        };
        let basic = self.settings.credentials.basic(&self.base);
        let mut found = None;
        for challenge in &challenges {
            found = match challenge {
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                } => Some(self.token(url, realm, service.as_deref(), scope.as_deref(), basic.as_deref())?),
                Challenge::Basic => basic.clone(),
            };
            if found.is_some() {
                break;
            }
        }
        let found = found.ok_or_else(|| denied(NEEDS_CREDENTIALS))?;
        if Some(&found) == sent.as_ref() {
            return Err(denied(OTHER_CREDENTIALS));
        }
        *authorization = Some(found);
        Ok(())
    }

    /// Fetches a token (distribution's token specification). It goes to `realm` with user and password, if there are
    /// any, or as nobody.
    fn token(
        &self,
        url: &Url,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        basic: Option<&str>,
    ) -> Result<String, RemoteError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
        }
        let mut realm = url.join(realm)?;
        for (name, value) in [("service", service), ("scope", scope)] {
            if let Some(value) = value {
                let joint = if realm.target.contains('?') { '&' } else { '?' };
                realm.target += &format!("{joint}{name}={}", escape(value));
            }
        }
        let basic = basic.filter(|_| self.base.may_send_to(&realm.origin));
        let answer = self.ask(&realm, Asked::default(), basic)?;
        if answer.head.status != 200 {
            return Err(self.refusal(&realm, answer));
        }
        let mut found = Found { answer, url: realm };
        let body = found
            .answer
            .read_rest(TOKEN_BYTES_MAX)
            .map_err(|error| self.broken(&found.url, error))?;
        let unusable = |reason: String| RemoteError::Answer {
            url: found.url.to_string(),
            reason,
        };
        let answer: Answer =
            serde_json::from_slice(&body).map_err(|error| unusable(format!("it holds no token: {error}")))?;
        let token = if answer.token.is_empty() {
            answer.access_token
        } else {
            answer.token
        };
        if !is_printable(&token) {
            return Err(unusable("it holds no token".to_owned()));
        }
        self.finish(found);
        Ok(format!("Bearer {token}"))
    }

    /// What an answer that brings nothing means.
    fn refusal(&self, url: &Url, answer: Answer) -> RemoteError {
        let status = answer.head.status;
        let retry_after = answer
            .head
            .field("retry-after")
            .and_then(|text| text.parse::<u64>().ok());
        self.finish(Found {
            answer,
            url: url.clone(),
        });
        let text = url.to_string();
        match status {
            404 | 410 => RemoteError::Missing { url: text },
            401 => RemoteError::Denied {
                url: text,
                status,
                advice: how_to_log_in(OTHER_CREDENTIALS, &url.origin),
            },
            403 => RemoteError::Denied {
                url: text,
                status,
                advice: "these credentials may not pull it, or it needs some (--credentials): ask its owner"
                    .to_owned(),
            },
            429 | 503 => {
                let seconds = retry_after.unwrap_or(BUSY_SECONDS).min(BUSY_SECONDS_MAX);
                *lock(&self.busy) = Some((Instant::now() + Duration::from_secs(seconds), status));
                RemoteError::Busy {
                    origin: url.origin.clone(),
                    status,
                    seconds,
                }
            }
            status => RemoteError::Status { url: text, status },
        }
    }

    fn pool(&self, origin: &Origin) -> Result<Arc<Pool>, RemoteError> {
        self.settings.kept.to(origin, &self.settings)
    }
}

/// A reason, and how credentials for a server are made and given.
fn how_to_log_in(reason: &str, server: &Origin) -> String {
    let host = shell_word(server.host_header());
    // Unless it is told, it speaks TLS alone.
    let plain = if server.tls { "" } else { "--tls-verify=false " };
    format!(
        "{reason}: `skopeo login {plain}--authfile FILE {host}` or `docker login {host}` writes some; name their file in \
         REGISTRY_AUTH_FILE or with --credentials (~/.docker/config.json needs no naming); an agent that runs already keeps \
         its own, so end it first with `runnel agent --stop`"
    )
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn request_head(url: &Url, asked: Asked<'_>, authorization: Option<&str>) -> Vec<u8> {
    let mut head = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: runnel/{}\r\nAccept-Encoding: identity\r\n",
        url.target,
        url.origin.host_header(),
        env!("CARGO_PKG_VERSION"),
    );
    let range = asked
        .range
        .map(|(start, bytes)| format!("bytes={start}-{}", start + bytes.max(1) - 1));
    let fields = [
        ("Range", range.as_deref()),
        ("Accept", asked.accept),
        ("Authorization", authorization),
    ];
    for (name, value) in fields {
        if let Some(value) = value {
            head += &format!("{name}: {value}\r\n");
        }
    }
    head += "\r\n";
    head.into_bytes()
}

fn exchange(mut connection: Connection, head: &[u8]) -> Result<Answer, (&'static str, io::Error)> {
    connection
        .send(head)
        .map_err(|error| ("sending a request", error))?;
    Answer::read(connection).map_err(|error| ("waiting for an answer", error))
}

fn was_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
    )
}
