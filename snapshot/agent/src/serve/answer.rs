//! Answers to the pull half of the OCI distribution API (specification 1.1, "Pulling").

use std::fs::File;
use std::sync::Arc;

use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use runnel_snapshot::blobs::Blob;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::MANIFEST;
use runnel_snapshot::image::reference::{Wanted, is_tag};
use runnel_snapshot::units::ByteRange;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::access::Token;
use super::body::AnswerBody;
use super::page::{BadPage, Names, Page};
use super::range::{self, Asked};
use super::repositories::{Repositories, read_manifest};
use super::route::{self, BadPath, Reference, Route};

const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What clients ask for who name no tag.
const LATEST: &str = "latest";

type Answer = Response<AnswerBody>;

/// A refusal, as the specification words them: a code of its list, and a message for people.
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    fn unknown_name(name: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            format!("no image named {name} is served here"),
        )
    }

    fn into_answer(self) -> Answer {
        let body = json!({ "errors": [{ "code": self.code, "message": self.message }] });
        let mut answer = Response::new(AnswerBody::of(body.to_string().into_bytes()));
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
        answer
    }
}

/// What answers are made from.
#[derive(Debug)]
pub(super) struct Registry {
    pub(super) repositories: Repositories,
    pub(super) token: Option<Token>,
}

impl Registry {
    /// Answers one request. Requests have no bodies here, so none is read.
    pub(super) async fn answer<B>(self: Arc<Self>, request: &Request<B>) -> Answer {
        let mut answer = match self.accept(request).await {
            Ok(answer) => answer,
            Err(refusal) => refusal.into_answer(),
        };
        let headers = answer.headers_mut();
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        if answer.status() == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static(r#"Basic realm="runnel""#);
            answer.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        }
        if request.method() == Method::HEAD {
            // The length stays, as the method asks; the bytes are not sent.
            let bytes = hyper::body::Body::size_hint(answer.body()).lower();
            answer.headers_mut().insert(header::CONTENT_LENGTH, bytes.into());
            *answer.body_mut() = AnswerBody::Whole(None);
        }
        answer
    }

    async fn accept<B>(self: Arc<Self>, request: &Request<B>) -> Result<Answer, Refusal> {
        let authorization = request.headers().get(header::AUTHORIZATION);
        if let Some(token) = &self.token
            && !token.admits(authorization.map(HeaderValue::as_bytes))
        {
            let message = "a token is needed: as a bearer's, or as the password of any user";
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message));
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let message = "images are only read here: GET and HEAD";
            return Err(Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                message,
            ));
        }
        match route::parse(request.uri().path()).map_err(bad_path)? {
            Route::Version => Ok(json_answer(b"{}".to_vec())),
            Route::Blob { name, digest } => self.blob(&name, &digest, request.headers()),
            // These read and hash files of up to some MiB; once or twice a resume.
            Route::Manifest { name, reference } => blocking(move || self.manifest(&name, &reference)).await,
            Route::Tags { name } => {
                let page = Page::parse(request.uri().query()).map_err(bad_page)?;
                blocking(move || self.tags(&name, &page)).await
            }
            Route::Catalog => {
                let page = Page::parse(request.uri().query()).map_err(bad_page)?;
                blocking(move || Ok(self.catalog(&page))).await
            }
        }
    }

    /// Opening a file is a look into the host's directory cache, so it is done on the server's thread.
    fn blob(&self, name: &str, digest: &BlobDigest, headers: &HeaderMap) -> Result<Answer, Refusal> {
        let path = self
            .repositories
            .find(name)
            .ok_or_else(|| Refusal::unknown_name(name))?;
        let unknown = || {
            let message = format!("image {name} has no blob {digest}");
            Refusal::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", message)
        };
        let path = path.join("blobs/sha256").join(digest.hex());
        // Not a link that a stranger's image brought along, and no waiting for a FIFO's writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|_| unknown())?);
        let metadata = file.metadata().map_err(|_| unknown())?;
        if !metadata.is_file() {
            return Err(unknown());
        }
        let mut answer = ranged(file, metadata.len(), headers);
        let headers = answer.headers_mut();
        headers.insert(DIGEST, digest_value(digest));
        headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        let kind = HeaderValue::from_static("application/octet-stream");
        headers.entry(header::CONTENT_TYPE).or_insert(kind);
        Ok(answer)
    }

    fn layout(&self, name: &str) -> Result<Layout, Refusal> {
        match self.repositories.open(name) {
            Ok(Some(layout)) => Ok(layout),
            Ok(None) => Err(Refusal::unknown_name(name)),
            Err(error) => {
                tracing::warn!(
                    name,
                    error = &error as &dyn std::error::Error,
                    "an image cannot be read"
                );
                Err(unreadable(name))
            }
        }
    }

    fn manifest(&self, name: &str, reference: &Reference) -> Result<Answer, Refusal> {
        let layout = self.layout(name)?;
        let Some(manifest) = find_manifest(&layout, reference) else {
            let message = format!("image {name} has no such manifest: ask for /v2/{name}/tags/list");
            return Err(Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message));
        };
        // Whoever gets a manifest runs a machine from it: one that would stop somewhere is better not started.
        let bytes = read_manifest(&layout, &manifest).map_err(|error| {
            tracing::warn!(
                name,
                error = &error as &dyn std::error::Error,
                "an image is not whole"
            );
            unreadable(name)
        })?;
        let mut answer = Response::new(AnswerBody::of(bytes));
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MANIFEST));
        headers.insert(DIGEST, digest_value(&manifest.digest));
        Ok(answer)
    }

    /// What is served, of what lies there: what cannot be had is not named.
    fn catalog(&self, page: &Page) -> Answer {
        let served = self.repositories.inventory().served;
        let Names { names, next } = page.of(served.keys().map(String::as_str));
        listed(&json!({ "repositories": names }), "/v2/_catalog", next)
    }

    fn tags(&self, name: &str, page: &Page) -> Result<Answer, Refusal> {
        let layout = self.layout(name)?;
        // Another name of an image is none that can be asked for.
        let tags = layout.images().filter_map(|(_, tag)| tag);
        let mut tags: Vec<&str> = tags.filter(|tag| is_tag(tag)).collect();
        if !tags.contains(&LATEST) && find_manifest(&layout, &Reference::Tag(LATEST.to_owned())).is_some() {
            tags.push(LATEST);
        }
        // Lexical order, as the specification has it.
        tags.sort_unstable();
        let Names { names, next } = page.of(tags);
        let path = format!("/v2/{name}/tags/list");
        Ok(listed(&json!({ "name": name, "tags": names }), &path, next))
    }
}

