//! `make bench`: measures Runnel on this machine, and writes `target/bench/report.json`.
//!
//! One guest for everything: the bare guest with 1 GiB of RAM, a quarter zero, half pages of real programs, a quarter
//! random, which counts in RAM and prints as it counts. What each figure is, is in [`MEANINGS`] and in the report.
//! With `RUNNEL_PEER_FIRECRACKER=<binary>` Firecracker does the same in the same run.
//!
//! Machines that run this are shared and noisy: figures are compared within one run, as ratios, and nothing here fails
//! because something is slow.

mod aims;
mod compression;
mod content;
mod forks;
mod local;
mod metrics;
mod pauses;
mod process;
mod remote;
mod traces;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use runnel_snapshot::image::Image;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::reference::Wanted;
use runnel_tests::lab::{Level, TwoHosts, level, program};
use serde_json::{Value, json};

use content::RAM_MIB;
use local::{Bench, IMAGE, Images, Saver as _, TwoFiles};
use metrics::{Metrics, Samples};
use pauses::Case;
use remote::{Names, Remote};

/// What the figures are, for whoever reads the report.
const MEANINGS: [(&str, &str); 30] = [
    (
        "resume_*",
        "API request sent to a monitor that is up, to the end of the first line that the guest begins, which depends on a counter in its RAM; monitors are fresh each time, files in the page cache",
    ),
    (
        "resume_local_answer_ms",
        "API request to its answer: state restored, guest running; the rest of resume_local_ms is the guest's own, first faults included",
    ),
    (
        "resume_remote_*",
        "the same on a host that has neither image nor cache: a fresh agent, up, with no connection yet",
    ),
    (
        "*_cold_ms",
        "the same without an agent: the time from starting its process is included",
    ),
    (
        "api_ready_ms",
        "a monitor's process started, to its first API answer; in no other figure",
    ),
    (
        "bytes_before_first_instruction",
        "received by the target's interface for a machine that is loaded but not let run, once nothing more comes",
    ),
    (
        "fault_*",
        "one read of a page that has not arrived, by the guest's time stamp counter, while background fill runs; p50 and p99 of the reads in one machine, then median, min and max of machines",
    ),
    (
        "*_without_fill_*",
        "the same with background fill held to a byte a second",
    ),
    (
        "*_indexed_*",
        "the same but for the first read in each 128 MiB, which waits for its part of the index before its page",
    ),
    (
        "fully_resident_remote_0ms_ms",
        "API request to the last byte of RAM being on the target",
    ),
    (
        "resume_20ms_with*_trace_ms",
        "API request to the guest's word that it has read a word of each page of 5 % of its RAM: pieces of 256 KiB (a resumed Debian demands some 400 KiB in a place) all over the pages of programs and the random ones, in scattered order; with: from the image that `runnel image optimize` makes of what one machine was recorded to touch so; without: from the image as it is; background fill and neighbours as they are by default in both",
    ),
    (
        "resume_20ms_with*_trace_mib",
        "received by the target's interface until then",
    ),
    (
        "snapshot_pause_ms",
        "longest silence of a guest that prints all the time",
    ),
    (
        "pause_*_ms",
        "the longest time between two looks of the guest at its clock during a snapshot, as the guest sees it, faults after the pause included; a word of each page of its RAM is written before; idle: it does nothing else; writing: it writes to page after page as fast as it can",
    ),
    (
        "gap_without_snapshot_*_ms",
        "the same without a snapshot, in turn with it: what the host's other work costs the guest",
    ),
    (
        "slowdown_*",
        "pages written to a millisecond without a snapshot, divided by those with one, half a second before and after it included",
    ),
    (
        "dirtied_*_gib",
        "RAM that the guest wrote to while it was watched",
    ),
    (
        "create_vs_zstd_ratio",
        "snapshot_mib_per_s divided by zstd_mib_per_s: stock `zstd -T2` at the same level over the same memory, from a file in the page cache to one on disk",
    ),
    (
        "size_vs_zstd_frames_ratio",
        "bytes of the image, index and state included, divided by those of the same memory as one zstd frame for each chunk",
    ),
    (
        "size_vs_zstd_whole_ratio",
        "the same, divided by those of one frame for all of it, as `zstd` makes it",
    ),
    (
        "snapshot_total_ms",
        "API request to answer, everything on disk, of a guest that halts; snapshot_mib_per_s is RAM by that time",
    ),
    (
        "snapshot_busy_total_ms",
        "the same of a guest that prints all the time, and so takes one of the host's processors",
    ),
    (
        "fork_100_first_instruction_ms",
        "`runnel fork -n 100` started, to the last clone having said that it sees another generation identifier; an agent and a first clone are up, and all of the image is on the host; the guests halt then",
    ),
    (
        "fork_host_kib_per_clone",
        "fall of the host's available memory by the hundred clones, two seconds after the last one ran, divided by them; the one copy that they share was there",
    ),
    (
        "fork_pss_kib_per_clone",
        "proportional set size of their processes, guest RAM included, divided by them",
    ),
    (
        "fork_kvm_kib_per_clone",
        "part of the host's: what KVM keeps for each page of a guest where it shadows page tables, as it does where it interprets guests; none where the processor translates",
    ),
    (
        "fork_machine_*",
        "the same of a machine that was booted and runs, which is saved to an image for it, and shares its memory with its clones; an agent is started first",
    ),
    (
        "vmm_rss_kib",
        "resident memory of the monitor but for guest RAM, two seconds after all of RAM has arrived and 192 faults were served; more than half of it is code, shared by all monitors",
    ),
    (
        "vmm_rss_anonymous_kib",
        "of that, what is no page of a file: heap, stacks, changed data",
    ),
    (
        "boot_first_instruction_ms",
        "InstanceStart sent, to the guest's first byte; without an initrd",
    ),
];

