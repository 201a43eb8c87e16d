//! Images over HTTP, as any client of registries asks for them: requests written out by hand.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use runnel_agent::serve::{AccessError, ImageServer, ServeError, Token};
use runnel_snapshot::digest::BlobDigest;
use wire::{Stored, fixture, request, serve, settings};

#[test]
fn the_pull_half_of_the_distribution_api_is_answered() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let get = |path: &str| request(server.address(), &format!("GET {path}"), &[]);

    let version = get("/v2/");
    assert_eq!(version.status, 200);
    assert_eq!(
        version.header("docker-distribution-api-version"),
        Some("registry/2.0")
    );

    let digest = stored.manifest.digest;
    for reference in ["latest".to_owned(), digest.to_string()] {
        let manifest = get(&format!("/v2/web/manifests/{reference}"));
        assert_eq!(manifest.status, 200);
        assert_eq!(
            manifest.header("content-type"),
            Some("application/vnd.oci.image.manifest.v1+json")
        );
        assert_eq!(
            manifest.header("docker-content-digest"),
            Some(digest.to_string().as_str())
        );
        assert_eq!(BlobDigest::of(&manifest.body), digest);
    }
    let tags = get("/v2/web/tags/list");
    assert_eq!(
        tags.json(),
        serde_json::json!({ "name": "web", "tags": ["latest"] })
    );

    for blob in stored.open().manifest.blobs() {
        let answer = get(&format!("/v2/web/blobs/{}", blob.digest));
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("accept-ranges"), Some("bytes"));
        assert_eq!(
            answer.header("docker-content-digest"),
            Some(blob.digest.to_string().as_str())
        );
        assert_eq!(
            answer.header("content-length"),
            Some(blob.bytes.to_string().as_str())
        );
        assert_eq!(BlobDigest::of(&answer.body), blob.digest);
    }
}

/// As a snapshot is published, unless somebody copies it under a name.
#[test]
fn an_image_without_a_name_is_listed_as_what_it_is_answered_for() {
    let stored = Stored::new();
    let index = stored.path().join("index.json");
    let renamed = |from: &str, to: &str| {
        let text = fs::read_to_string(&index).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&index, text.replace(from, to)).unwrap();
    };
    renamed("org.opencontainers.image.ref.name", "some.other.annotation");
    let server = serve(&[&stored.path()]);
    let tags = || request(server.address(), "GET /v2/web/tags/list", &[]).json()["tags"].clone();
    assert_eq!(tags(), serde_json::json!(["latest"]));
    let manifest = request(server.address(), "GET /v2/web/manifests/latest", &[]);
    assert_eq!(manifest.status, 200);

    renamed("\"latest\"", "\"v1\"");
    renamed("some.other.annotation", "org.opencontainers.image.ref.name");
    assert_eq!(tags(), serde_json::json!(["latest", "v1"]));
}

#[test]
fn the_catalog_names_what_is_served_in_pages_and_tags_come_in_pages_too() {
    let stored = Stored::new();
    let folder = tempfile::tempdir().unwrap();
    for name in ["db", "web", "a.b"] {
        std::os::unix::fs::symlink(stored.path(), folder.path().join(name)).unwrap();
    }
    fs::create_dir(folder.path().join("notes")).unwrap();
    fs::create_dir(folder.path().join("broken")).unwrap();
    fs::write(folder.path().join("broken/oci-layout"), "junk").unwrap();
    let server = serve(&[folder.path()]);
    let get = |target: &str| request(server.address(), &format!("GET {target}"), &[]);
    let all = get("/v2/_catalog");
    assert_eq!((all.status, all.header("link")), (200, None));
    assert_eq!(
        all.json(),
        serde_json::json!({ "repositories": ["a.b", "db", "web"] })
    );

    let first = get("/v2/_catalog?n=2");
    assert_eq!(first.json()["repositories"], serde_json::json!(["a.b", "db"]));
    assert_eq!(
        first.header("link"),
        Some("</v2/_catalog?n=2&last=db>; rel=\"next\"")
    );
    let rest = get("/v2/_catalog?n=2&last=db");
    assert_eq!(
        (rest.json()["repositories"].clone(), rest.header("link")),
        (serde_json::json!(["web"]), None)
    );
    assert_eq!(get("/v2/_catalog?n=many").status, 400);
    assert_eq!(
        get("/v2/web/tags/list?last=latest").json()["tags"],
        serde_json::json!([])
    );
}

