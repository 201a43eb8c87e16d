//! What a recorded working set is worth: a guest that touches what it touched before, from an image that has it recorded,
//! and from one that has not.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use runnel_tests::lab::program;
use serde_json::json;

use super::content::{PROGRAMS_START, RAM_MIB};
use super::local::IMAGE;
use super::metrics::{Metrics, Samples};
use super::process::Vmm;
use super::remote::Remote;

/// The image with what was recorded.
pub(crate) const OPTIMIZED: &str = "machine-optimized";

const MACHINES: usize = 3;

/// What lies together of what the guest touches.
const PIECE: u64 = 256 << 10;
/// 5 % of RAM in such pieces.
const PIECES: u64 = (RAM_MIB << 20) / 20 / PIECE;

/// What the guest is told.
fn words() -> String {
    let bytes = (RAM_MIB << 20) - PROGRAMS_START;
    format!("spread:{PROGRAMS_START:#x}:{bytes:#x}:{PIECE:#x}:{PIECES}")
}

/// Records a machine on this host as it touches that, and makes the image that has it recorded.
///
/// # Errors
/// When something does not work.
pub(crate) fn record(images: &Path, work: &Path) -> io::Result<()> {
    let set = work.join("working-set");
    let (mut vmm, _) = Vmm::start(&program("runnel-vmm"), work, None)?;
    let record = json!({"path": set});
    let load = json!({"image": images.join(IMAGE), "resume_vm": true, "record": record});
    vmm.console().clear();
    vmm.demand("PUT", "/snapshot/load", &load)?;
    vmm.type_line(&words())?;
    vmm.console().line("spread=done")?;
    vmm.demand("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let mut command = Command::new(program("runnel"));
    command.args(["image", "optimize"]);
    command.args([images.join(IMAGE), images.join(OPTIMIZED)]);
    let made = command.arg("--working-set").arg(set).output()?;
    match made.status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("{made:?}"))),
    }
}

impl Remote<'_> {
    /// Resumes with and without, in turn.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn traces(&self, metrics: &mut Metrics) -> io::Result<()> {
        let (mut times, mut bytes) = ([vec![], vec![]], [vec![], vec![]]);
        for _ in 0..MACHINES {
            for (number, image) in [OPTIMIZED, IMAGE].into_iter().enumerate() {
                let _agent = self.start_agent(&[])?;
                let mut vmm = self.monitor()?;
                let before = self.bytes_received();
                let asked = Instant::now();
                vmm.demand("PUT", "/snapshot/load", &self.load_of(image, true))?;
                vmm.type_line(&words())?;
                let (_, done) = vmm.console().line("spread=done")?;
                times[number].push(done.saturating_duration_since(asked));
                bytes[number].push((self.bytes_received() - before) as f64 / f64::from(1 << 20));
            }
        }
        let [with, without] = bytes.map(|bytes| Samples::new("MiB", bytes));
        metrics.add("resume_20ms_with_trace_ms", Samples::milliseconds(&times[0]));
        metrics.add("resume_20ms_without_trace_ms", Samples::milliseconds(&times[1]));
        metrics.add("resume_20ms_with_trace_mib", with);
        metrics.add("resume_20ms_without_trace_mib", without);
        Ok(())
    }
}
