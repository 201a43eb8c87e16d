//! `runnel ps`: what runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use runnel_snapshot::protocol::{ImageStatus, status};
use serde::Serialize;

use super::Failure;
use crate::api::{Api, InstanceInfo, Operation, Residency, Stalled};
use crate::exit::Exit;
use crate::output::{OutputArgs, print, print_json};
use crate::progress::line as progress_line;
use crate::size;
use crate::stall;
use crate::state::{Machine, Record, StateFolder};
use crate::table::{Table, one_line};

/// How long an agent may take to say where it reads.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);

/// The longest place of an image that is shown below the table.
const IMAGE_CHARS_MAX: usize = 300;

const HELP: &str = "\
Machines that `runnel run` and `runnel resume` started for this user are listed; monitors that were started otherwise are
not. ARRIVED is how much of its memory and disks a machine that was resumed from an image has been given so far. Machines of
one image share its pages, so each counts what has come over the network and lies in memory once: `runnel agent --status`
counts by image. FROM is where an image is read now, if its agent says so, else where it was resumed from. A stalled machine
waits for a chunk that cannot be had: below the table is why, and what ends the wait. One that is saving stands for a
snapshot: some milliseconds, or, loaded from Firecracker's two files, until its memory is read. With --json \"guest_agent\"
is whether an agent in the guest has announced itself, of a machine with a guest channel.

Logs lie in $XDG_RUNTIME_DIR/runnel, or in /run/runnel for root without it: machines/NAME/vmm.log of a machine that runs,
ended/NAME.log of one that has ended, ended/NAME.1.log and so on of those of that name before (the last 32 in all),
agent/agent.log of the agent.

Examples:
    runnel ps
    runnel ps --json | jq -r '.[] | select(.stalled) | .name'";

/// List the machines that run
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct PsArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// A machine, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    pid: i32,
    /// `running`, `paused`, `not started`; `saving` while it stands for a snapshot, `loading` until it can run;
    /// `unresponsive` where the monitor does not answer.
    state: String,
    vcpus: u64,
    memory_mib: u64,
    resident_bytes: Option<u64>,
    volumes: Vec<Residency>,
    stalled: Option<Stalled>,
    /// Whether an agent in the guest has announced itself; null without a guest channel.
    guest_agent: Option<bool>,
    /// The snapshot that is being made or loaded, if one is.
    operation: Option<Operation>,
    image: Option<String>,
    /// Where its agent reads the image now, if it has one and that says so.
    read_at: Option<String>,
    kernel: Option<String>,
    uptime_ms: u64,
    api_socket: PathBuf,
    console_socket: PathBuf,
}

