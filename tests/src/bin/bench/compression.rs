//! A snapshot beside stock `zstd`: how fast it is made of the same bytes, and how much larger it is.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use runnel_snapshot::capture::CaptureSettings;
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::volume::VolumeName;

use super::content::RAM_MIB;
use super::metrics::{Metrics, Samples};

const RUNS: usize = 3;

/// Holds the image at `image`, of a machine that was saved in `snapshot_total_ms`, against `zstd` at the same level.
///
/// # Errors
/// When there is no `zstd`, or the image's memory is not one layer.
pub(crate) fn compare(image: &Path, stored_bytes: u64, work: &Path, metrics: &mut Metrics) -> io::Result<()> {
    let level = CaptureSettings::default().level;
    let (plain, packed) = (work.join("plain"), work.join("plain.zst"));
    unpack(&memory_layer(image)?, &plain)?;
    let mut rates = Vec::new();
    let mut whole_bytes = 0;
    for _ in 0..RUNS {
        let begun = Instant::now();
        let mut zstd = Command::new("zstd");
        zstd.args(["-q", "-f", "-T2", &format!("-{level}")]);
        succeed(zstd.arg(&plain).arg("-o").arg(&packed))?;
        // A snapshot is on the disk when it is answered.
        File::open(&packed)?.sync_all()?;
        rates.push(RAM_MIB as f64 / begun.elapsed().as_secs_f64());
        whole_bytes = packed.metadata()?.len();
    }
    metrics.add("zstd_mib_per_s", Samples::new("MiB/s", rates));
    let ratio = |of: &str, to: f64| metrics.median(of).map(|of| of / to);
    let zstd = metrics.median("zstd_mib_per_s").unwrap_or(f64::NAN);
    let created = ratio("snapshot_mib_per_s", zstd).unwrap_or(f64::NAN);
    let frames_bytes = frames_bytes(&plain, level)?;
    for (name, value) in [
        ("create_vs_zstd_ratio", created),
        (
            "size_vs_zstd_frames_ratio",
            stored_bytes as f64 / frames_bytes as f64,
        ),
        (
            "size_vs_zstd_whole_ratio",
            stored_bytes as f64 / whole_bytes as f64,
        ),
    ] {
        metrics.add(name, Samples::new("ratio", vec![value]));
    }
    std::fs::remove_file(plain)?;
    std::fs::remove_file(packed)
}

fn memory_layer(image: &Path) -> io::Result<std::path::PathBuf> {
    let opened = Image::open_directory(image, &Wanted::Only).map_err(io::Error::other)?;
    let memory = opened.volume(&VolumeName::Memory);
    let [layer] = memory.map_or(&[][..], |memory| &memory.layers) else {
        return Err(io::Error::other("the image's memory is not one layer"));
    };
    Ok(image.join("blobs/sha256").join(layer.digest.hex()))
}

/// What stock `zstd` makes of a layer: the volume.
fn unpack(layer: &Path, plain: &Path) -> io::Result<()> {
    let mut zstd = Command::new("zstd");
    zstd.args(["-q", "-d", "-c"]).stdin(File::open(layer)?);
    succeed(zstd.stdout(File::create(plain)?))
}

/// The length of each chunk as a frame of its own, together.
fn frames_bytes(plain: &Path, level: i32) -> io::Result<u64> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let mut chunk = vec![0; CaptureSettings::default().chunk_size.bytes() as usize];
    let mut file = File::open(plain)?;
    let mut bytes = 0;
    for _ in 0..file.metadata()?.len() / chunk.len() as u64 {
        file.read_exact(&mut chunk)?;
        bytes += compressor.compress(&chunk)?.len() as u64;
    }
    Ok(bytes)
}

fn succeed(command: &mut Command) -> io::Result<()> {
    let status = command.stderr(Stdio::inherit()).status()?;
    if status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{command:?}: {status}")))
}
