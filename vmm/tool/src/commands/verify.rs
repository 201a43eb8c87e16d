//! `runnel verify`: every digest of an image, and its indexes against its frames.

use std::num::NonZero;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use clap::Args;
use runnel_snapshot::causes::with_causes;
use runnel_snapshot::image::ImageError;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::ImageReference;
use runnel_snapshot::verify::{Finding, Report, VerifyProgress, verify};
use serde_json::json;

use super::Failure;
use crate::exit::Exit;
use crate::images::ImageStore;
use crate::output::{OutputArgs, print, print_json};
use crate::progress::ProgressView;
use crate::signals::Signals;
use crate::size::{self, parse_count};

/// How often progress is shown and signals are looked for.
const LOOK: Duration = Duration::from_millis(100);

/// The image is elsewhere.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0} is of another host, and is verified there, or chunk by chunk as it is read here: give a directory or a name"
)]
struct Remote(String);

/// Check every byte of an image
#[derive(Debug, Args)]
#[command(after_help = "\
Reads everything: digests of all blobs, the machine state, each index against seek table and frames, each chunk against
its digest. Of a thin image, what is with it. Ends with 3 if something is wrong, and names blob and chunk. Where the damage is in what lists the rest
(oci-layout, index.json, the manifest), that alone is found, and \"digest\" in JSON is null. An image of a newer Runnel is
not judged: that is an error (1).

Examples:
    runnel verify web-v1
    runnel verify ./web-v1@sha256:… --json")]
pub(crate) struct VerifyArgs {
    /// Name or directory of an image
    image: String,

    /// Threads that read and check; as many as there are processors unless given
    #[arg(long, value_name = "COUNT", value_parser = parse_count)]
    threads: Option<NonZero<usize>>,

    #[command(flatten)]
    output: OutputArgs,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let reference = ImageStore::of_this_user()?.resolve(&args.image)?;
    let ImageReference::Directory { path, wanted } = &reference else {
        return Err(Remote(reference.to_string()).into());
    };
    let layout = match Layout::open(path) {
        Ok(layout) => layout,
        Err(error) => return unreadable(args, error.into()),
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = args.threads.map_or(processors, NonZero::get);
    let progress = VerifyProgress::default();
    let mut view = ProgressView::new(format!("verify {}", args.image));
    let mut called_off = None;
    let report = thread::scope(|scope| {
        let (sender, end) = mpsc::channel::<()>();
        let (layout, progress) = (&layout, &progress);
        let worker = scope.spawn(move || {
            // Dropped when the verification ends, however that comes.
            let _sender = sender;
            verify(layout, wanted, threads, progress)
        });
        while matches!(end.recv_timeout(LOOK), Err(RecvTimeoutError::Timeout)) {
            let (done, total) = progress.bytes();
            view.show("", done, total);
            if let Some(signal) = signals.next() {
                called_off = Some(signal);
                progress.cancel();
            }
        }
        worker.join()
    });
    drop(view);
    let report = report.map_err(|_| "the verification panicked: this is a bug in Runnel")?;
    let report = match report {
        Ok(report) => report,
        Err(error) => return unreadable(args, error),
    };
    match args.output.json {
        true => print_json(&summary(&report))?,
        false => print(&describe(&report))?,
    }
    Ok(match called_off {
        Some(signal) if report.cancelled => Exit::Signal(signal),
        _ if report.is_sound() => Exit::Done,
        _ => Exit::Unsound,
    })
}

/// What cannot be verified, since what lists its parts cannot be used: damage too, unless it is something else.
fn unreadable(args: &VerifyArgs, error: ImageError) -> Result<Exit, Failure> {
    if !error.is_damage() {
        return Err(error.into());
    }
    let found = with_causes(&error);
    match args.output.json {
        true => print_json(&json!({
            "digest": null,
            "sound": false,
            "cancelled": false,
            "chunks": 0,
            "volume_bytes": 0,
            "layers_elsewhere": 0,
            "findings": [found],
            "findings_left_out": 0,
        }))?,
        false => print(&format!(
            "{found}\n{} is damaged: no more of it could be checked\n",
            args.image
        ))?,
    }
    Ok(Exit::Unsound)
}

fn summary(report: &Report) -> serde_json::Value {
    json!({
        "digest": report.manifest.to_string(),
        "sound": report.is_sound(),
        "cancelled": report.cancelled,
        "chunks": report.chunks,
        "volume_bytes": report.volume_bytes,
        "layers_elsewhere": report.layers_elsewhere,
        "findings": report.findings.iter().map(Finding::trace).collect::<Vec<_>>(),
        "findings_left_out": report.findings_left_out,
    })
}

fn describe(report: &Report) -> String {
    let findings = report.findings.iter();
    let mut text: String = findings.map(|finding| format!("{}\n", finding.trace())).collect();
    if report.findings_left_out > 0 {
        text.push_str(&format!("and {} more\n", report.findings_left_out));
    }
    let mut looked = format!(
        "{} chunks, {} of volumes",
        report.chunks,
        size::bytes(report.volume_bytes)
    );
    if report.layers_elsewhere > 0 {
        looked.push_str(&format!(
            "; {} layers are on other hosts and were not looked at (`runnel image complete`)",
            report.layers_elsewhere
        ));
    }
    let verdict = match (report.is_sound(), report.cancelled) {
        (true, _) => format!("{} is sound: {looked}\n", report.manifest),
        (false, true) => format!("called off after {looked}\n"),
        (false, false) => format!("{} is damaged: {looked} could be checked\n", report.manifest),
    };
    text + &verdict
}