impl Row {
    fn of(machine: &Machine, agents: &mut Agents) -> Self {
        let api = Api::new(&machine.folder.api_socket());
        let info = api.instance_info().ok();
        let progress = info.as_ref().and_then(|_| api.progress().ok());
        let (operation, volumes) = progress.map_or((None, Vec::new()), |progress| {
            (progress.operation, progress.volumes)
        });
        let operation = operation.filter(Operation::is_under_way);
        let (state, stalled, guest_agent) = match info {
            Some(info) => (
                state_of(&info, operation.as_ref()),
                info.stalled,
                info.guest_agent,
            ),
            None => ("unresponsive".to_owned(), None, None),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let record = &machine.record;
        Self {
            name: machine.folder.name.to_string(),
            pid: machine.id.pid(),
            state,
            vcpus: record.vcpus,
            memory_mib: record.memory_mib,
            resident_bytes: machine.id.resident_bytes(),
            volumes,
            stalled,
            guest_agent,
            operation,
            image: record.image.clone(),
            read_at: agents.place_of(record),
            kernel: record.kernel.clone(),
            // The clock may have been set back meanwhile.
            uptime_ms: now_ms.saturating_sub(record.started_at_unix_ms),
            api_socket: machine.folder.api_socket(),
            console_socket: machine.folder.console_socket(),
        }
    }

    fn arrived(&self) -> String {
        let sum = |bytes: fn(&Residency) -> u64| self.volumes.iter().map(bytes).fold(0, u64::saturating_add);
        match sum(|volume| volume.bytes_total) {
            0 => "-".to_owned(),
            total => size::share(sum(|volume| volume.bytes_resident), total),
        }
    }

    fn cells(&self) -> Vec<String> {
        const FROM_CHARS_MAX: usize = 60;
        let known = |number: u64, text: String| if number == 0 { "-".to_owned() } else { text };
        let state = match &self.stalled {
            Some(_) => "stalled".to_owned(),
            None => self.state.clone(),
        };
        let from = self.read_at.as_ref().or(self.image.as_ref());
        let from = from.or(self.kernel.as_ref()).map_or("-", String::as_str);
        vec![
            self.name.clone(),
            self.pid.to_string(),
            state,
            known(self.vcpus, self.vcpus.to_string()),
            known(
                self.memory_mib,
                size::bytes(self.memory_mib.saturating_mul(1 << 20)),
            ),
            self.resident_bytes.map_or("-".to_owned(), size::bytes),
            self.arrived(),
            size::duration(Duration::from_millis(self.uptime_ms)),
            one_line(from, FROM_CHARS_MAX),
        ]
    }

    /// What is more to be said of it, each in a line of its own.
    fn remarks(&self) -> impl Iterator<Item = String> {
        let remarks = [self.stall(), self.elsewhere(), self.progress()];
        remarks.into_iter().flatten()
    }

    /// That its image is not read where it was resumed from.
    fn elsewhere(&self) -> Option<String> {
        let (first, now) = (self.image.as_ref()?, self.read_at.as_ref()?);
        (first != now).then(|| {
            format!(
                "{} was resumed from {}, and its agent reads that image at {} now\n",
                self.name,
                one_line(first, IMAGE_CHARS_MAX),
                one_line(now, IMAGE_CHARS_MAX)
            )
        })
    }

    /// How far its snapshot is.
    fn progress(&self) -> Option<String> {
        let operation = self.operation.as_ref()?;
        let what = match (&*operation.kind, operation.is_holding) {
            ("create", true) => "is being saved, and stands meanwhile",
            ("create", false) => "goes on as it is while it is being saved",
            _ => "is being loaded",
        };
        let (done, total) = (operation.bytes_done, operation.bytes_total);
        let line = progress_line(&format!("{} {what}", self.name), &operation.phase, done, total);
        Some(format!("{line}\n"))
    }

    /// Why it is stalled, and until when.
    fn stall(&self) -> Option<String> {
        let stalled = self.stalled.as_ref()?;
        Some(format!(
            "{} is stalled: it has waited {} for {}\n{}\n",
            self.name,
            size::duration(Duration::from_millis(stalled.waiting_ms)),
            stall::cause(stalled),
            stall::cure(&self.name, self.image.as_deref(), stalled),
        ))
    }
}

/// What agents say of their images, each asked once.
#[derive(Default)]
struct Agents(BTreeMap<PathBuf, Vec<ImageStatus>>);

impl Agents {
    /// Where the image of a machine is read now, if that is known.
    fn place_of(&mut self, record: &Record) -> Option<String> {
        let (agent, digest) = (record.agent.as_ref()?, record.digest.as_ref()?);
        let images = self.0.entry(agent.clone()).or_insert_with(|| {
            let status = status(agent, AGENT_PATIENCE);
            status.map_or(Vec::new(), |status| status.images)
        });
        let mut images = images.iter();
        let image = images.find(|image| image.digest.to_string() == *digest)?;
        Some(image.image.clone())
    }
}

fn state_of(info: &InstanceInfo, operation: Option<&Operation>) -> String {
    match operation {
        Some(operation) if operation.is_holding => "saving".to_owned(),
        Some(operation) if operation.kind == "load" => "loading".to_owned(),
        _ => info.state.to_ascii_lowercase(),
    }
}

pub(crate) fn run(args: &PsArgs) -> Result<Exit, Failure> {
    let machines = StateFolder::open()?.machines()?;
    let mut agents = Agents::default();
    let rows = machines.iter().map(|machine| Row::of(machine, &mut agents));
    let rows: Vec<Row> = rows.collect();
    if args.output.json {
        print_json(&rows)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&[
        "NAME", "PID", "STATE", "VCPUS", "MEMORY", "RESIDENT", "ARRIVED", "UPTIME", "FROM",
    ]);
    for row in &rows {
        table.push(row.cells());
    }
    let remarks: String = rows.iter().flat_map(Row::remarks).collect();
    print(&format!("{table}{remarks}"))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row {
            name: "web".into(),
            pid: 7,
            state: "running".into(),
            vcpus: 2,
            memory_mib: 512,
            resident_bytes: Some(3 << 20),
            volumes: Vec::new(),
            stalled: None,
            guest_agent: None,
            operation: None,
            image: None,
            read_at: None,
            kernel: Some("/boot/vmlinuz".into()),
            uptime_ms: 61_000,
            api_socket: "/run/api.sock".into(),
            console_socket: "/run/console.sock".into(),
        }
    }