#[test]
fn ranges_are_cut_exactly_and_those_behind_the_end_are_refused() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let (layer, bytes) = stored.layer();
    let line = format!("GET /v2/web/blobs/{}", layer.digest);
    let len = bytes.len();
    for (range, first, last) in [
        ("bytes=0-0".to_owned(), 0, 0),
        ("bytes=7-99".into(), 7, 99),
        (format!("bytes=7-{}", len + 9), 7, len - 1),
        ("bytes=-5".into(), len - 5, len - 1),
        ("bytes=3-".into(), 3, len - 1),
    ] {
        let answer = request(server.address(), &line, &[&format!("Range: {range}")]);
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(
            answer.header("content-range"),
            Some(format!("bytes {first}-{last}/{len}").as_str())
        );
        assert_eq!(answer.body, bytes[first..=last], "{range}");
    }
    let beyond = request(server.address(), &line, &[&format!("Range: bytes={len}-")]);
    assert_eq!(beyond.status, 416);
    assert_eq!(
        beyond.header("content-range"),
        Some(format!("bytes */{len}").as_str())
    );
    // Several ranges at once may be answered with the whole.
    let several = request(server.address(), &line, &["Range: bytes=0-1,4-5"]);
    assert_eq!((several.status, several.body), (200, bytes));
}

#[test]
fn head_says_what_get_would_and_sends_none_of_it() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let (layer, bytes) = stored.layer();
    for path in [
        format!("/v2/web/blobs/{}", layer.digest),
        "/v2/web/manifests/latest".into(),
        "/v2/web/manifests/none".into(),
        "/v2/".into(),
    ] {
        let head = request(server.address(), &format!("HEAD {path}"), &[]);
        let get = request(server.address(), &format!("GET {path}"), &[]);
        assert_eq!(head.status, get.status, "{path}");
        for name in ["content-length", "content-type", "docker-content-digest"] {
            assert_eq!(head.header(name), get.header(name), "{path}: {name}");
        }
        assert_eq!(head.body, b"", "{path}");
    }
    let part = format!("HEAD /v2/web/blobs/{}", layer.digest);
    let part = request(server.address(), &part, &["Range: bytes=1-4"]);
    assert_eq!((part.status, part.header("content-length")), (206, Some("4")));
    assert!(bytes.len() > 4);
}

#[test]
fn what_is_not_there_is_refused_in_the_specifications_words() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let none = BlobDigest::of(b"none");
    for (line, status, code) in [
        (format!("GET /v2/web/blobs/{none}"), 404, "BLOB_UNKNOWN"),
        (format!("GET /v2/other/blobs/{none}"), 404, "NAME_UNKNOWN"),
        ("GET /v2/web/manifests/other".into(), 404, "MANIFEST_UNKNOWN"),
        (format!("GET /v2/web/manifests/{none}"), 404, "MANIFEST_UNKNOWN"),
        ("GET /v2/web/blobs/sha256:12".into(), 400, "DIGEST_INVALID"),
        (format!("GET /v2/../web/blobs/{none}"), 400, "NAME_INVALID"),
        ("GET /etc/passwd".into(), 404, "UNSUPPORTED"),
        ("POST /v2/web/blobs/uploads/".into(), 405, "UNSUPPORTED"),
        (format!("DELETE /v2/web/manifests/{none}"), 405, "UNSUPPORTED"),
    ] {
        let answer = request(server.address(), &line, &[]);
        assert_eq!(answer.status, status, "{line}");
        assert_eq!(answer.json()["errors"][0]["code"], code, "{line}");
    }
}

