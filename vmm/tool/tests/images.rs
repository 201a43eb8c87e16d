//! The commands about images, as a process: what they print, and what they end with.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

mod user;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use runnel_snapshot::digest::BlobDigest;
use serde_json::Value;
use user::{CHUNK, User, text};

/// Changes a byte in the middle of a blob.
fn damage(image: &Path, digest: &BlobDigest) {
    let path = image.join("blobs/sha256").join(digest.hex());
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 40).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 40).unwrap();
}

#[test]
fn inspect_shows_volumes_zeros_sections_and_lineage() {
    let user = User::new();
    let parent = user.capture("web-v1", None);
    user.capture("web-v2", Some(parent.manifest.digest));

    let shown = user.json(&["inspect", "web-v2", "--json"]);
    assert_eq!(shown["saved_at_unix_ms"], 1_700_000_000_000_u64);
    assert_eq!(shown["volume_bytes"], 6 * CHUNK);
    assert_eq!(shown["sections"]["vcpu"]["count"], 2);
    let needed = serde_json::json!([{ "id": "scratch", "bytes": 1 << 20, "is_read_only": true }]);
    assert_eq!(shown["drives_to_supply"], needed);
    let memory = &shown["volumes"][0];
    assert_eq!(memory["name"], "memory");
    assert_eq!(memory["zero_bytes"], 2 * CHUNK);
    assert_eq!(
        (&memory["chunks"], &memory["data_chunks"]),
        (&4.into(), &2.into())
    );
    assert_eq!(shown["volumes"][1]["zero_bytes"], 2 * CHUNK);
    assert_eq!(shown["lineage"][0]["digest"], parent.manifest.digest.to_string());
    assert_eq!(
        shown["lineage"][0]["image"],
        user.store().join("web-v1").to_str().unwrap()
    );

    let text = user.output(&["inspect", "web-v2"]);
    for expected in [
        "2023-11-14 22:13:20 UTC",
        "memory",
        "drive:root",
        "vcpu v1 ×2",
        "50.0 %",
        "parent",
        "--drive scratch=PATH",
    ] {
        assert!(text.contains(expected), "{expected} is not in\n{text}");
    }
}

#[test]
fn verify_finds_an_image_sound_or_names_the_damaged_blob() {
    let user = User::new();
    let image = user.capture("web", None);
    let sound = user.json(&["verify", "web", "--json"]);
    assert_eq!((&sound["sound"], &sound["chunks"]), (&true.into(), &2.into()));

    let layer = image.volumes[0].layers[0].digest;
    damage(&user.store().join("web"), &layer);
    let output = user.run(&["verify", "web"]);
    assert_eq!(output.status.code(), Some(3));
    let told = text(&output.stdout);
    assert!(
        told.contains(&layer.to_string()) && told.contains("chunk 0"),
        "{told}"
    );
    let json = user.run(&["verify", "web", "--json"]);
    assert_eq!(json.status.code(), Some(3));
    assert_eq!(
        serde_json::from_slice::<Value>(&json.stdout).unwrap()["sound"],
        false
    );
}

#[test]
fn verify_calls_an_image_damaged_whose_list_or_manifest_cannot_be_used() {
    let user = User::new();
    let captured = user.capture("web", None);
    let image = user.store().join("web");
    let manifest = image.join("blobs/sha256").join(captured.manifest.digest.hex());
    let [marker, index] = ["oci-layout", "index.json"].map(|name| image.join(name));
    for file in [&marker, &index, &manifest] {
        let sound = fs::read(file).unwrap();
        for damaged in [None, Some(&b"{"[..]), Some(&sound[..sound.len() - 1])] {
            match damaged {
                None => fs::remove_file(file).unwrap(),
                Some(bytes) => fs::write(file, bytes).unwrap(),
            }
            let told = user.run(&["verify", "web"]);
            assert_eq!(told.status.code(), Some(3), "{file:?}: {}", text(&told.stderr));
            assert!(text(&told.stdout).contains("web is damaged"), "{file:?}");
            let json = user.run(&["verify", "web", "--json"]);
            assert_eq!(json.status.code(), Some(3), "{file:?}");
            let shown: Value = serde_json::from_slice(&json.stdout).unwrap();
            assert_eq!(shown["sound"], false, "{shown}");
            assert_eq!(shown["findings"].as_array().unwrap().len(), 1, "{shown}");
            fs::write(file, &sound).unwrap();
        }
    }
    // Another digest than what is there is no damage.
    let pinned = format!("web@sha256:{}", "0".repeat(64));
    assert_eq!(user.run(&["verify", &pinned]).status.code(), Some(1));
    user.output(&["verify", "web"]);
}