    #[test]
    fn a_booted_machine_has_nothing_to_wait_for() {
        let expected = [
            "web",
            "7",
            "running",
            "2",
            "512 MiB",
            "3 MiB",
            "-",
            "1m 1s",
            "/boot/vmlinuz",
        ];
        assert_eq!(row().cells(), expected);
        assert_eq!(row().remarks().count(), 0);
    }

    #[test]
    fn a_stalled_machine_says_what_it_waits_for_and_what_ends_that() {
        let volume = |volume: &str, bytes_resident| Residency {
            volume: volume.into(),
            bytes_resident,
            bytes_total: 1000,
        };
        let row = Row {
            volumes: vec![volume("memory", 500), volume("drive:root", 0)],
            stalled: Some(Stalled {
                volume: "memory".into(),
                chunk: 12,
                reason: "connection refused\x1b[2J".into(),
                waiting_ms: 9000,
                needs_repair: false,
            }),
            ..row()
        };
        assert_eq!(row.cells()[2], "stalled");
        assert_eq!(row.cells()[6], "25.0 %");
        let remark = "web is stalled: it has waited 9s for chunk 12 of memory: connection refused [2J\n\
                      web goes on by itself once that can be read again\n";
        assert_eq!(row.remarks().collect::<Vec<_>>(), [remark]);
    }

    #[test]
    fn a_machine_is_shown_from_where_its_agent_reads_now() {
        let moved = Row {
            image: Some("http://10.0.0.1/web".into()),
            read_at: Some("http://10.0.0.2/web".into()),
            ..row()
        };
        assert_eq!(moved.cells()[8], "http://10.0.0.2/web");
        let told: String = moved.remarks().collect();
        assert!(
            told.contains("resumed from http://10.0.0.1/web") && told.contains("10.0.0.2/web now"),
            "{told}"
        );
        let stayed = Row {
            read_at: moved.image.clone(),
            ..moved
        };
        assert_eq!(stayed.remarks().count(), 0);
    }

    #[test]
    fn a_machine_whose_image_is_damaged_says_what_to_do() {
        let row = Row {
            stalled: Some(Stalled {
                volume: "memory".into(),
                chunk: 12,
                reason: "the frame is damaged".into(),
                waiting_ms: 9000,
                needs_repair: true,
            }),
            ..row()
        };
        let told: String = row.remarks().collect();
        for expected in ["the frame is damaged", "runnel verify", "runnel kill web"] {
            assert!(told.contains(expected), "{told}");
        }
    }

    #[test]
    fn a_machine_that_stands_for_its_snapshot_is_saving_and_one_that_runs_on_runs() {
        let operation = |kind: &str, is_holding| Operation {
            kind: kind.into(),
            state: "running".into(),
            phase: "copying".into(),
            bytes_done: 512,
            bytes_total: 1024,
            is_holding,
            pause_ms: None,
        };
        let info = InstanceInfo {
            state: "Running".into(),
            stalled: None,
            guest_agent: None,
        };
        for (operation, state, remark) in [
            (operation("create", true), "saving", "is being saved, and stands"),
            (operation("create", false), "running", "goes on as it is while"),
            (operation("load", false), "loading", "is being loaded"),
        ] {
            assert_eq!(state_of(&info, Some(&operation)), state);
            let row = Row {
                operation: Some(operation),
                ..row()
            };
            let told: String = row.remarks().collect();
            assert!(told.contains(remark), "{told}");
            assert!(told.ends_with("50.0 % (512 B of 1 KiB), copying\n"), "{told}");
        }
        assert_eq!(state_of(&info, None), "running");
    }
}
