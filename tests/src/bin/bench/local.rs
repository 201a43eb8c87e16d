//! What is measured on one host: boot, snapshot, resume from files that are there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::content::{PROGRAMS_START, RAM_MIB};
use super::metrics::{Metrics, Samples};
use super::process::{Vmm, wait_until};

const BOOTS: usize = 7;
const SNAPSHOTS: usize = 5;
const RESUMES: usize = 15;
/// Reads of pages that are not there yet, in one machine; few enough that the background fill leaves most to them.
const TOUCHES: usize = 192;
const TOUCHED_MACHINES: usize = 3;
/// How long after the last chunk a monitor has put away what fetching needed.
const AT_REST: Duration = Duration::from_secs(2);

/// How a monitor saves and loads.
pub(crate) trait Saver {
    /// Saves a running machine as `name`, and lets it run on.
    ///
    /// # Errors
    /// When it does not.
    fn save(&self, vmm: &Vmm, name: &str) -> io::Result<()>;
    /// The body that loads it, and lets it run.
    fn load(&self, name: &str) -> Value;
    /// Bytes of what was saved.
    ///
    /// # Errors
    /// When it is not there.
    fn stored_bytes(&self, name: &str) -> io::Result<u64>;
    /// Removes what was saved.
    ///
    /// # Errors
    /// When it is not there.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// Runnel's images.
#[derive(Debug)]
pub(crate) struct Images(pub(crate) PathBuf);

impl Saver for Images {
    fn save(&self, vmm: &Vmm, name: &str) -> io::Result<()> {
        let path = self.0.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        vmm.demand("PUT", "/snapshot/create", &json!({"image_path": path}))
            .map(drop)
    }

    fn load(&self, name: &str) -> Value {
        json!({"image": self.0.join(name), "resume_vm": true})
    }

    fn stored_bytes(&self, name: &str) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(self.0.join(name).join("blobs/sha256"))? {
            bytes += entry?.metadata()?.len();
        }
        Ok(bytes)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_dir_all(self.0.join(name))
    }
}

/// Firecracker's two files, as its clients save them: paused, and resumed afterwards.
#[derive(Debug)]
pub(crate) struct TwoFiles(pub(crate) PathBuf);

impl TwoFiles {
    fn paths(&self, name: &str) -> [PathBuf; 2] {
        ["state", "memory"].map(|part| self.0.join(format!("{name}.{part}")))
    }
}

impl Saver for TwoFiles {
    fn save(&self, vmm: &Vmm, name: &str) -> io::Result<()> {
        let [state, memory] = self.paths(name);
        for path in [&state, &memory] {
            if path.exists() {
                fs::remove_file(path)?;
            }
        }
        vmm.demand("PATCH", "/vm", &json!({"state": "Paused"}))?;
        let body = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory});
        vmm.demand("PUT", "/snapshot/create", &body)?;
        vmm.demand("PATCH", "/vm", &json!({"state": "Resumed"})).map(drop)
    }

    fn load(&self, name: &str) -> Value {
        let [state, memory] = self.paths(name);
        let backend = json!({"backend_type": "File", "backend_path": memory});
        json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": true})
    }

    fn stored_bytes(&self, name: &str) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        // The memory file is sparse.
        Ok(fs::metadata(&self.paths(name)[1])?.blocks() * 512)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.paths(name).iter().try_for_each(fs::remove_file)
    }
}

/// One monitor's program, and where it works.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    /// The program.
    pub(crate) program: &'a Path,
    /// A folder for its socket.
    pub(crate) folder: &'a Path,
    /// The memory's content.
    pub(crate) content: &'a Path,
}

/// The image that all other measurements load.
pub(crate) const IMAGE: &str = "machine";

/// One that none does.
const HALTED: &str = "halted";