#[test]
fn images_are_listed_removed_and_nothing_else_is() {
    let user = User::new();
    let captured = user.capture("web", None);
    fs::create_dir(user.store().join("precious")).unwrap();
    let listed = user.json(&["image", "ls", "--json"]);
    assert_eq!(listed["images"].as_array().unwrap().len(), 1);
    assert_eq!(
        listed["images"][0]["digest"],
        captured.manifest.digest.to_string()
    );
    assert!(user.output(&["image", "ls"]).contains("web"));

    // One of which a part is missing is no image to rely on.
    let half = user.capture("half", None);
    let layer = &half.volumes[0].layers[0].digest;
    fs::remove_file(user.store().join("half/blobs/sha256").join(layer.hex())).unwrap();
    let listed = user.json(&["image", "ls", "--json"]);
    assert_eq!(listed["images"].as_array().unwrap().len(), 1);
    let reason = listed["broken"][0].to_string();
    assert!(
        reason.contains("half") && reason.contains(&layer.hex()),
        "{reason}"
    );
    user.output(&["image", "rm", "half"]);

    for name in ["precious", "..", "no-such"] {
        let refused = user.run(&["image", "rm", "web", name]);
        assert_eq!(refused.status.code(), Some(1), "{name}");
        let told = text(&refused.stderr);
        assert!(told.contains("nothing was removed"), "{told}");
    }
    assert!(
        user.store().join("web").is_dir(),
        "all are looked at before one goes"
    );
    let told = user.output(&["image", "rm", "web"]);
    assert_eq!(told, format!("removed {}\n", user.store().join("web").display()));
    assert!(!user.store().join("web").exists());
    assert!(user.store().join("precious").is_dir());
    assert_eq!(
        user.json(&["image", "ls", "--json"])["images"],
        Value::Array(Vec::new())
    );
}

#[test]
fn what_is_to_be_typed_is_quoted_for_a_shell() {
    let user = User::new();
    let name = "it's broken";
    fs::create_dir_all(user.store().join(name)).unwrap();
    fs::write(user.store().join(name).join("oci-layout"), "").unwrap();
    let told = text(&user.run(&["image", "ls"]).stderr);
    assert!(told.contains(r"`runnel image rm 'it'\''s broken'`"), "{told}");
    let away = user.folder.path().join("no agent");
    let away = away.to_str().unwrap();
    let told = text(
        &user
            .run(&["resume", "http://127.0.0.1:9/web", "--agent", away])
            .stderr,
    );
    assert!(
        told.contains(&format!("`runnel agent --socket '{away}'`")),
        "{told}"
    );
    let told = text(
        &user
            .run(&["resume", "http://127.0.0.1:9/web", "--overlay-directory", away])
            .stderr,
    );
    assert!(told.contains(&format!("`mkdir -p '{away}'`")), "{told}");
}

