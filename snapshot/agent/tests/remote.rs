//! Images of servers, good and bad: what arrives is what was published, and every way to fail has its reason.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use runnel_agent::remote::{Credentials, RemoteError, RemoteImage, RemoteSettings};
use runnel_agent::serve::{ImageServer, Token};
use runnel_agent::tls::Identity;
use runnel_snapshot::blobs::{Blob, BlobError, BlobStore};
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::reference::Wanted;
use wire::scripted::{Reply, Request, Scripted, message};
use wire::{Stored, serve, settings};

/// As patient as a test can be, and one connection at a time.
fn client() -> RemoteSettings {
    RemoteSettings {
        connections_ahead: 0,
        ..RemoteSettings::default()
    }
}

fn open(base: &str, settings: RemoteSettings) -> Result<RemoteImage, RemoteError> {
    RemoteImage::open(base, "web", &Wanted::Only, settings)
}

fn failure(result: Result<RemoteImage, RemoteError>) -> RemoteError {
    result.map(|_| ()).unwrap_err()
}

/// A server of one image whose blobs are answered as the script says: called with the request, and the bytes of the
/// blob it names.
fn registry(stored: &Stored, blob: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static) -> Scripted {
    let manifest = stored.bytes_of(&stored.manifest);
    let (layer, bytes) = stored.layer();
    Scripted::start(move |request| {
        if request.target == "/v2/web/manifests/latest" {
            Reply::ok(&manifest)
        } else if request.target.contains(&layer.digest.hex()) {
            blob(request, &bytes)
        } else {
            Reply::status("404 Not Found", &[])
        }
    })
}

/// Reads bytes 5 to 24 of the image's layer.
fn read(image: &RemoteImage, layer: &Blob) -> Result<Vec<u8>, BlobError> {
    let mut bytes = vec![0; 20];
    image.blobs.read_range(layer, 5, &mut bytes).map(|()| bytes)
}

/// Opens the image of such a server and reads a piece of its layer.
fn read_from(
    blob: impl Fn(&Request, &[u8]) -> Reply + Send + Sync + 'static,
    settings: RemoteSettings,
) -> Result<(), BlobError> {
    let stored = Stored::new();
    let server = registry(&stored, blob);
    let image = open(&server.base(), settings).unwrap();
    let (layer, bytes) = stored.layer();
    let read = read(&image, &layer)?;
    assert_eq!(read, bytes[5..25], "what is read is right or not read");
    Ok(())
}

#[test]
fn what_is_served_is_read_back_over_kept_connections() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let base = format!("http://{}", server.address());
    for wanted in [
        Wanted::Only,
        Wanted::Named("latest".into()),
        Wanted::Pinned(stored.manifest.digest),
    ] {
        let remote = RemoteImage::open(&base, "web", &wanted, RemoteSettings::default()).unwrap();
        assert_eq!(remote.image.digest(), stored.manifest.digest);
        assert_eq!(remote.manifest, stored.bytes_of(&stored.manifest));
        assert_eq!(remote.image.state().unwrap(), stored.open().state().unwrap());
        let (layer, bytes) = stored.layer();
        for start in (0..bytes.len()).step_by(97) {
            let mut part = vec![0; (bytes.len() - start).min(1000)];
            remote.blobs.read_range(&layer, start as u64, &mut part).unwrap();
            assert_eq!(part, bytes[start..start + part.len()]);
        }
    }
    for wanted in [Wanted::Named("none".into()), Wanted::Pinned(BlobDigest::of(b""))] {
        let none = RemoteImage::open(&base, "web", &wanted, client()).map(|_| ());
        assert!(matches!(none, Err(RemoteError::NoSuchImage(_))));
    }
}

