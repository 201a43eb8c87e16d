//! Thin images through an agent: their layers are where the manifest says, which somebody else wrote, and secrets go to none
//! of those servers but the one that each is for.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod wire;

use std::fs;

use runnel_agent::agent::{Agent, AgentSettings};
use runnel_agent::remote::{Credentials, RemoteSettings};
use runnel_agent::serve::{ImageServer, ServeSettings, Token};
use wire::host::Home;
use wire::scripted::{Reply, Scripted};
use wire::{Stored, settings};

const TOKEN: &str = "0123456789abcdef0123";

/// A server that wants a password, and has nothing whatever it is given.
fn wants_a_password() -> Scripted {
    Scripted::start(|request| match request.header("authorization") {
        None => Reply::status("401 Unauthorized", &[r#"WWW-Authenticate: Basic realm="x""#]),
        Some(_) => Reply::status("404 Not Found", &[]),
    })
}

/// What it was given, each time that it was asked.
fn given(server: &Scripted) -> Vec<Option<String>> {
    let requests = server.requests();
    let given = requests.iter().map(|request| request.header("authorization"));
    given.map(|given| given.map(str::to_owned)).collect()
}

fn host_of(server: &Scripted) -> String {
    server.base().replace("http://", "")
}

#[test]
fn passwords_and_tokens_go_to_no_server_of_a_manifest_but_their_own() {
    let stored = Stored::new();
    let real = ImageServer::start(ServeSettings {
        token: Token::new(TOKEN),
        ..settings(&[&stored.path()])
    })
    .unwrap();
    let layer = stored.layer().0.digest;
    let target = format!("/v2/web/blobs/{layer}");
    let real_url = format!("http://{}{target}", real.address());

    let (stranger, friend, in_the_clear) = (wants_a_password(), wants_a_password(), wants_a_password());
    let there = real_url.clone();
    let sends_on =
        Scripted::start(move |_| Reply::status("307 Temporary Redirect", &[&format!("Location: {there}")]));
    let real_base = format!("http://{}", real.address());
    let asks_for_a_token = Scripted::start(move |_| {
        let challenge = format!(r#"WWW-Authenticate: Bearer realm="{real_base}/v2/",service="r""#);
        Reply::status("401 Unauthorized", &[&challenge])
    });
    // This host, as something that is not known to be this host.
    let anywhere = host_of(&in_the_clear).replace("127.0.0.1", "0.0.0.0");

    let servers = [&stranger, &friend, &sends_on, &asks_for_a_token];
    let mut urls: Vec<String> = servers.map(|server| format!("{}{target}", server.base())).into();
    urls.push(format!("http://{anywhere}{target}"));
    urls.push(real_url);
    let thin = stored.thin(urls);

    let file = thin.folder().join("auth.json");
    let auths = format!(
        r#"{{"auths": {{
            "{}": {{"registrytoken": "{TOKEN}"}},
            "{}": {{"auth": "ZnJpZW5kOnB3"}},
            "{anywhere}": {{"auth": "YW55Om9uZQ=="}}
        }}}}"#,
        real.address(),
        host_of(&friend),
    );
    fs::write(&file, auths).unwrap();
    let home = Home::new();
    let its = home.settings();
    let _agent = Agent::start(AgentSettings {
        remote: RemoteSettings {
            credentials: Credentials::read(&file).unwrap(),
            ..its.remote
        },
        ..home.settings()
    })
    .unwrap();
    let machine = home.machine(thin.path().to_str().unwrap()).unwrap();
    machine.gets(0);
    assert!(
        machine.has(0, 1),
        "of the one server that has it, which wants its token"
    );

    for nothing_for in [&stranger, &sends_on, &asks_for_a_token, &in_the_clear] {
        let given = given(nothing_for);
        assert!(!given.is_empty(), "it was asked");
        assert!(given.iter().all(Option::is_none), "{given:?}");
    }
    let own = Some("Basic ZnJpZW5kOnB3".to_owned());
    let given = given(&friend);
    assert!(given.contains(&own), "{given:?}");
    assert!(
        given.iter().all(|given| given.is_none() || *given == own),
        "{given:?}"
    );
}
