//! `runnel resume`: runs a machine from its image, before the image has arrived.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::{ImageReference, Wanted};
use runnel_snapshot::protocol::status;
use serde_json::{Value, json};

use super::Failure;
use super::agent::{AgentFlags, ensure_running};
use super::loading::LoadFlags;
use super::optimize::beside;
use crate::exit::Exit;
use crate::foreground::{Afterwards, start_and_attend};
use crate::images::ImageStore;
use crate::monitor::Monitor;
use crate::operation::{self, Outcome};
use crate::progress::ProgressView;
use crate::signals::Signals;
use crate::size::parse_duration;
use crate::state::{MachineName, Record, StateError, StateFolder};
use crate::taps::HostInterfaces;

const HELP: &str = "\
IMAGE is the name of an image of the local store, a directory (with a slash in it), or http(s)://host:port/name, each
with @sha256:… to pin it. Images of other hosts come through the agent, which is started if none runs. The machine runs
at once; its memory and disks arrive while it does, and `runnel ps` shows how much is there. --credentials and --tls-ca
are for an agent that is started now; one that runs keeps its own. Console and exit code are as `runnel run --help` says.

Examples:
    runnel resume web-v1
    runnel resume http://10.0.0.1:5000/web-v1 --name web --tap eth0=tap1 --detach
    runnel resume ./web-v1 --drive scratch=/srv/scratch.img
    runnel resume web-v1 --record --record-for 30s";

/// How long an agent may take to say what it has open.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);

/// Run a machine from its image, which need not have arrived
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ResumeArgs {
    /// The image
    image: String,

    /// What the machine is called, 1 to 64 letters, digits and hyphens; m1, m2, … unless given
    #[arg(long)]
    name: Option<MachineName>,

    #[command(flatten)]
    load: LoadFlags,

    /// Write down which chunks of the image the machine touches first, in order, until it is paused, saved or ends, for
    /// `runnel image optimize`: into FILE, or IMAGE.working-set beside the directory of an image of this host
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    record: Option<Option<PathBuf>>,

    /// With --record: end with that after this time: 30s, 2m
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "record")]
    record_for: Option<Duration>,

    /// Read a directory through the agent too: its clones then share memory
    #[arg(long)]
    through_agent: bool,

    #[command(flatten)]
    agent: AgentFlags,

    /// Let the machine run by itself, and print its name
    #[arg(long, short)]
    detach: bool,

    /// With --detach: print name and sockets as JSON
    #[arg(long, requires = "detach")]
    json: bool,
}

/// `--record` of an image that has no place on this host.
#[derive(Debug, thiserror::Error)]
#[error("{0} is of another host, and nothing is recorded there: say where to, with --record=FILE")]
struct NowhereToRecord(String);

impl ResumeArgs {
    /// The file that is recorded to.
    fn record_to(&self, image: &ImageReference) -> Result<Option<PathBuf>, NowhereToRecord> {
        let path = match (&self.record, image) {
            (None, _) => return Ok(None),
            (Some(Some(path)), _) => path.clone(),
            (Some(None), ImageReference::Directory { path, .. }) => beside(path),
            (Some(None), remote @ ImageReference::Remote { .. }) => {
                return Err(NowhereToRecord(remote.to_string()));
            }
        };
        // The monitor need not have this command's working directory.
        Ok(Some(std::path::absolute(&path).unwrap_or(path)))
    }

    /// The body of the request.
    fn body(&self, image: &ImageReference, agent: Option<&Path>, record_to: Option<&Path>) -> Value {
        let mut body = self.load.body(image, agent);
        if let Some(path) = record_to {
            body["record"] = json!({ "path": path });
            if let Some(time) = self.record_for {
                body["record"]["duration_ms"] = json!(time.as_millis());
            }
        }
        body
    }
}