#[test]
fn prune_takes_old_images_only_when_told_and_says_what_it_would_do() {
    let user = User::new();
    user.capture("web", None);
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    let index = fs::File::options()
        .write(true)
        .open(user.store().join("web/index.json"))
        .unwrap();
    index.set_modified(long_ago).unwrap();

    let nothing = user.run(&["image", "prune"]);
    assert_eq!(
        (nothing.status.code(), text(&nothing.stdout)),
        (Some(0), String::new())
    );
    assert!(text(&nothing.stderr).contains("nothing to remove"));
    let would = user.output(&["image", "prune", "--older-than", "30d", "--dry-run"]);
    assert!(
        would.starts_with("would remove") && would.contains("web"),
        "{would}"
    );
    assert!(user.store().join("web").is_dir());
    user.output(&["image", "prune", "--older-than", "30d"]);
    assert!(!user.store().join("web").exists());
}

/// `runnel serve` as `--json` announced it, until it is ended.
struct Server {
    process: std::process::Child,
    announced: Value,
}

impl Server {
    fn start(user: &User, arguments: &[&str]) -> Self {
        let all = [&["serve", "--listen", "127.0.0.1:0", "--json"], arguments].concat();
        let mut process = user.command(&all).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = process.stdout.take().unwrap();
        let mut announced = serde_json::Deserializer::from_reader(stdout).into_iter::<Value>();
        let announced = announced.next().unwrap().unwrap();
        Self { process, announced }
    }

    fn url_of(&self, image: &str) -> String {
        format!("{}/{image}", self.announced["url"].as_str().unwrap())
    }

    fn end(mut self) {
        let kill = Command::new("kill").arg(self.process.id().to_string()).status();
        assert!(kill.unwrap().success());
        let status = self.process.wait().unwrap();
        assert!(status.success(), "to be ended is no failure: {status}");
    }
}

#[test]
fn an_image_of_a_server_is_inspected_without_fetching_it() {
    let user = User::new();
    let captured = user.capture("web", None);
    let server = Server::start(&user, &[]);
    assert_eq!(
        server.announced["images"]["web"],
        user.store().join("web").to_str().unwrap()
    );
    let shown = user.json(&["inspect", &server.url_of("web"), "--json"]);
    assert_eq!(shown["digest"], captured.manifest.digest.to_string());
    server.end();
}

#[test]
fn a_server_that_wants_to_know_who_asks_says_how_credentials_for_it_are_made_and_given() {
    let user = User::new();
    user.capture("web", None);
    let token = user.folder.path().join("token");
    fs::write(&token, "a-token-of-thirty-two-characters").unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let server = Server::start(&user, &["--token-file", "token"]);
    let address = server.announced["address"].as_str().unwrap().to_owned();
    let inspect = |credentials: Option<&str>| {
        let mut inspect = user.command(&["inspect", &server.url_of("web")]);
        if let Some(credentials) = credentials {
            let file = user.folder.path().join("auth.json");
            fs::write(&file, credentials).unwrap();
            inspect.env("REGISTRY_AUTH_FILE", &file);
        }
        inspect.output().unwrap()
    };
    let login = |password: &str| {
        serde_json::json!({ "auths": { &address: { "username": "u", "password": password } } }).to_string()
    };
    for (credentials, reason) in [
        (None, "it wants credentials"),
        (Some(login("wrong")), "does not take these"),
    ] {
        let refused = inspect(credentials.as_deref());
        assert_eq!(refused.status.code(), Some(1));
        let told = text(&refused.stderr);
        let advice = format!("`skopeo login --tls-verify=false --authfile FILE {address}`");
        for expected in [
            reason,
            &advice,
            &format!("`docker login {address}`"),
            "REGISTRY_AUTH_FILE",
        ] {
            assert!(told.contains(expected), "{told}");
        }
    }
    let let_in = inspect(Some(&login("a-token-of-thirty-two-characters")));
    assert!(let_in.status.success(), "{}", text(&let_in.stderr));
    server.end();
}