impl Bench<'_> {
    fn start(&self) -> io::Result<(Vmm, Duration)> {
        Vmm::start(self.program, self.folder, None)
    }

    /// Boot, snapshot, resume, memory.
    ///
    /// # Errors
    /// When something does not work.
    pub(crate) fn measure(&self, saver: &dyn Saver, metrics: &mut Metrics) -> io::Result<()> {
        self.boot(metrics)?;
        self.snapshot(saver, metrics)?;
        self.resume(saver, metrics)
    }

    fn boot(&self, metrics: &mut Metrics) -> io::Result<()> {
        let (mut ready, mut first) = (Vec::new(), Vec::new());
        for _ in 0..BOOTS {
            let (mut vmm, until_ready) = self.start()?;
            ready.push(until_ready);
            vmm.configure("", None)?;
            vmm.console().clear();
            let asked = Instant::now();
            vmm.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
            first.push(vmm.console().next_byte()?.saturating_duration_since(asked));
        }
        metrics.add("api_ready_ms", Samples::milliseconds(&ready));
        metrics.add("boot_first_instruction_ms", Samples::milliseconds(&first));
        Ok(())
    }

    fn snapshot(&self, saver: &dyn Saver, metrics: &mut Metrics) -> io::Result<()> {
        let (mut vmm, _) = self.start()?;
        vmm.configure("beat", Some(self.content))?;
        vmm.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
        vmm.console().line("count=")?;
        let (mut totals, mut pauses) = (Vec::new(), Vec::new());
        for _ in 0..SNAPSHOTS {
            vmm.console().clear();
            let asked = vmm.console().next_byte()?;
            saver.save(&vmm, IMAGE)?;
            totals.push(asked.elapsed());
            pauses.push(vmm.console().longest_silence(asked)?);
        }
        metrics.add("snapshot_busy_total_ms", Samples::milliseconds(&totals));
        metrics.add("snapshot_pause_ms", Samples::milliseconds(&pauses));
        drop(vmm);
        let totals = self.snapshots_of_halted(saver)?;
        let rates = totals.iter().map(|total| RAM_MIB as f64 / total.as_secs_f64());
        metrics.add("snapshot_mib_per_s", Samples::new("MiB/s", rates.collect()));
        metrics.add("snapshot_total_ms", Samples::milliseconds(&totals));
        let ratio = (RAM_MIB << 20) as f64 / saver.stored_bytes(IMAGE)? as f64;
        metrics.add("snapshot_ratio", Samples::new("RAM/stored", vec![ratio]));
        Ok(())
    }

    /// How long it takes to save a machine whose guest leaves the processors to the monitor.
    fn snapshots_of_halted(&self, saver: &dyn Saver) -> io::Result<Vec<Duration>> {
        let (mut vmm, _) = self.start()?;
        vmm.configure("count:1 halt", Some(self.content))?;
        vmm.demand("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
        vmm.console().line("count=")?;
        let mut totals = Vec::new();
        for _ in 0..SNAPSHOTS {
            let asked = Instant::now();
            saver.save(&vmm, HALTED)?;
            totals.push(asked.elapsed());
        }
        saver.remove(HALTED)?;
        Ok(totals)
    }

    fn resume(&self, saver: &dyn Saver, metrics: &mut Metrics) -> io::Result<()> {
        let (mut answers, mut counts) = (Vec::new(), Vec::new());
        for _ in 0..RESUMES {
            let (mut vmm, _) = self.start()?;
            let resumed = resumed(&mut vmm, &saver.load(IMAGE))?;
            answers.push(resumed.until_answer);
            counts.push(resumed.until_count);
        }
        metrics.add("resume_local_ms", Samples::milliseconds(&counts));
        metrics.add("resume_local_answer_ms", Samples::milliseconds(&answers));
        let (mut waits, mut own, mut anonymous) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..TOUCHED_MACHINES {
            let (mut vmm, _) = self.start()?;
            resumed(&mut vmm, &saver.load(IMAGE))?;
            let length = (RAM_MIB << 20) - PROGRAMS_START;
            waits.push(touch(&mut vmm, PROGRAMS_START, length, TOUCHES)?);
            wait_until_resident(&vmm)?;
            std::thread::sleep(AT_REST);
            let resident = vmm.own_resident()?;
            own.push(resident.all_kib as f64);
            anonymous.push(resident.anonymous_kib as f64);
        }
        let micros = |share| {
            let waits = waits.iter().map(|waits| waits.quantile(share) * 1e3);
            Samples::new("us", waits.collect())
        };
        metrics.add("fault_local_p50_us", micros(0.5));
        metrics.add("fault_local_p99_us", micros(0.99));
        metrics.add("vmm_rss_kib", Samples::new("KiB", own));
        metrics.add("vmm_rss_anonymous_kib", Samples::new("KiB", anonymous));
        Ok(())
    }
}

