//! Two hosts that share nothing but a network of 20 ms: an image served on the one, an agent and a machine on the
//! other, and the serving host that goes away in mid-stream.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use runnel_agent::serve::ImageServer;
use runnel_snapshot::protocol::status;
use runnel_tests::agent::AgentFolders;
use runnel_tests::bare::{about, configure, hear, save, start, tell, wait_until};
use runnel_tests::lab::hosts::{SOURCE, TwoHosts};
use runnel_tests::lab::skip;
use runnel_tests::monitor::{DEADLINE, Monitor, ask};
use runnel_tests::served::{TRICKLE, serve_at};
use runnel_tests::{bare_guest, program};
use serde_json::{Value, json};
use tempfile::TempDir;

const ROUND_TRIP: Duration = Duration::from_millis(20);
const PORT: u16 = 5000;
/// How long the serving host is away: less than the 15 s that stall a machine unless it was told otherwise.
const AWAY: Duration = Duration::from_secs(10);
/// How often it is looked at the machine meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// The last MiBs of the guest's RAM, where its initrd lies: noise.
const NOISE: &str = "sum:60m:4m";

/// An image on one host, of a machine that has 4 MiB of pattern 7 at 8 MiB, noise at the end, and has counted to 3.
struct Lab {
    server: Option<ImageServer>,
    hosts: TwoHosts,
    agents: AgentFolders,
    images: TempDir,
    /// What the guest says of its noise.
    sum: String,
    /// What the target has of its own.
    own: TempDir,
}

impl Lab {
    /// `None` where this user may not make hosts.
    fn new() -> Option<Self> {
        let hosts = match TwoHosts::new(ROUND_TRIP) {
            Ok(hosts) => hosts,
            Err(error) => {
                skip(&error.to_string());
                return None;
            }
        };
        let images = tempfile::tempdir().unwrap();
        let image = images.path().join("bare");
        let noise = images.path().join("noise");
        let mut bytes = Vec::new();
        let random = File::open("/dev/urandom").unwrap();
        random.take(4 << 20).read_to_end(&mut bytes).unwrap();
        fs::write(&noise, bytes).unwrap();
        let mut machine = Monitor::start();
        configure(&machine, 1, "");
        let boot = json!({
            "kernel_image_path": bare_guest(), "initrd_path": noise, "boot_args": "fill:8m:4m:7 count:3"
        });
        machine.demand("PUT", "/boot-source", &boot);
        start(&mut machine);
        machine.type_line(NOISE);
        let sum = machine.wait_for_console("sum=");
        save(&machine, &image);
        drop(machine);
        hosts.target().hide(images.path()).unwrap();
        let server = hosts
            .source()
            .run(move || serve_at(&image, (SOURCE, PORT).into()));
        Some(Self {
            server: Some(server),
            hosts,
            agents: AgentFolders::new(),
            images,
            sum,
            own: tempfile::tempdir().unwrap(),
        })
    }

    fn image(&self) -> String {
        format!("http://{SOURCE}:{PORT}/bare")
    }

    fn spawn(&self, command: Command) -> std::io::Result<Child> {
        self.hosts.target().spawn(command)
    }

    /// Takes the serving host off the network, or puts it back.
    fn set_link(&self, state: &'static str) {
        self.hosts.source().set_link(state).unwrap();
    }