#[test]
fn many_threads_read_at_once() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let remote = open(&format!("http://{}", server.address()), RemoteSettings::default()).unwrap();
    let (layer, bytes) = stored.layer();
    std::thread::scope(|scope| {
        for thread in 0..16 {
            let (remote, bytes) = (&remote, &bytes);
            scope.spawn(move || {
                for round in 0..20 {
                    let start = (thread * 31 + round * 7) % (bytes.len() - 100);
                    let mut part = vec![0; 100];
                    remote.blobs.read_range(&layer, start as u64, &mut part).unwrap();
                    assert_eq!(part, bytes[start..start + 100]);
                }
            });
        }
    });
    let received = remote.blobs.traffic().bytes_received();
    assert!(received > 16 * 20 * 100);
    // The server counts what it has written when it comes to it.
    while server.traffic().bytes_sent() < received {
        std::thread::yield_now();
    }
}

#[test]
fn requests_use_a_connection_again_and_one_that_was_closed_meanwhile_is_replaced() {
    let stored = Stored::new();
    let server = registry(&stored, Reply::part);
    let image = open(&server.base(), client()).unwrap();
    let (layer, bytes) = stored.layer();
    for _ in 0..3 {
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    assert!(server.requests().iter().all(|request| request.connection == 0));
    server.hang_up();
    assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    assert_eq!(server.requests().last().unwrap().connection, 1);
}

#[test]
fn the_next_image_of_a_server_finds_its_connections_open_and_counts_its_own_bytes() {
    let stored = Stored::new();
    let server = registry(&stored, Reply::part);
    let settings = client();
    let first = open(&server.base(), settings.clone()).unwrap();
    read(&first, &stored.layer().0).unwrap();
    let before = first.blobs.traffic().bytes_received();
    let second = open(&server.base(), settings).unwrap();
    assert!(server.requests().iter().all(|request| request.connection == 0));
    assert_eq!(first.blobs.traffic().bytes_received(), before);
    assert!(second.blobs.traffic().bytes_received() > 0);
}

#[test]
fn a_read_that_would_take_two_round_trips_is_cut_into_parts_over_connections_that_are_open() {
    let stored = Stored::new();
    let whole: Vec<u8> = (0..100_000_u32).map(|at| (at % 251) as u8).collect();
    let body = whole.clone();
    // Four requests at a time: so many connections are open when they have been answered.
    let four = std::sync::Barrier::new(4);
    let (parts, another) = (std::sync::Mutex::new(0), std::sync::Condvar::new());
    let server = registry(&stored, move |request, _| {
        let start = request.range().unwrap().0;
        if start < 4 {
            four.wait();
        }
        // A part is answered once another is asked for: that cannot be over the same connection.
        if (100..40_100).contains(&start) {
            let mut parts = parts.lock().unwrap();
            *parts += 1;
            another.notify_all();
            let patience = Duration::from_secs(30);
            drop(another.wait_timeout_while(parts, patience, |parts| *parts < 2));
        }
        Reply::part(request, &body)
    });
    let settings = RemoteSettings {
        near: Duration::ZERO,
        ..client()
    };
    let image = open(&server.base(), settings).unwrap();
    let blob = Blob {
        digest: stored.layer().0.digest,
        bytes: whole.len() as u64,
    };
    let read = |start: usize, bytes: usize| {
        let mut part = vec![0; bytes];
        image.blobs.read_range(&blob, start as u64, &mut part).unwrap();
        assert_eq!(part, whole[start..start + bytes]);
    };
    std::thread::scope(|scope| {
        for start in 0..4 {
            scope.spawn(move || read(start, 1));
        }
    });
    let before = server.requests().len();
    read(100, 40_000);
    let requests = server.requests().split_off(before);
    // Three parts of a first window each: what came over the connections before has widened none.
    assert_eq!(requests.len(), 3, "{requests:?}");
    let connections: std::collections::BTreeSet<_> =
        requests.iter().map(|request| request.connection).collect();
    // One that has brought its part may bring another.
    assert!(connections.len() > 1, "{requests:?}");
    // What fits into the first window is not cut.
    read(50_000, 10_000);
    assert_eq!(server.requests().len(), before + requests.len() + 1);
}

#[test]
fn a_plain_server_with_an_image_layout_is_found_out_by_asking() {
    let stored = Stored::new();
    let root = stored.folder().to_owned();
    let server = Scripted::start(move |request| {
        // As any server of files: no ranges even, and pages for people where there is nothing.
        match fs::read(root.join(&request.target[1..])) {
            Ok(bytes) => Reply::ok(&bytes),
            Err(_) => Reply::Keep(message("404 Not Found", &["Content-Type: text/html"], b"<html>")),
        }
    });
    let (layer, bytes) = stored.layer();
    for wanted in [
        Wanted::Only,
        Wanted::Named("latest".into()),
        Wanted::Pinned(stored.manifest.digest),
    ] {
        let image = RemoteImage::open(&server.base(), "web", &wanted, client()).unwrap();
        assert_eq!(image.image.digest(), stored.manifest.digest);
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    let none = RemoteImage::open(&server.base(), "web", &Wanted::Named("v2".into()), client());
    let none = failure(none).to_string();
    assert!(none.contains("v2") && none.contains("latest"), "{none}");
    let none = failure(RemoteImage::open(&server.base(), "db", &Wanted::Only, client()));
    assert!(matches!(none, RemoteError::NoSuchImage(_)));
}

#[test]
fn a_manifest_that_is_not_the_pinned_one_is_refused() {
    let server = Scripted::start(|_| Reply::ok(b"{}"));
    let wanted = Wanted::Pinned(BlobDigest::of(b"another"));
    let error = failure(RemoteImage::open(&server.base(), "web", &wanted, client()));
    assert!(error.to_string().contains("digest"), "{error}");
}

#[test]
fn manifests_without_end_are_cut_off() {
    let server =
        Scripted::start(|_| Reply::Keep(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n".to_vec()));
    let error = failure(open(&server.base(), client()));
    assert!(error.to_string().contains("reading an answer"), "{error}");
    let endless = b"HTTP/1.1 200 OK\r\n\r\n"
        .iter()
        .copied()
        .chain(std::iter::repeat_n(b' ', 5 << 20));
    let endless: Vec<u8> = endless.collect();
    let server = Scripted::start(move |_| Reply::Close(endless.clone()));
    assert!(open(&server.base(), client()).is_err());
}

#[test]
fn a_server_that_ignores_ranges_is_read_through() {
    read_from(|_, bytes| Reply::ok(bytes), client()).unwrap();
}

#[test]
fn a_server_that_ignores_ranges_is_given_up_where_too_much_would_be_skipped() {
    let stored = Stored::new();
    let server = registry(&stored, |_, _| {
        Reply::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n".to_vec())
    });
    let image = open(&server.base(), client()).unwrap();
    let large = Blob {
        digest: stored.layer().0.digest,
        bytes: 1 << 40,
    };
    let error = image.blobs.read_range(&large, 1 << 39, &mut [0; 20]).unwrap_err();
    assert!(!error.is_transient());
    assert!(error.to_string().contains("ranges"), "{error}");
}

#[test]
fn answers_in_chunks_are_put_together() {
    let chunked = |request: &Request, bytes: &[u8]| {
        let (first, last) = request.range().unwrap();
        let mut text = format!(
            "HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\nContent-Range: bytes {first}-{last}/{}\r\n\r\n",
            bytes.len()
        )
        .into_bytes();
        for part in bytes[first..=last].chunks(7) {
            text.extend(
                format!("{:x};x=y\r\n", part.len())
                    .bytes()
                    .chain(part.iter().copied()),
            );
            text.extend(b"\r\n");
        }
        text.extend(b"0\r\nTrailer: x\r\n\r\n");
        Reply::Keep(text)
    };
    let stored = Stored::new();
    let server = registry(&stored, chunked);
    let image = open(&server.base(), client()).unwrap();
    let (layer, bytes) = stored.layer();
    for _ in 0..2 {
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    assert!(
        server.requests().iter().all(|request| request.connection == 0),
        "it is kept"
    );
}

#[test]
fn wrong_answers_are_failures_with_a_reason() {
    type Script = fn(&Request, &[u8]) -> Reply;
    let wrong: [(&str, bool, Script); 13] = [
        ("too early", true, |_, bytes| {
            let range = format!("Content-Range: bytes 5-24/{}", bytes.len());
            let whole = message("206 Partial Content", &[&range], &bytes[5..25]);
            Reply::Close(whole[..whole.len() - 3].to_vec())
        }),
        ("too early", true, |_, _| {
            Reply::Close(b"HTTP/1.1 206 Par".to_vec())
        }),
        ("too early", true, |_, _| Reply::Close(Vec::new())),
        ("waiting for an answer", true, |_, _| Reply::Hang(Vec::new())),
        ("reading an answer", true, |_, bytes| {
            let range = format!("Content-Range: bytes 5-24/{}", bytes.len());
            Reply::Hang(message("206 Partial Content", &[&range], &bytes[5..25])[..100].to_vec())
        }),
        ("0 to 19", true, |_, bytes| {
            let range = format!("Content-Range: bytes 0-19/{}", bytes.len());
            Reply::Keep(message("206 Partial Content", &[&range], &bytes[..20]))
        }),
        ("its length", true, |_, bytes| {
            let range = format!("Content-Range: bytes 5-24/{}", bytes.len());
            Reply::Keep(message("206 Partial Content", &[&range], &bytes[5..24]))
        }),
        ("say which", true, |_, _| {
            Reply::Keep(message("206 Partial Content", &[], &[0; 20]))
        }),
        ("truncated", false, |_, bytes| {
            let range = format!("Content-Range: bytes 5-24/{}", bytes.len() - 1);
            Reply::Keep(message("206 Partial Content", &[&range], &bytes[5..25]))
        }),
        ("truncated", false, |_, bytes| Reply::ok(&bytes[1..])),
        ("status 416", false, |_, _| {
            Reply::status("416 Range Not Satisfiable", &[])
        }),
        ("status 500", true, |_, _| {
            Reply::status("500 Internal Server Error", &[])
        }),
        ("not in http://", false, |_, _| {
            Reply::status("404 Not Found", &[])
        }),
    ];
    for (number, (reason, transient, script)) in wrong.into_iter().enumerate() {
        let settings = RemoteSettings {
            idle_deadline: Duration::from_millis(200),
            ..client()
        };
        let error = read_from(script, settings).unwrap_err();
        assert!(error.to_string().contains(reason), "{number}: {reason}: {error}");
        assert_eq!(error.is_transient(), transient, "{number}: {error}");
    }
}

#[test]
fn a_server_that_trickles_is_left_as_one_that_is_silent() {
    const PATIENCE: Duration = Duration::from_secs(2);
    const APART: Duration = Duration::from_millis(20);
    let settings = || RemoteSettings {
        connect_deadline: PATIENCE,
        idle_deadline: PATIENCE,
        ..client()
    };
    let trickle = |request: &Request, bytes: &[u8]| {
        let Reply::Keep(part) = Reply::part(request, bytes) else {
            unreachable!("a part is sent at once");
        };
        Reply::Trickle(part, APART)
    };
    let error = read_from(trickle, settings()).unwrap_err();
    assert!(
        error.is_transient() && error.to_string().contains("too slowly"),
        "{error}"
    );

    // Below TLS too, which waits for a whole record: here one of 16 KiB, in answer to the first greeting.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("https://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let record = [22, 3, 3, 0x40, 0]
            .into_iter()
            .chain(std::iter::repeat_n(0, 16 << 10));
        for byte in record {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(APART);
        }
    });
    let error = format!("{:?}", failure(open(&base, settings())));
    assert!(error.contains("too slowly"), "{error}");
    server.join().unwrap();
}

#[test]
fn what_is_no_http_is_a_failure_and_takes_no_memory() {
    let answers: [&[u8]; 7] = [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 206\r\nContent-Length: 20\r\nContent-Length: 21\r\n\r\n",
        b"HTTP/1.1 206 x\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 206 x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 206 x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n",
    ];
    for answer in answers {
        let error = read_from(move |_, _| Reply::Close(answer.to_vec()), client()).unwrap_err();
        assert!(error.is_transient(), "{error}");
    }
    let endless = [b"HTTP/1.1 200 OK\r\nX: ".to_vec(), vec![b'x'; 1 << 20]].concat();
    let error = read_from(move |_, _| Reply::Close(endless.clone()), client()).unwrap_err();
    assert!(error.to_string().contains("head is too long"), "{error}");
}

#[test]
fn redirects_are_followed_without_credentials_and_remembered() {
    let stored = Stored::new();
    let (layer, bytes) = stored.layer();
    let body = bytes.clone();
    let elsewhere = Scripted::start(move |request| {
        assert_eq!(
            request.header("authorization"),
            None,
            "secrets are nobody's business"
        );
        Reply::part(request, &body)
    });
    let to = format!("Location: {}/signed?key=1", elsewhere.base());
    let server = registry(&stored, move |request, _| {
        assert_eq!(request.header("authorization"), Some("Bearer secret"));
        Reply::status("307 Temporary Redirect", &[&to])
    });
    let host = server.base().replace("http://", "");
    let settings = RemoteSettings {
        credentials: Credentials::with_token(&host, "secret"),
        ..client()
    };
    let image = open(&server.base(), settings).unwrap();
    for _ in 0..3 {
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    assert_eq!(server.requests().len(), 2, "the manifest, and one redirect");
    assert_eq!(elsewhere.requests().len(), 3);
    assert!(
        elsewhere
            .requests()
            .iter()
            .all(|request| request.target == "/signed?key=1")
    );
}

#[test]
fn a_redirect_that_no_longer_holds_is_asked_for_again() {
    let stored = Stored::new();
    let (layer, bytes) = stored.layer();
    let body = bytes.clone();
    let elsewhere = Scripted::start(move |request| match request.target.as_str() {
        "/1" if request.number > 0 => Reply::status("403 Forbidden", &[]),
        _ => Reply::part(request, &body),
    });
    let base = elsewhere.base();
    let server = registry(&stored, move |request, _| {
        let to = format!("Location: {base}/{}", request.number);
        Reply::status("302 Found", &[&to])
    });
    let image = open(&server.base(), client()).unwrap();
    for _ in 0..3 {
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    let targets: Vec<String> = elsewhere
        .requests()
        .into_iter()
        .map(|request| request.target)
        .collect();
    assert_eq!(targets, ["/1", "/1", "/2", "/2"]);
}

#[test]
fn redirects_in_a_circle_or_to_nowhere_end() {
    for location in [
        "Location: /v2/web/blobs/x",
        "Location: ftp://x/",
        "X: no location",
    ] {
        let stored = Stored::new();
        let server = Scripted::start(move |_| Reply::status("302 Found", &[location]));
        let error = failure(open(&server.base(), client()));
        assert!(!error.is_transient(), "{error}");
        assert!(server.requests().len() < 20);
        drop(stored);
    }
}

#[test]
fn a_busy_server_is_asked_again_when_it_said_and_otherwise_left_alone() {
    read_from(
        |request, bytes| match request.number {
            1 => Reply::status("429 Too Many Requests", &["Retry-After: 0"]),
            2 => Reply::status("503 Service Unavailable", &["Retry-After: 0"]),
            _ => Reply::part(request, bytes),
        },
        client(),
    )
    .unwrap();

    let stored = Stored::new();
    let server = registry(&stored, |_, _| {
        Reply::status("503 Service Unavailable", &["Retry-After: 50"])
    });
    let image = open(&server.base(), client()).unwrap();
    for _ in 0..3 {
        let error = read(&image, &stored.layer().0).unwrap_err();
        assert!(error.is_transient());
        assert!(error.to_string().contains("busy"), "{error}");
    }
    assert_eq!(server.requests().len(), 2, "it was not asked again");
}

/// A registry with a token server: tokens are given to whom `may` likes, and are good for `good_for` requests.
fn guarded(
    stored: &Stored,
    may: impl Fn(Option<&str>) -> bool + Send + Sync + 'static,
    good_for: usize,
) -> Scripted {
    let manifest = stored.bytes_of(&stored.manifest);
    let (_, bytes) = stored.layer();
    let given = std::sync::Mutex::new((0, 0)); // tokens, uses of the last
    Scripted::start(move |request| {
        let mut given = given.lock().unwrap();
        if request.target.starts_with("/token") {
            assert_eq!(request.target, "/token?service=r&scope=repository%3Aweb%3Apull");
            if !may(request.header("authorization")) {
                return Reply::status("401 Unauthorized", &[]);
            }
            *given = (given.0 + 1, 0);
            return Reply::ok(format!(r#"{{"token": "t{}"}}"#, given.0).as_bytes());
        }
        let token = format!("Bearer t{}", given.0);
        if request.header("authorization") != Some(&token) || given.1 == good_for {
            let host = request.header("host").unwrap();
            let challenge = format!(
                r#"WWW-Authenticate: Bearer realm="http://{host}/token",service="r",scope="repository:web:pull""#
            );
            return Reply::status("401 Unauthorized", &[&challenge]);
        }
        given.1 += 1;
        match request.range() {
            None => Reply::ok(&manifest),
            Some(_) => Reply::part(request, &bytes),
        }
    })
}

#[test]
fn tokens_are_fetched_as_registries_want_and_again_when_they_ran_out() {
    let stored = Stored::new();
    let server = guarded(&stored, |authorization| authorization.is_none(), 2);
    let image = open(&server.base(), client()).unwrap();
    let (layer, bytes) = stored.layer();
    for _ in 0..4 {
        assert_eq!(read(&image, &layer).unwrap(), bytes[5..25]);
    }
    let tokens = server
        .requests()
        .into_iter()
        .filter(|request| request.target.starts_with("/token"));
    assert_eq!(tokens.count(), 3);
}

#[test]
fn a_registry_that_knows_us_gives_a_token_for_the_password() {
    let stored = Stored::new();
    let server = guarded(
        &stored,
        |authorization| authorization == Some("Basic dTpw"),
        usize::MAX,
    );
    let host = server.base().replace("http://", "");
    let file = stored.folder().join("auth.json");
    fs::write(&file, format!(r#"{{"auths": {{"{host}": {{"auth": "dTpw"}}}}}}"#)).unwrap();
    let settings = RemoteSettings {
        credentials: Credentials::read(&file).unwrap(),
        ..client()
    };
    assert!(open(&server.base(), settings).is_ok());

    let error = failure(open(&server.base(), client()));
    assert!(
        matches!(error, RemoteError::Denied { status: 401, .. }),
        "{error}"
    );
    assert!(!error.is_transient());
}

#[test]
fn who_may_not_pull_is_told_what_to_do() {
    for (status, advice) in [("401 Unauthorized", "skopeo login"), ("403 Forbidden", "owner")] {
        let stored = Stored::new();
        let server = registry(&stored, move |_, _| {
            Reply::status(status, &[r#"WWW-Authenticate: Basic realm="x""#])
        });
        let image = open(&server.base(), client()).unwrap();
        let error = read(&image, &stored.layer().0).unwrap_err();
        assert!(!error.is_transient());
        assert!(error.to_string().contains(advice), "{error}");
    }
}

#[test]
fn nobody_there_is_a_transient_failure() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = failure(open(&base, client()));
    assert!(matches!(error, RemoteError::Connect { .. }), "{error}");
    assert!(error.is_transient());
}

#[test]
fn a_server_without_tls_that_is_asked_for_it_is_told_from_one_that_is_not_there() {
    let stored = Stored::new();
    let server = serve(&[&stored.path()]);
    let error = failure(open(&format!("https://{}", server.address()), client()));
    assert!(matches!(error, RemoteError::NoTls { .. }), "{error:?}");
    assert!(error.to_string().contains("begin with http://"), "{error}");
}

#[test]
fn tls_and_a_token_are_spoken_by_both_ends_and_strangers_are_not_trusted() {
    let stored = Stored::new();
    let folder = stored.folder();
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    let identity = Identity {
        certificate: folder.join("certificate.pem"),
        key: folder.join("key.pem"),
    };
    fs::write(&identity.certificate, key.cert.pem()).unwrap();
    fs::write(&identity.key, key.signing_key.serialize_pem()).unwrap();
    let mut settings = settings(&[&stored.path()]);
    settings.tls = Some(identity.clone());
    let token = "0123456789abcdef0123";
    settings.token = Token::new(token);
    let server = ImageServer::start(settings).unwrap();

    let port = server.address().port();
    let trusting = |token: Option<&str>| RemoteSettings {
        authorities: Some(identity.certificate.clone()),
        credentials: token.map_or_else(Credentials::default, |token| {
            Credentials::with_token(&format!("127.0.0.1:{port}"), token)
        }),
        ..RemoteSettings::default()
    };
    let base = format!("https://127.0.0.1:{port}");
    let image = open(&base, trusting(Some(token))).unwrap();
    let (layer, bytes) = stored.layer();
    let mut read = vec![0; bytes.len()];
    image.blobs.read_range(&layer, 0, &mut read).unwrap();
    assert_eq!(read, bytes);

    let plain = failure(open(&format!("http://127.0.0.1:{port}"), client()));
    let plain = plain.to_string();
    assert!(plain.ends_with("begin with https://"), "{plain}");

    for wrong in [None, Some("0123456789abcdef0124")] {
        let error = failure(open(&base, trusting(wrong)));
        assert!(
            matches!(error, RemoteError::Denied { status: 401, .. }),
            "{error}"
        );
    }
    // Another authority's certificate.
    let other = rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap();
    fs::write(&identity.certificate, other.cert.pem()).unwrap();
    let error = failure(open(&base, trusting(Some(token))));
    assert!(matches!(error, RemoteError::Untrusted { .. }), "{error:?}");
    assert!(
        !error.is_transient() && error.to_string().contains("--tls-ca"),
        "{error}"
    );
    // In the clear there is nothing to be had.
    assert!(open(&format!("http://127.0.0.1:{port}"), client()).is_err());
}

/// What `openssl req -x509` makes unless it is told otherwise. To trust it does not help.
#[test]
fn an_authoritys_certificate_as_a_servers_own_is_called_that() {
    let stored = Stored::new();
    let mut asked = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    asked.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let identity = Identity {
        certificate: stored.folder().join("certificate.pem"),
        key: stored.folder().join("key.pem"),
    };
    fs::write(&identity.certificate, asked.self_signed(&key).unwrap().pem()).unwrap();
    fs::write(&identity.key, key.serialize_pem()).unwrap();
    let mut settings = settings(&[&stored.path()]);
    settings.tls = Some(identity.clone());
    let server = ImageServer::start(settings).unwrap();

    let trusting = RemoteSettings {
        authorities: Some(identity.certificate),
        ..RemoteSettings::default()
    };
    let base = format!("https://127.0.0.1:{}", server.address().port());
    let told = failure(open(&base, trusting)).to_string();
    assert!(told.contains("CA:FALSE") && !told.contains("--tls-ca"), "{told}");
}

#[test]
fn a_store_is_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Arc<dyn BlobStore>>();
    shared::<RemoteImage>();
}