pub(crate) fn run(args: &ResumeArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    args.load.check()?;
    args.agent.check()?;
    let image = ImageStore::of_this_user()?.resolve(&args.image)?;
    let record_to = args.record_to(&image)?;
    let state = StateFolder::open()?;
    let wants_agent = args.through_agent || is_elsewhere(&image);
    let agent = if wants_agent {
        Some(ensure_running(&state, &args.agent)?)
    } else {
        None
    };

    let monitor = Monitor::start(&state, args.name.as_ref())?;
    let record = Record {
        image: Some(image.to_string()),
        agent: agent.clone(),
        ..Record::now()
    };
    monitor.folder().record(&record)?;
    let body = args.body(&image, agent.as_deref(), record_to.as_deref());
    args.load.warn_of_rests();
    let start = |monitor: &Monitor<'_>| load(monitor, body, record, &signals);
    start_and_attend(monitor, Afterwards::new(args.detach, args.json), &signals, start)
}

/// Whether not all of an image is on this host. What is wrong with one that is, is told by whoever loads it.
fn is_elsewhere(image: &ImageReference) -> bool {
    match image {
        ImageReference::Remote { .. } => true,
        ImageReference::Directory { path, wanted } => {
            Image::open_thin(path, wanted).is_ok_and(|(_, missing)| !missing.is_empty())
        }
    }
}

fn load(
    monitor: &Monitor<'_>,
    body: Value,
    record: Record,
    signals: &Signals,
) -> Result<Option<i32>, Failure> {
    let api = monitor.api();
    let before = HostInterfaces::now();
    let mut view = ProgressView::new(format!("resume {}", monitor.folder().name));
    let outcome = operation::run(&api, "/snapshot/load", body, &mut view, signals);
    drop(view);
    match outcome.map_err(|error| monitor.refused(&error))? {
        // The monitor ends with this command, whatever it is doing.
        Outcome::Cancelled(signal) | Outcome::Abandoned(signal) | Outcome::Overtaken(signal) => {
            Ok(Some(signal))
        }
        Outcome::Done => {
            // A machine that has ended already has nothing to tell.
            if let Ok(config) = api.configuration() {
                record_loaded(monitor, &config, record)?;
                before.warn_of_new(taps_of(&config));
            }
            Ok(None)
        }
    }
}

pub(super) fn taps_of(config: &Value) -> impl Iterator<Item = &str> {
    let interfaces = config["network-interfaces"].as_array().into_iter().flatten();
    interfaces.filter_map(|interface| interface["host_dev_name"].as_str())
}

/// Notes what the image turned out to be.
pub(super) fn record_loaded(monitor: &Monitor<'_>, config: &Value, record: Record) -> Result<(), StateError> {
    let number = |field: &str| config["machine-config"][field].as_u64().unwrap_or(0);
    monitor.folder().record(&Record {
        vcpus: number("vcpu_count"),
        memory_mib: number("mem_size_mib"),
        digest: digest_of(&record),
        ..record
    })
}

/// The digest of the image that was loaded just now, as its agent knows it: by that, it is found again when it is read
/// elsewhere.
fn digest_of(record: &Record) -> Option<String> {
    if let Ok(ImageReference::Remote {
        wanted: Wanted::Pinned(digest),
        ..
    }) = record.image.as_ref()?.parse()
    {
        return Some(digest.to_string());
    }
    let images = status(record.agent.as_ref()?, AGENT_PATIENCE).ok()?.images;
    let mut images = images.into_iter();
    let image = images.find(|image| Some(&image.image) == record.image.as_ref())?;
    Some(image.digest.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ResumeArgs,
    }

    #[test]
    fn what_is_recorded_goes_beside_an_image_of_this_host_or_where_it_is_told() {
        let image: ImageReference = "/images/web".parse().unwrap();
        let remote: ImageReference = "http://10.0.0.1:5000/web".parse().unwrap();
        let args = Line::parse_from(["x", "--record", "--record-for", "30s", "web"]).args;
        let path = args.record_to(&image).unwrap().unwrap();
        assert_eq!(path, Path::new("/images/web.working-set"));
        let record = &args.body(&image, None, Some(&path))["record"];
        assert_eq!(*record, json!({ "path": path, "duration_ms": 30_000 }));
        let refused = args.record_to(&remote).unwrap_err().to_string();
        assert!(refused.contains("--record=FILE"), "{refused}");
        let args = Line::parse_from(["x", "--record=/srv/set", "web"]).args;
        assert_eq!(args.record_to(&remote).unwrap(), Some("/srv/set".into()));
        assert!(Line::try_parse_from(["x", "--record-for", "30s", "web"]).is_err());
    }
}
