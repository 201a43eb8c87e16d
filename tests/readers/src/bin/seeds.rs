//! `seeds DIR` writes the valid inputs of each reader to `DIR/<reader>/`, where a fuzzer finds them.

use std::path::PathBuf;
use std::{env, fs, io};

use runnel_readers::{READERS, seeds};

fn main() -> io::Result<()> {
    let target = env::args_os().nth(1).map(PathBuf::from);
    let target = target.ok_or_else(|| io::Error::other("usage: seeds DIR"))?;
    for (name, _) in READERS {
        let folder = target.join(name);
        fs::create_dir_all(&folder)?;
        for (seed, number) in seeds::of(name).iter().zip(0..) {
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
