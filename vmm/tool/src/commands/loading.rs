//! How a machine is loaded from its image: the flags that `resume` and `fork` have in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use runnel_snapshot::image::reference::ImageReference;
use runnel_snapshot::shell::shell_word;
use serde_json::{Value, json};

use crate::boot::Override;
use crate::drives::warn_of_rests;
use crate::size::parse_duration;

/// `--overlay-directory` names none.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no directory {0} for what the machine writes: make it (`mkdir -p {word}`), or give another --overlay-directory",
    word = shell_word(.0)
)]
pub(crate) struct NoOverlayDirectory(PathBuf);

/// See the module.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoadFlags {
    /// Put another tap behind an interface, again for each: ID=TAP. `runnel run` calls them eth0, eth1, … unless told
    #[arg(long = "tap", value_name = "ID=TAP", value_parser = Override::of_tap)]
    pub(super) taps: Vec<Override>,

    /// Put a file behind a drive in place of the image's content, again for each: ID=PATH. `runnel inspect` lists an
    /// image's drives, and says which must be supplied
    #[arg(long = "drive", value_name = "ID=PATH", value_parser = Override::of_drive)]
    pub(super) drives: Vec<Override>,

    /// Let the guest's clock go on from where it was, in place of setting it forward by the time that has passed
    #[arg(long = "no-clock-realtime", action = clap::ArgAction::SetFalse)]
    pub(super) clock_realtime: bool,

    /// The directory for what the machine writes to the image's drives; that for temporary files unless given
    #[arg(long, value_name = "DIRECTORY")]
    pub(super) overlay_directory: Option<PathBuf>,

    /// How long a missing chunk is waited for before the machine counts as stalled: 30s, 2m [default: 15s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(super) stall_after: Option<Duration>,

    /// Have KVM log which pages the guest writes: diff snapshots take less time then, and the guest writes somewhat slower
    #[arg(long)]
    pub(super) track_dirty_pages: bool,

    /// Load the machine and let it stand still, until `runnel unpause`
    #[arg(long)]
    pub(super) paused: bool,
}

impl LoadFlags {
    /// That the directories which were given are there.
    ///
    /// # Errors
    /// When one is not.
    pub(crate) fn check(&self) -> Result<(), NoOverlayDirectory> {
        match self.overlay_directory.as_ref().filter(|path| !path.is_dir()) {
            Some(directory) => Err(NoOverlayDirectory(directory.clone())),
            None => Ok(()),
        }
    }

    /// Warns of files behind drives that do not end with a whole sector.
    pub(crate) fn warn_of_rests(&self) {
        warn_of_rests(self.drives.iter().map(|drive| &*drive.value));
    }

    /// The body of the request.
    pub(crate) fn body(&self, image: &ImageReference, agent: Option<&Path>) -> Value {
        let mut body = json!({
            "image": image.to_string(),
            "resume_vm": !self.paused,
            "clock_realtime": self.clock_realtime,
        });
        if let Some(agent) = agent {
            body["agent_path"] = json!(agent);
        }
        if let Some(directory) = &self.overlay_directory {
            // The monitor need not have this command's working directory.
            body["overlay_directory"] = json!(std::path::absolute(directory).unwrap_or(directory.clone()));
        }
        if self.track_dirty_pages {
            body["track_dirty_pages"] = json!(true);
        }
        if let Some(time) = self.stall_after {
            body["stall_after_ms"] = json!(time.as_millis());
        }
        let list = |overrides: &[Override], id: &str, value: &str| -> Value {
            let entries = overrides.iter();
            entries
                .map(|entry| json!({ id: entry.id, value: entry.value }))
                .collect()
        };
        if !self.taps.is_empty() {
            body["network_overrides"] = list(&self.taps, "iface_id", "host_dev_name");
        }
        if !self.drives.is_empty() {
            body["drive_overrides"] = list(&self.drives, "drive_id", "path_on_host");
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: LoadFlags,
    }

    #[test]
    fn overrides_become_those_of_the_api() {
        let overrides = ["--tap", "eth0=tap7", "--drive", "scratch=/srv/s"];
        let rest = ["--paused", "--stall-after", "30s"];
        let own = [
            "--no-clock-realtime",
            "--overlay-directory",
            "/srv/overlays",
            "--track-dirty-pages",
        ];
        let args = Line::parse_from([&["x"][..], &overrides, &rest, &own].concat()).args;
        let image = "/images/web".parse().unwrap();
        let body = args.body(&image, Some(Path::new("/run/agent.sock")));
        let expected = json!({
            "image": "/images/web",
            "agent_path": "/run/agent.sock",
            "resume_vm": false,
            "clock_realtime": false,
            "track_dirty_pages": true,
            "stall_after_ms": 30_000,
            "overlay_directory": "/srv/overlays",
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap7" }],
            "drive_overrides": [{ "drive_id": "scratch", "path_on_host": "/srv/s" }],
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn what_is_not_asked_for_is_left_out_and_the_clock_is_right_by_itself() {
        let args = Line::parse_from(["x"]).args;
        let body = args.body(&"/images/web".parse().unwrap(), None);
        assert_eq!(
            body,
            json!({ "image": "/images/web", "resume_vm": true, "clock_realtime": true })
        );
    }
}
