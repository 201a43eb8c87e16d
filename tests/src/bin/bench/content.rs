//! What the measured guest's memory holds: a quarter zero, half pages of real programs, a quarter random.
//!
//! The guest could not write as much in time, so it is loaded as an initial RAM disk, which goes to the top of RAM.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Guest RAM.
pub(crate) const RAM_MIB: u64 = 1024;
const PROGRAMS_BYTES: u64 = (RAM_MIB / 2) << 20;
const RANDOM_BYTES: u64 = (RAM_MIB / 4) << 20;
/// Where the programs' pages begin; below is zero, but for the guest itself.
pub(crate) const PROGRAMS_START: u64 = (RAM_MIB << 20) - RANDOM_BYTES - PROGRAMS_BYTES;

/// Where programs and their libraries are.
const FOLDERS: [&str; 4] = ["/usr/lib", "/usr/bin", "/usr/sbin", "/usr/libexec"];

/// Writes it to `path`.
///
/// # Errors
/// When a file cannot be read or written, or there are no programs at all.
pub(crate) fn write(path: &Path) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    write_programs(&mut out)?;
    write_random(&mut out)?;
    out.flush()
}

/// Files in the order of their paths, each from the beginning, until there is enough; over again if need be.
fn write_programs(out: &mut impl Write) -> io::Result<()> {
    let mut files = Vec::new();
    for folder in FOLDERS {
        collect(Path::new(folder), &mut files)?;
    }
    files.sort();
    let mut left = PROGRAMS_BYTES;
    while left > 0 {
        let before = left;
        for file in &files {
            left -= io::copy(&mut File::open(file)?.take(left), out)?;
        }
        if left == before {
            return Err(io::Error::other(format!("{FOLDERS:?} hold no files")));
        }
    }
    Ok(())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// The same on every machine: SplitMix64, from zero.
fn write_random(out: &mut impl Write) -> io::Result<()> {
    let mut state = 0_u64;
    let mut block = vec![0; 1 << 16];
    for _ in 0..RANDOM_BYTES / block.len() as u64 {
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes());
        }
        out.write_all(&block)?;
    }
    Ok(())
}
