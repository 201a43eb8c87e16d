//! How long a guest is kept from going on by a snapshot, as it sees it itself: the longest time between two looks at its
//! clock, the faults after the pause included.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::local::{Bench, cycles_per_ms};
use super::metrics::{Metrics, Samples};
use super::process::Vmm;

/// Where the guest's own memory ends.
const ARENA: u64 = 4 << 20;
/// RAM up to here lies below the hole, and is one piece.
const LOW_BYTES_MAX: u64 = 3 << 30;
/// How long the guest is watched beyond the snapshot, and without one.
const WATCHED: Duration = Duration::from_secs(1);

/// A machine all of whose RAM is resident.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) ram_gib: u64,
    /// Whether it writes to page after page meanwhile, as fast as it can, or only looks at its clock.
    pub(crate) is_writing: bool,
    pub(crate) snapshots: usize,
}

impl Case {
    fn name(self) -> String {
        let what = if self.is_writing { "writing" } else { "idle" };
        format!("{}gib_{what}", self.ram_gib)
    }

    fn low_bytes(self) -> u64 {
        (self.ram_gib << 30).min(LOW_BYTES_MAX) - ARENA
    }

    /// What fills RAM: a word of each page, another in each.
    fn words(self) -> String {
        let low = format!("stamp:{ARENA:#x}:{:#x}:7", self.low_bytes());
        let high = (self.ram_gib << 30).saturating_sub(LOW_BYTES_MAX);
        match high {
            0 => low,
            high => format!("{low} maphigh stamp:4g:{high:#x}:7"),
        }
    }
}

/// What a guest saw while it was watched.
struct Seen {
    gap_ms: f64,
    writes_per_ms: f64,
    writes: u64,
}

impl Bench<'_> {
    /// Takes snapshots of a machine of this case, and has its guest say how long it was kept.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn pauses(&self, case: Case, metrics: &mut Metrics) -> io::Result<()> {
        let (mut vmm, _) = Vmm::start(self.program, self.folder, None)?;
        vmm.configure_with(case.ram_gib << 10, &case.words(), None)?;
        vmm.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
        vmm.console().line("listening=")?;
        let cycles_per_ms = cycles_per_ms(&mut vmm)?;
        let image = self.folder.join("paused");
        let (mut gaps, mut without, mut slowdowns, mut dirtied) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..case.snapshots {
            let quiet = self.watch(&mut vmm, case, cycles_per_ms, |_| Ok(()))?;
            let saved = self.watch(&mut vmm, case, cycles_per_ms, |vmm| {
                vmm.demand("PUT", "/snapshot/create", &json!({"image_path": image}))
                    .map(drop)
            })?;
            fs::remove_dir_all(&image)?;
            gaps.push(saved.gap_ms);
            without.push(quiet.gap_ms);
            slowdowns.push(quiet.writes_per_ms / saved.writes_per_ms);
            let pages = saved.writes.min(case.low_bytes() >> 12);
            dirtied.push(pages as f64 / (1 << 18) as f64);
        }
        let name = case.name();
        metrics.add(&format!("pause_{name}_ms"), Samples::new("ms", gaps));
        metrics.add(
            &format!("gap_without_snapshot_{name}_ms"),
            Samples::new("ms", without),
        );
        if case.is_writing {
            metrics.add(&format!("slowdown_{name}"), Samples::new("ratio", slowdowns));
            metrics.add(&format!("dirtied_{name}_gib"), Samples::new("GiB", dirtied));
        }
        Ok(())
    }

    fn watch(
        &self,
        vmm: &mut Vmm,
        case: Case,
        cycles_per_ms: f64,
        meanwhile: impl FnOnce(&Vmm) -> io::Result<()>,
    ) -> io::Result<Seen> {
        let bytes = if case.is_writing { case.low_bytes() } else { 0 };
        vmm.type_line(&format!("gap:{ARENA:#x}:{bytes:#x}"))?;
        let begun = Instant::now();
        thread::sleep(WATCHED / 2);
        meanwhile(vmm)?;
        thread::sleep(WATCHED / 2);
        let took = begun.elapsed();
        vmm.type_line("")?;
        let (line, _) = vmm.console().line("gap=")?;
        let (gap, writes) = line
            .split_once(" writes=")
            .ok_or_else(|| io::Error::other(format!("gap={line}")))?;
        let gap: f64 = gap.parse().map_err(io::Error::other)?;
        let writes: u64 = writes.trim().parse().map_err(io::Error::other)?;
        Ok(Seen {
            gap_ms: gap / cycles_per_ms,
            writes_per_ms: writes as f64 / (took.as_secs_f64() * 1e3),
            writes,
        })
    }
}
