//! `runnel snapshot`: saves a machine as an image, while it runs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use serde_json::{Value, json};

use super::Failure;
use crate::api::{Api, ApiError};
use crate::exit::Exit;
use crate::fault::is_of_a_chunk;
use crate::images::ImageStore;
use crate::monitor::FAREWELL;
use crate::operation::{self, Outcome};
use crate::output::{OutputArgs, print, print_json, tell};
use crate::progress::ProgressView;
use crate::signals::Signals;
use crate::size::{self, parse_duration};
use crate::stall;
use crate::state::{Machine, MachineName, StateFolder};

const HELP: &str = "\
IMAGE is a name, and the image goes into the local store (`runnel image ls`), or a path with a slash in it, whose directory
must be there. A name is lower-case letters and digits, with '.', '_' or '-' between. Memory, disks and devices are saved as
of one moment, for which the machine stands some milliseconds: the last line here (\"pause_ms\" in JSON) says how many. It is
saved while it runs on; what it writes to meanwhile is copied first, into up to 64 MiB of memory, and then into a file beside
the image. One that was loaded from Firecracker's two files stands until its memory is read. Ctrl-C calls it off, and leaves nothing. If this
command is killed (SIGKILL), its machine calls it off; an image that was finished by then stays, and is as whole as any
other.

Examples:
    runnel snapshot web web-v1
    runnel snapshot web web-v2 --diff
    runnel snapshot web /srv/images/web-v1 --exclude scratch
    runnel snapshot web web-v2 --guest-hook --hook-deadline 20s";

/// The machine is no more.
#[derive(Debug, thiserror::Error)]
#[error(
    "{machine} has ended while it was saved; its log is {log}; what there is of the image goes with the next snapshot to that place, or from the store with `runnel image prune`",
    log = log.display()
)]
struct Ended {
    machine: MachineName,
    log: PathBuf,
}

/// A chunk of the image that the machine came from, which the snapshot needs too.
#[derive(Debug, thiserror::Error)]
#[error("{refusal}; {machine} goes on as it was: try again once that can be read again{elsewhere}")]
struct NotArrived {
    refusal: ApiError,
    machine: MachineName,
    elsewhere: String,
}

/// A failure, and what to do about it if a chunk did not arrive.
fn explained(error: ApiError, machine: &MachineName, image: Option<&str>) -> Failure {
    match &error {
        ApiError::Refused { fault, .. } if is_of_a_chunk(fault) => NotArrived {
            machine: machine.clone(),
            elsewhere: stall::elsewhere(machine.as_str(), image),
            refusal: error,
        }
        .into(),
        _ => error.into(),
    }
}

/// Save a machine as an image, while it runs
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct SnapshotArgs {
    /// The machine
    machine: MachineName,

    /// The image to make
    image: String,

    /// Save what changed since the machine's last image, or the one that it was resumed from, as layers over it; a volume
    /// that has none is saved whole. Over an image of another host this makes a thin one, whose other layers stay there
    #[arg(long)]
    diff: bool,

    /// Leave a drive out, again for each; it must be supplied when the image is resumed
    #[arg(long = "exclude", value_name = "DRIVE")]
    excluded: Vec<String>,

    /// Whether the guest's agent is asked to prepare, and what becomes of the snapshot if it is not ready in time: fail
    /// (if --guest-hook alone is given), proceed, or off, for not asking. An agent that is there is asked, and not insisted
    /// upon, if nothing is given
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "fail")]
    guest_hook: Option<HookFlag>,

    /// How long it may take: 500ms, 20s, 2m [default: 5s]
    #[arg(long, value_name = "TIME", requires = "guest_hook", value_parser = parse_duration)]
    hook_deadline: Option<Duration>,

    #[command(flatten)]
    output: OutputArgs,
}

/// Has `machine` save itself as `body` says; how that ended; what a signal did is told.
///
/// # Errors
/// When it cannot be saved.
pub(crate) fn save(
    state: &StateFolder,
    machine: &Machine,
    body: Value,
    signals: &Signals,
) -> Result<Outcome, Failure> {
    let name = &machine.folder.name;
    let api = Api::new(&machine.folder.api_socket());
    let mut view = ProgressView::new(format!("snapshot {name}"));
    let outcome = operation::run(&api, "/snapshot/create", body, &mut view, signals);
    drop(view);
    if let Err(ApiError::Ended { .. }) = outcome {
        // Its log is kept once it is forgotten, and its process may take a moment.
        if machine.process.wait(FAREWELL)? {
            state.forget(&machine.folder)?;
        }
        let log = state.ended_log(name);
        let machine = name.clone();
        return Err(Ended { machine, log }.into());
    }
    let image = machine.record.image.as_deref();
    let outcome = outcome.map_err(|error| explained(error, name, image))?;
    match outcome {
        Outcome::Done | Outcome::Overtaken(_) => {}
        Outcome::Cancelled(_) => tell(format_args!(
            "called off: nothing is left of the image, and {name} goes on as it was."
        )),
        Outcome::Abandoned(_) => tell(format_args!("not waited for: {name} still calls it off.")),
    }
    Ok(outcome)
}