#[test]
fn a_server_whose_authority_is_private_is_trusted_once_it_is_named() {
    let user = User::new();
    user.capture("web", None);
    let pair = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let [certificate, key] = ["cert.pem", "key.pem"].map(|name| user.folder.path().join(name));
    fs::write(&certificate, pair.cert.pem()).unwrap();
    fs::write(&key, pair.signing_key.serialize_pem()).unwrap();
    let server = Server::start(&user, &["--tls-cert", "cert.pem", "--tls-key", "key.pem"]);
    let image = server.url_of("web");
    assert!(image.starts_with("https://"), "{image}");

    let refused = user.run(&["inspect", &image]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("--tls-ca"),
        "{}",
        text(&refused.stderr)
    );
    user.output(&["inspect", &image, "--tls-ca", "cert.pem"]);
    server.end();
}

#[test]
fn an_image_that_is_served_says_so_and_is_removed_only_by_force() {
    let user = User::new();
    user.capture("web", None);
    user.capture("db", None);
    fs::create_dir(user.store().join("Notes")).unwrap();
    let serve = |images: &[&str]| {
        let mut serve = user.command(&[&["serve", "--listen", "localhost:0"], images].concat());
        let mut server = serve.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains("serving at"));
        (server, lines)
    };
    let end = |mut server: std::process::Child| {
        let kill = Command::new("kill").arg(server.id().to_string()).status();
        assert!(kill.unwrap().success());
        assert!(server.wait().unwrap().success());
    };

    let (server, mut lines) = serve(&["web"]);
    assert!(lines.next().unwrap().unwrap().ends_with("/web"));
    let refused = user.run(&["image", "rm", "db", "web"]);
    let told = text(&refused.stderr);
    let who = format!("web is being served by process {}", server.id());
    assert!(
        told.contains(&who) && told.contains("nothing was removed"),
        "{told}"
    );
    user.output(&["image", "rm", "db"]);
    end(server);

    let (server, mut lines) = serve(&[]);
    assert!(lines.next().unwrap().unwrap().ends_with("/web"));
    assert_eq!(user.run(&["image", "rm", "web"]).status.code(), Some(1));
    user.output(&["image", "prune", "--older-than", "0s"]);
    assert!(user.store().join("web").is_dir());
    user.output(&["image", "rm", "web", "--force"]);
    end(server);
    assert_eq!(
        user.json(&["image", "ls", "--json"])["images"],
        Value::Array(Vec::new())
    );
}

