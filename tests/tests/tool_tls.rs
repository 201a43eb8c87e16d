//! An image of another host beyond a network of one's own: served by the tool over TLS to who has the token, and run by
//! an agent that the tool starts. On this host's KVM, with the bare guest.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use rcgen::CertifiedKey;
use runnel_tests::user::{User, read_to, refusal, succeeded};
use serde_json::{Value, json};

const TOKEN: &str = "a-token-of-thirty-two-characters";

/// A user with an image `web` of a machine that has 4 MiB of pattern 7 at 8 MiB and has counted to 3.
fn saved() -> User {
    let user = User::new();
    let mut machine = user
        .boot("fill:8m:4m:7 count:3", &["--name", "web"])
        .spawn()
        .unwrap();
    read_to(&mut machine, "count=3");
    user.output(&["snapshot", "web", "web"]);
    user.output(&["kill", "web"]);
    machine.wait().unwrap();
    user
}

/// A file of the user's that nobody else can read; its path.
fn file(user: &User, name: &str, text: &str) -> String {
    let path = user.folder().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A certificate for this host that is its own authority, and its key.
fn certified() -> CertifiedKey<rcgen::KeyPair> {
    rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap()
}

#[test]
fn a_machine_comes_over_tls_to_who_has_the_token_and_trusts_its_servers_authority() {
    let near = saved();
    let own = certified();
    let server = near.serve(&[
        "--token-file",
        &file(&near, "token", TOKEN),
        "--tls-cert",
        &file(&near, "cert.pem", &own.cert.pem()),
        "--tls-key",
        &file(&near, "key.pem", &own.signing_key.serialize_pem()),
    ]);
    let address = server.url().strip_prefix("https://").unwrap();

    // He has been given the certificate and the token, and shares nothing else with whoever serves.
    let far = User::new();
    let login = |name: &str, token: &str| {
        let auths = json!({ "auths": { address: { "username": "u", "password": token } } });
        file(&far, name, &auths.to_string())
    };
    let (credentials, other_credentials) = (
        login("auth", TOKEN),
        login("other-auth", "another-token-than-that"),
    );
    let authority = file(&far, "ca.pem", &own.cert.pem());
    let other_authority = file(&far, "other-ca.pem", &certified().cert.pem());
    let image = format!("{}/web", server.url());
    let resume =
        |flags: &[&str]| far.run(&[&["resume", &image, "--detach", "--name", "web"], flags].concat());

    let log_in = format!("`skopeo login --authfile FILE {address}`");
    for (flags, reason, next) in [
        (&["--tls-ca", &authority][..], "it wants credentials", &*log_in),
        (
            &["--tls-ca", &authority, "--credentials", &other_credentials],
            "does not take these credentials",
            &*log_in,
        ),
        (
            &["--tls-ca", &other_authority, "--credentials", &credentials],
            "certificate",
            "--tls-ca",
        ),
    ] {
        let told = refusal(&resume(flags));
        assert!(told.contains(reason) && told.contains(next), "{flags:?}: {told}");
        assert!(!told.contains(TOKEN), "{flags:?}: {told}");
        assert_eq!(far.machines(), Vec::<Value>::new());
        // The next one is to be started with other files.
        far.output(&["agent", "--stop"]);
    }

    succeeded(resume(&["--tls-ca", &authority, "--credentials", &credentials]));
    let heard = far.converse("web", "checkfill:8m:4m:7\ncount:1\npoweroff\n");
    assert!(
        heard.contains("checkfill=right") && heard.contains("count=4"),
        "{heard}"
    );
    let status: Value = serde_json::from_str(&far.output(&["agent", "--status", "--json"])).unwrap();
    assert_eq!(status["images"][0]["image"], image);
}