    fn target_sees(&self, path: &Path) -> bool {
        let path = path.to_owned();
        self.hosts.target().run(move || path.exists())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

#[test]
fn a_guest_waits_for_a_serving_host_that_is_away_for_ten_seconds_and_goes_on() {
    let Some(lab) = Lab::new() else { return };
    let image = lab.images.path().join("bare");
    assert!(image.exists() && !lab.target_sees(&image));
    let received_before = lab.hosts.target().bytes_received();
    let _agent = lab.agents.start_by(&TRICKLE, |command| lab.spawn(command));
    let socket = lab.own.path().join("api.sock");
    let mut machine = Monitor::spawn_at(&socket, |command| lab.spawn(command));
    machine.wait_for_log("Listening on API socket");
    let request = json!({"image": lab.image(), "agent_path": lab.agents.socket(), "resume_vm": true});
    machine.demand("PUT", "/snapshot/load", &request);
    tell(&mut machine, "count:1 checkfill:8m:1m:7", "count=4");
    hear(&mut machine, "checkfill=right");

    lab.set_link("down");
    let begun = Instant::now();
    // Memory that has not arrived, and cannot until the host is back.
    machine.type_line(&format!("{NOISE} checkfill:9m:3m:7 count:1"));
    while begun.elapsed() < AWAY {
        assert_eq!(
            about(&machine)["stalled"],
            Value::Null,
            "after {:?}",
            begun.elapsed()
        );
        thread::sleep(LOOK);
    }
    let resident_away = resident(&machine);
    lab.set_link("up");
    hear(&mut machine, &lab.sum);
    hear(&mut machine, "checkfill=right");
    hear(&mut machine, "count=5");
    // Nothing of the noise was there before.
    assert!(resident_away + (4 << 20) <= resident(&machine));
    assert_eq!(about(&machine)["stalled"], Value::Null);

    // What the agent says that it cost is what the interface has seen.
    let mut counts = (0.0, 0.0);
    wait_until("agent and interface agree within 5 %", || {
        let told = status(&lab.agents.socket(), DEADLINE).unwrap().images[0].bytes_received;
        let seen = lab.hosts.target().bytes_received() - received_before;
        counts = (told as f64, seen as f64);
        (counts.0 - counts.1).abs() <= counts.1 * 0.05
    });
    eprintln!(
        "the agent received {} bytes, the interface {}",
        counts.0, counts.1
    );
}

fn resident(machine: &Monitor) -> u64 {
    let progress = machine.demand("GET", "/snapshot/progress", &Value::Null);
    progress["volumes"][0]["bytes_resident"].as_u64().unwrap()
}

/// What `runnel` says on the target.
fn runnel(lab: &Lab, arguments: &[&str]) -> String {
    let mut command = Command::new(program("runnel"));
    command
        .args(arguments)
        .env("XDG_RUNTIME_DIR", lab.own.path())
        .env("XDG_CACHE_HOME", lab.own.path().join("cache"))
        .env("RUNNEL_IMAGES", lab.own.path().join("images"))
        .env("RUNNEL_VMM", program("runnel-vmm"))
        .stdin(Stdio::null());
    let output = lab.hosts.target().run(move || command.output()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Ends what `runnel resume` started, however the test ends.
struct Resumed<'l>(&'l Lab);

impl Drop for Resumed<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            runnel(self.0, &["kill", "--all"]);
        } else if let Ok(machines) = serde_json::from_str::<Value>(&runnel(self.0, &["ps", "--json"])) {
            eprintln!("left to the host's end: {machines}");
            runnel(self.0, &["kill", "--all"]);
        }
    }
}

#[test]
fn a_serving_host_that_stays_away_stalls_the_machine_for_all_to_see_until_it_is_back() {
    let Some(lab) = Lab::new() else { return };
    let _agent = lab.agents.start_by(&TRICKLE, |command| lab.spawn(command));
    let agent = lab.agents.socket();
    let _resumed = Resumed(&lab);
    let arguments = ["resume", &lab.image(), "--agent", agent.to_str().unwrap()];
    let more = ["--detach", "--paused", "--name", "web", "--stall-after", "1s"];
    runnel(&lab, &[&arguments[..], &more].concat());
    let machine = || {
        let machines: Value = serde_json::from_str(&runnel(&lab, &["ps", "--json"])).unwrap();
        machines[0].clone()
    };
    let socket = PathBuf::from(machine()["api_socket"].as_str().unwrap());
    let stalled = || ask(&socket, "GET", "/", &Value::Null).1["stalled"].clone();
    assert_eq!(stalled(), Value::Null);

    // Gone before it runs: what it touches first is missing.
    lab.set_link("down");
    runnel(&lab, &["unpause", "web"]);
    let mut console = connect(&machine());
    std::io::Write::write_all(&mut console, b"checkfill:8m:1m:7\n").unwrap();
    wait_until("GET / says that it is stalled", || !stalled().is_null());
    let seen = machine();
    assert_eq!(seen["stalled"]["volume"], "memory", "{seen}");
    assert!(seen["stalled"]["waiting_ms"].as_u64().unwrap() >= 1000, "{seen}");
    let table = runnel(&lab, &["ps"]);
    assert!(
        table.contains("stalled") && table.contains("web is stalled: it has waited"),
        "{table}"
    );

    lab.set_link("up");
    wait_until("it goes on by itself", || stalled().is_null());
    let mut heard = String::new();
    let mut lines = std::io::BufReader::new(console);
    while !heard.contains("checkfill=") {
        let read = std::io::BufRead::read_line(&mut lines, &mut heard).unwrap();
        assert!(read > 0, "the console ended after {heard:?}");
    }
    assert!(heard.contains("checkfill=right"), "{heard}");
    wait_until("it is stalled no more", || stalled().is_null());
    let seen = machine();
    assert_eq!(
        (&seen["stalled"], &seen["state"]),
        (&Value::Null, &json!("running"))
    );
}

/// The machine's console, as `runnel console` reaches it.
fn connect(machine: &Value) -> std::os::unix::net::UnixStream {
    let path = machine["console_socket"].as_str().unwrap();
    let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}