#[test]
fn an_image_of_which_something_is_missing_is_not_served_and_alone_ends_the_command() {
    let user = User::new();
    user.capture("db", None);
    let captured = user.capture("web", None);
    let layer = captured.volumes[0].layers[0].digest;
    let blob = user.store().join("web/blobs/sha256").join(layer.hex());
    fs::File::options()
        .write(true)
        .open(&blob)
        .unwrap()
        .set_len(9)
        .unwrap();

    let server = Server::start(&user, &["web", "db"]);
    let images = server.announced["images"].as_object().unwrap();
    assert_eq!(images.keys().collect::<Vec<_>>(), ["db"]);
    let reason = server.announced["skipped"][0]["reason"].as_str().unwrap();
    assert!(
        reason.contains(&layer.to_string()) && reason.contains("truncated"),
        "{reason}"
    );
    let ask = |name: &str| {
        let address = server.announced["address"].as_str().unwrap();
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let line =
            format!("GET /v2/{name}/manifests/latest HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        std::io::Write::write_all(&mut stream, line.as_bytes()).unwrap();
        let mut answer = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut answer).unwrap();
        text(&answer).split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!([ask("web"), ask("db")], ["500", "200"]);
    server.end();

    let output = user.run(&["serve", "web", "--listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert!(
        told.contains("nothing can be served") && told.contains("truncated"),
        "{told}"
    );
}

#[test]
fn a_store_at_a_relative_path_is_refused() {
    let user = User::new();
    let output = user
        .command(&["image", "ls"])
        .env("RUNNEL_IMAGES", "images")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("absolute path"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_store_that_was_named_and_is_not_there_is_said_to_be_missing() {
    let user = User::new();
    let missing = user.folder.path().join("no images");
    let run = |arguments: &[&str]| {
        let mut command = user.command(arguments);
        command.env("RUNNEL_IMAGES", &missing).output().unwrap()
    };
    let advice = format!("`mkdir -p '{}'`", missing.display());
    for arguments in [
        &["image", "ls"][..],
        &["image", "prune", "--older-than", "1d"],
        &["image", "rm", "web"],
        &["inspect", "web"],
    ] {
        let told = text(&run(arguments).stderr);
        assert!(
            told.contains("no such folder") && told.contains(&advice),
            "{arguments:?}: {told}"
        );
    }
    assert!(!missing.exists());
    // Nobody has said where the usual one is: it is made when it is needed.
    let usual = user
        .command(&["image", "ls"])
        .env_remove("RUNNEL_IMAGES")
        .env("XDG_DATA_HOME", &missing)
        .output();
    assert_eq!(text(&usual.unwrap().stderr), "");
}

#[test]
fn directories_that_are_no_images_are_listed_as_such_and_stay() {
    let user = User::new();
    user.capture("web", None);
    let index = fs::read(user.store().join("web/index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let mut other = index["manifests"][0].clone();
    other["artifactType"] = "application/vnd.somebody".into();
    let list = |manifests: &[&Value]| {
        let mut list = index.clone();
        list["manifests"] = serde_json::json!(manifests);
        list.to_string()
    };
    let (others, both) = (list(&[&other]), list(&[&index["manifests"][0], &other]));
    for (name, list) in [("container", &others), ("both", &both)] {
        fs::create_dir_all(user.store().join(name).join("blobs/sha256")).unwrap();
        fs::copy(
            user.store().join("web/oci-layout"),
            user.store().join(name).join("oci-layout"),
        )
        .unwrap();
        fs::write(user.store().join(name).join("index.json"), list).unwrap();
    }
    fs::create_dir(user.store().join("half")).unwrap();
    fs::write(user.store().join("half/index.json"), "junk").unwrap();
    fs::create_dir(user.store().join("notes")).unwrap();
    let listed = user.run(&["image", "ls"]);
    let told = text(&listed.stderr);
    for (name, reason) in [
        ("container", "another kind"),
        ("half", "cut short"),
        ("notes", "neither oci-layout"),
    ] {
        let line = format!("{} is no image", user.store().join(name).display());
        let line = told.lines().find(|said| said.starts_with(&line));
        assert!(line.is_some_and(|line| line.contains(reason)), "{name}: {told}");
    }
    let json = user.json(&["image", "ls", "--json"]);
    assert_eq!(json["others"].as_array().unwrap().len(), 3, "{json}");

    let refused = text(&user.run(&["image", "rm", "both", "web"]).stderr);
    assert!(
        refused.contains("nothing was removed") && refused.contains("another kind"),
        "{refused}"
    );
    user.output(&["image", "prune", "--older-than", "0s"]);
    assert!(!user.store().join("web").exists());
    for name in ["container", "both", "half", "notes"] {
        let refused = user.run(&["image", "rm", "--force", name]);
        assert_eq!(refused.status.code(), Some(1), "{name}");
        assert!(user.store().join(name).is_dir(), "{name}");
    }
}

#[test]
fn of_an_image_that_lies_elsewhere_the_link_alone_is_removed() {
    let user = User::new();
    user.capture("web", None);
    let elsewhere = user.folder.path().join("elsewhere");
    fs::rename(user.store().join("web"), &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, user.store().join("web")).unwrap();
    user.output(&["image", "rm", "web"]);
    assert!(user.store().join("web").symlink_metadata().is_err());
    user.output(&["verify", elsewhere.to_str().unwrap()]);
}

#[test]
fn serving_beyond_loopback_is_refused_with_what_is_missing() {
    let user = User::new();
    let output = user.run(&["serve", "--listen", "0.0.0.0:0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("--insecure"),
        "{}",
        text(&output.stderr)
    );
}