/// The round trip of hosts that are far apart.
const FAR: Duration = Duration::from_millis(20);
const ROUND_TRIPS: usize = 50;
const TRANSFER_BYTES: u64 = 512 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether this machine can be measured. Where it cannot there is no report, which is a failure, and no test that is
/// skipped.
fn needed() -> Result<(), Box<dyn Error>> {
    let found = level::of_this_machine();
    if found >= Level::Bare {
        return Ok(());
    }
    Err(format!(
        "nothing can be measured: it takes {}, and this machine has {found}",
        Level::Bare
    )
    .into())
}

fn run() -> Result<(), Box<dyn Error>> {
    let out = output_folder()?;
    // Whatever happens, the report of another run is not taken for this one's.
    let report = report_in(&out);
    if report.exists() {
        fs::remove_file(report)?;
    }
    needed()?;
    // On a disk, as images are; emptied by whoever comes next, if this run is killed.
    let work = out.join("work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let result = measure(&out, &work);
    fs::remove_dir_all(&work)?;
    result
}

fn measure(out: &Path, work: &Path) -> Result<(), Box<dyn Error>> {
    println!("preparing 1 GiB of guest memory");
    let content = work.join("content");
    content::write(&content)?;

    let mut metrics = Metrics::default();
    println!("runnel, on one host");
    let images = work.join("images");
    fs::create_dir(&images)?;
    let bench = Bench {
        program: &program("runnel-vmm"),
        folder: work,
        content: &content,
    };
    let images_made = Images(images.clone());
    bench.measure(&images_made, &mut metrics)?;

    traces::record(&images, work)?;

    println!("stock zstd, on the same memory");
    let stored = images_made.stored_bytes(IMAGE)?;
    compression::compare(&images.join(IMAGE), stored, work, &mut metrics)?;

    println!("runnel, pauses of machines of 1 and 4 GiB");
    for (ram_gib, snapshots) in [(1, 5), (4, 3)] {
        for is_writing in [false, true] {
            let case = Case {
                ram_gib,
                is_writing,
                snapshots,
            };
            bench.pauses(case, &mut metrics)?;
        }
    }

    println!("runnel, a hundred clones on one host");
    forks::measure(&content, &mut metrics)?;

    let mut host = about_host();
    println!("runnel, on two hosts, 0 ms apart");
    between(Duration::ZERO, &images, work, &mut metrics, &mut host)?;
    println!("runnel, on two hosts, 20 ms apart");
    between(FAR, &images, work, &mut metrics, &mut host)?;

    let peers = peers(work, &content)?;
    host["load_average_after"] = load_average();
    // As it was measured: what is asked of the network is not all that it takes.
    let round_trip_ms = host["network_20ms"]["round_trip_ms_p50"].as_f64();
    let round_trip_ms = round_trip_ms.ok_or("the round trip was not measured")?;
    let report = json!({
        "metrics": metrics.to_json(),
        "peers": peers,
        "host": host,
        "aims": aims::reached(&metrics, &peers, &first_bytes(&images)?, round_trip_ms),
        "meanings": MEANINGS.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    });
    let path = report_in(out);
    fs::write(&path, serde_json::to_vec_pretty(&report)?)?;
    for (name, aim) in report["aims"].as_object().into_iter().flatten() {
        if aim["met"] == false {
            println!("  missed: {name}: {aim}");
        }
    }
    println!("{}", path.display());
    Ok(())
}

fn between(
    round_trip: Duration,
    images: &Path,
    work: &Path,
    metrics: &mut Metrics,
    host: &mut Value,
) -> Result<(), Box<dyn Error>> {
    let hosts = TwoHosts::new(round_trip)?;
    let label = format!("network_{}ms", round_trip.as_millis());
    host[label] = about_network(&hosts)?;
    let folder = work.join("target");
    fs::create_dir_all(&folder)?;
    let remote = Remote::new(&hosts, images, &folder)?;
    if round_trip.is_zero() {
        let names = Names {
            resume: "resume_remote_0ms_ms",
            cold: "resume_remote_0ms_cold_ms",
        };
        remote.resumes(names, metrics)?;
        remote.bytes_before_first_instruction(metrics)?;
        remote.fully_resident(metrics)?;
    } else {
        let names = Names {
            resume: "resume_remote_20ms_ms",
            cold: "resume_remote_20ms_cold_ms",
        };
        remote.resumes(names, metrics)?;
        remote.faults(metrics)?;
        remote.traces(metrics)?;
    }
    Ok(())
}

/// What the network itself can do, and costs.
fn about_network(hosts: &TwoHosts) -> Result<Value, Box<dyn Error>> {
    let trips = Samples::milliseconds(&hosts.round_trips(ROUND_TRIPS)?);
    let before = hosts.network_time();
    let took = hosts.transfer(TRANSFER_BYTES)?;
    let spent = hosts.network_time() - before;
    let mib = (TRANSFER_BYTES >> 20) as f64;
    Ok(json!({
        "round_trip_ms_p50": trips.quantile(0.5),
        "round_trip_ms_p99": trips.quantile(0.99),
        "tcp_mib_per_s": (mib / took.as_secs_f64()).round(),
        "relay_cpu_ms_per_gib": (spent.as_secs_f64() * 1e3 * 1024.0 / mib).round(),
    }))
}

fn peers(work: &Path, content: &Path) -> Result<Value, Box<dyn Error>> {
    let Some(binary) = std::env::var_os("RUNNEL_PEER_FIRECRACKER").map(PathBuf::from) else {
        return Ok(json!({}));
    };
    println!("firecracker, on one host");
    let folder = work.join("firecracker");
    fs::create_dir(&folder)?;
    let bench = Bench {
        program: &binary,
        folder: &folder,
        content,
    };
    let mut metrics = Metrics::default();
    bench.measure(&TwoFiles(folder.clone()), &mut metrics)?;
    Ok(json!({ "firecracker": metrics.to_json() }))
}

/// Of what the bytes before the first instruction are made, connections and heads of answers aside.
fn first_bytes(images: &Path) -> Result<Value, Box<dyn Error>> {
    let image = images.join(IMAGE);
    let manifest = Layout::open(&image)?.choose(&Wanted::Only)?;
    let state = Image::open_directory(&image, &Wanted::Only)?.state()?;
    let frames = state.first_chunks.iter().flat_map(|first| first.entry.frames());
    let frames = frames.map(|stored| stored.frame.len);
    Ok(json!({
        "manifest": manifest.bytes,
        "first_chunks": frames.sum::<u64>(),
    }))
}

fn about_host() -> Value {
    let line = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let found = text.lines().find(|line| line.starts_with(key));
        found.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
    };
    json!({
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim_end(),
        "cpu": line("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": line("/proc/meminfo", "MemTotal"),
        "kvm_runs": runnel_tests::lab::level::of_this_machine().to_string(),
        "guest_ram_mib": RAM_MIB,
        "load_average_before": load_average(),
        "note": "figures are medians; other work on the machine shows in max, and in the load averages",
    })
}

fn load_average() -> Value {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    json!(text.split(' ').next().and_then(|load| load.parse::<f64>().ok()))
}

fn report_in(out: &Path) -> PathBuf {
    out.join("report.json")
}

/// `target/bench`, wherever `target` is.
fn output_folder() -> Result<PathBuf, Box<dyn Error>> {
    // target/debug/bench
    let own = std::env::current_exe()?;
    let target = own
        .ancestors()
        .nth(2)
        .ok_or("this program lies in no target folder")?;
    Ok(target.join("bench"))
}