/// `--guest-hook`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HookFlag {
    Fail,
    Proceed,
    Off,
}

impl SnapshotArgs {
    /// `guest_hook`, in the API's words.
    fn guest_hook(&self) -> Option<Value> {
        let otherwise = match self.guest_hook? {
            HookFlag::Off => return Some(json!({ "deadline_ms": 0 })),
            HookFlag::Fail => "fail",
            HookFlag::Proceed => "proceed",
        };
        let mut hook = json!({ "otherwise": otherwise });
        if let Some(deadline) = self.hook_deadline {
            hook["deadline_ms"] = json!(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        }
        Some(hook)
    }
}

pub(crate) fn run(args: &SnapshotArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    // What was typed comes before what runs.
    let target = ImageStore::of_this_user()?.destination(&args.image)?;
    let state = StateFolder::open()?;
    let machine = state.machine(&args.machine)?;
    let mut body = json!({ "image_path": target });
    if !args.excluded.is_empty() {
        body["excluded_drives"] = json!(args.excluded);
    }
    if args.diff {
        body["snapshot_type"] = json!("Diff");
    }
    if let Some(hook) = args.guest_hook() {
        body["guest_hook"] = hook;
    }
    let started = Instant::now();
    let api = Api::new(&machine.folder.api_socket());
    match save(&state, &machine, body, &signals)? {
        // There is an image, whole; whoever wanted none can remove it.
        Outcome::Done | Outcome::Overtaken(_) => {}
        Outcome::Cancelled(signal) | Outcome::Abandoned(signal) => return Ok(Exit::Signal(signal)),
    }
    let elapsed = started.elapsed();
    // Of a machine that was paused before it is nothing; and nobody fails for want of a figure. Another snapshot of the
    // machine may have begun: its pause is not this one's.
    let operation = api.progress().ok().and_then(|progress| progress.operation);
    let own = operation.filter(|operation| !operation.is_under_way());
    let pause_ms = own.and_then(|operation| operation.pause_ms);
    let (image, elsewhere) = Image::open_thin(&target, &Wanted::Only)?;
    let manifest = image.manifest;
    let volume_bytes: u64 = manifest
        .volumes
        .iter()
        .map(|volume| volume.root.volume_bytes())
        .sum();
    let bytes_elsewhere: u64 = elsewhere.iter().map(|blob| blob.bytes).sum();
    let all_bytes: u64 = manifest.blobs().iter().map(|blob| blob.bytes).sum();
    let stored_bytes = all_bytes - bytes_elsewhere;
    if args.output.json {
        print_json(&json!({
            "image": target,
            "digest": manifest.digest.to_string(),
            "volume_bytes": volume_bytes,
            "stored_bytes": stored_bytes,
            "bytes_elsewhere": bytes_elsewhere,
            "elapsed_ms": u64::try_from(elapsed.as_millis())?,
            "pause_ms": pause_ms,
        }))?;
        return Ok(Exit::Done);
    }
    let stood = pause_ms.map_or(String::new(), |ms| {
        let stood = match ms {
            1000.. => format!("{:.1} s", Duration::from_millis(ms).as_secs_f64()),
            _ => format!("{ms} ms"),
        };
        format!(", of which {} stood {stood}", args.machine)
    });
    let thin = match elsewhere.len() {
        0 => String::new(),
        layers => format!(
            " ({layers} layers, {}, stay on another host: `runnel image complete` fetches them)",
            size::bytes(bytes_elsewhere)
        ),
    };
    print(&format!(
        "{}\n{}: {} of memory and disks in {}{thin}, after {:.1} s{stood}\n",
        manifest.digest,
        target.display(),
        size::bytes(volume_bytes),
        size::bytes(stored_bytes),
        elapsed.as_secs_f64(),
    ))?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SnapshotArgs,
    }

    fn hook(flags: &[&str]) -> Option<Value> {
        let words = [&["x", "web", "web-v1"][..], flags].concat();
        Line::try_parse_from(words).unwrap().args.guest_hook()
    }

    #[test]
    fn the_guest_is_asked_as_the_flags_say() {
        assert_eq!(hook(&[]), None);
        assert_eq!(hook(&["--guest-hook"]), Some(json!({ "otherwise": "fail" })));
        assert_eq!(
            hook(&["--guest-hook=proceed", "--hook-deadline", "20s"]),
            Some(json!({ "otherwise": "proceed", "deadline_ms": 20_000 }))
        );
        assert_eq!(hook(&["--guest-hook=off"]), Some(json!({ "deadline_ms": 0 })));
        for strange in [&["--hook-deadline", "20s"][..], &["--guest-hook=wait"]] {
            let words = [&["x", "web", "web-v1"][..], strange].concat();
            assert!(Line::try_parse_from(words).is_err(), "{strange:?}");
        }
    }
}