#[test]
fn links_out_of_an_image_are_not_followed() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let secret = stored.folder().join("secret");
    fs::write(&secret, "secret").unwrap();
    let digest = BlobDigest::of(b"secret");
    std::os::unix::fs::symlink(&secret, stored.path().join("blobs/sha256").join(digest.hex())).unwrap();
    let answer = request(server.address(), &format!("GET /v2/web/blobs/{digest}"), &[]);
    assert_eq!(answer.status, 404);
}

#[test]
fn an_image_that_appears_in_a_served_folder_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(&[folder.path()]);
    let manifest = || request(server.address(), "GET /v2/new/manifests/latest", &[]).status;
    assert_eq!(manifest(), 404);
    fixture::publish(&folder.path().join("new")).unwrap();
    assert_eq!(manifest(), 200);
    fs::remove_dir_all(folder.path().join("new")).unwrap();
    assert_eq!(manifest(), 404);
}

#[test]
fn a_connection_is_kept_for_many_requests() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let mut stream = TcpStream::connect(server.address()).unwrap();
    // All at once: answers come in order.
    stream
        .write_all(&b"GET /v2/ HTTP/1.1\r\nHost: test\r\n\r\n".repeat(50))
        .unwrap();
    let mut answers = String::new();
    let mut piece = [0; 4096];
    while answers.matches("HTTP/1.1 200 OK").count() < 50 || !answers.ends_with("{}") {
        let count = stream.read(&mut piece).unwrap();
        assert_ne!(count, 0, "closed after {answers}");
        answers.push_str(std::str::from_utf8(&piece[..count]).unwrap());
    }
    assert!(server.traffic().bytes_received() > 50 * 30);
    // What was sent is counted once it was, which may be after it was read.
    let until = Instant::now() + Duration::from_secs(30);
    while server.traffic().bytes_sent() < answers.len() as u64 {
        assert!(Instant::now() < until, "{}", server.traffic().bytes_sent());
        std::thread::yield_now();
    }
    assert_eq!(server.traffic().bytes_sent(), answers.len() as u64);
}

#[test]
fn only_who_has_the_token_may_pull() {
    let stored = Stored::new();
    let token = "0123456789abcdef0123";
    let mut settings = settings(&[&stored.path()]);
    settings.token = Token::new(token);
    let server = ImageServer::start(settings).unwrap();
    for path in ["/v2/", "/v2/web/manifests/latest", "/nowhere"] {
        for headers in [&[][..], &["Authorization: Bearer 0123456789abcdef0124"]] {
            let answer = request(server.address(), &format!("GET {path}"), headers);
            assert_eq!(answer.status, 401, "{path}");
            assert_eq!(answer.header("www-authenticate"), Some(r#"Basic realm="runnel""#));
            assert_eq!(answer.json()["errors"][0]["code"], "UNAUTHORIZED");
        }
    }
    let bearer = format!("Authorization: Bearer {token}");
    // What a tool for registries sends for `--creds any:<token>`.
    let basic = "Authorization: Basic YW55OjAxMjM0NTY3ODlhYmNkZWYwMTIz";
    for header in [bearer.as_str(), basic] {
        let answer = request(server.address(), "GET /v2/web/manifests/latest", &[header]);
        assert_eq!(answer.status, 200, "{header}");
    }
}

#[test]
fn strangers_are_not_listened_to_without_token_and_tls() {
    let mut open = settings(&[]);
    open.listen = "0.0.0.0:0".parse().unwrap();
    let error = ImageServer::start(open.clone()).unwrap_err();
    assert!(matches!(error, ServeError::Access(AccessError::Exposed { .. })));
    for flag in ["--token-file", "--tls-cert", "--insecure"] {
        assert!(error.to_string().contains(flag), "{error}");
    }
}

#[test]
fn stopping_closes_connections_that_nobody_uses() {
    let server = serve(&[Path::new("/tmp")]);
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream
        .write_all(b"GET /v2/ HTTP/1.1\r\nHost: test\r\n\r\n")
        .unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let address = server.address();
    server.stop();
    stream.read_to_end(&mut Vec::new()).unwrap();
    assert!(TcpStream::connect(address).is_err());
}