/// How long a resume takes from its request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resumed {
    /// To the API's answer.
    pub(crate) until_answer: Duration,
    /// To the first count that the guest prints.
    pub(crate) until_count: Duration,
}

/// Loads a machine that was saved while it counted, and waits for the first line that it begins: one that depends on
/// the counter in its RAM. It may have been saved in the middle of a line, the rest of which needs nothing.
///
/// # Errors
/// When it is not loaded, or does not go on counting.
pub(crate) fn resumed(vmm: &mut Vmm, load: &Value) -> io::Result<Resumed> {
    vmm.console().clear();
    let asked = Instant::now();
    vmm.demand("PUT", "/snapshot/load", load)?;
    let until_answer = asked.elapsed();
    let mut count = || -> io::Result<(u64, Instant)> {
        let (count, when) = vmm.console().line("count=")?;
        Ok((count.parse().map_err(io::Error::other)?, when))
    };
    // Half a line is none of these.
    let ((one, when), (next, _)) = (count()?, count()?);
    if one < 2 || next != one + 1 {
        return Err(io::Error::other(format!("the counter went from {one} to {next}")));
    }
    Ok(Resumed {
        until_answer,
        until_count: when.saturating_duration_since(asked),
    })
}

/// Has a resumed guest read `touches` pages, scattered over a range; how long each took by the guest's own clock.
///
/// # Errors
/// When it does not.
pub(crate) fn touch(vmm: &mut Vmm, start: u64, length: u64, touches: usize) -> io::Result<Samples> {
    vmm.type_line(&format!("latency:{start:#x}:{length:#x}:{touches}"))?;
    let mut waits = Vec::new();
    for _ in 0..touches {
        let (cycles, _) = vmm.console().line("cycles=")?;
        waits.push(cycles.parse::<f64>().map_err(io::Error::other)?);
    }
    let cycles_per_ms = cycles_per_ms(vmm)?;
    Ok(Samples::new(
        "ms",
        waits.iter().map(|cycles| cycles / cycles_per_ms).collect(),
    ))
}

/// How fast the guest's time stamp counter runs, by the host's clock.
///
/// # Errors
/// When it does not tell.
pub(crate) fn cycles_per_ms(vmm: &mut Vmm) -> io::Result<f64> {
    const APART: Duration = Duration::from_millis(300);
    let mut read = || -> io::Result<(f64, Instant)> {
        vmm.type_line("tsc")?;
        let (cycles, when) = vmm.console().line("tsc=")?;
        Ok((cycles.parse().map_err(io::Error::other)?, when))
    };
    let (from, first) = read()?;
    std::thread::sleep(APART);
    let (to, second) = read()?;
    Ok((to - from) / (second - first).as_secs_f64() / 1e3)
}

/// Waits until everything has arrived. A monitor that does not tell has nothing to wait for.
///
/// # Errors
/// When it does not arrive.
pub(crate) fn wait_until_resident(vmm: &Vmm) -> io::Result<()> {
    wait_until("everything has arrived", || {
        let Ok(progress) = vmm.demand("GET", "/snapshot/progress", &Value::Null) else {
            return Ok(true);
        };
        let volumes = progress["volumes"].as_array().cloned().unwrap_or_default();
        Ok(volumes
            .iter()
            .all(|volume| volume["bytes_resident"] == volume["bytes_total"]))
    })
}