/// An image that was published without a name is what `latest` means.
fn find_manifest(layout: &Layout, reference: &Reference) -> Option<Blob> {
    let wanted = match reference {
        Reference::Digest(digest) => Wanted::Pinned(*digest),
        Reference::Tag(tag) => Wanted::Named(tag.clone()),
    };
    let found = layout.choose(&wanted).ok();
    found.or_else(|| match reference {
        Reference::Tag(tag) if tag == LATEST => layout.choose(&Wanted::Only).ok(),
        _ => None,
    })
}

fn ranged(file: File, len: u64, headers: &HeaderMap) -> Answer {
    let asked = headers.get(header::RANGE).map(HeaderValue::as_bytes);
    match range::parse(asked, len) {
        Asked::Whole => Response::new(AnswerBody::file(file, ByteRange { start: 0, len })),
        Asked::Part(part) => {
            let (first, last) = (part.start, part.start + part.len - 1);
            let mut answer = Response::new(AnswerBody::file(file, part));
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            content_range(&mut answer, &format!("bytes {first}-{last}/{len}"));
            answer
        }
        Asked::Beyond => {
            let message = format!("the blob has {len} bytes");
            let refusal = Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message);
            let mut answer = refusal.into_answer();
            content_range(&mut answer, &format!("bytes */{len}"));
            answer
        }
    }
}

fn content_range(answer: &mut Answer, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        answer.headers_mut().insert(header::CONTENT_RANGE, value);
    }
}

fn digest_value(digest: &BlobDigest) -> HeaderValue {
    HeaderValue::from_str(&digest.to_string()).unwrap_or(HeaderValue::from_static(""))
}

fn json_answer(bytes: Vec<u8>) -> Answer {
    let mut answer = Response::new(AnswerBody::of(bytes));
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    answer
}

/// A page of a list at `path`, with a link to the next one if there is one.
fn listed(page: &Value, path: &str, next: Option<String>) -> Answer {
    let mut answer = json_answer(page.to_string().into_bytes());
    let link = next.and_then(|next| HeaderValue::from_str(&format!("<{path}?{next}>; rel=\"next\"")).ok());
    if let Some(link) = link {
        answer.headers_mut().insert(header::LINK, link);
    }
    answer
}

fn bad_page(_: BadPage) -> Refusal {
    let message = "n is a number, and last a name";
    Refusal::new(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", message)
}

fn bad_path(reason: BadPath) -> Refusal {
    let bad = StatusCode::BAD_REQUEST;
    match reason {
        BadPath::Unknown => Refusal::new(
            StatusCode::NOT_FOUND,
            "UNSUPPORTED",
            "no such path: images are under /v2/",
        ),
        BadPath::Name => Refusal::new(bad, "NAME_INVALID", "the repository's name is not one"),
        BadPath::Digest => Refusal::new(
            bad,
            "DIGEST_INVALID",
            "a digest is sha256: and 64 lower-case hex digits",
        ),
        BadPath::Tag => Refusal::new(
            bad,
            "MANIFEST_INVALID",
            "a tag is up to 128 letters, digits and . _ -",
        ),
    }
}

/// The reason is in the server's log, not in what strangers are told.
fn unreadable(name: &str) -> Refusal {
    let message = format!("image {name} cannot be read: its server's log says why");
    Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", message)
}

async fn blocking(
    work: impl FnOnce() -> Result<Answer, Refusal> + Send + 'static,
) -> Result<Answer, Refusal> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "answering failed");
        Err(Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            "the server failed",
        ))
    })
}
