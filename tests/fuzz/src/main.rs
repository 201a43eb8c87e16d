//! Every fuzz target in one program: it feeds the reader by whose name it is called. `run` makes a link for each.
//!
//! Called `seeds`, it writes the valid inputs of each reader to `DIR/<reader>/`, where libFuzzer finds them.

#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs, io, process};

use runnel_readers::{READERS, Reader, seeds};

/// What this process feeds.
static READER: OnceLock<Reader> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: begin(), |bytes: &[u8]| {
    READER.get().expect("it was chosen before the first input")(bytes);
});

fn begin() {
    let arguments: Vec<PathBuf> = env::args_os().map(PathBuf::from).collect();
    let name = arguments
        .first()
        .and_then(|program| program.file_name())
        .unwrap_or_default();
    if name == "seeds" {
        let Some(target) = arguments.get(1) else {
            give_up("usage: seeds DIR");
        };
        match write_seeds(target) {
            Ok(()) => process::exit(0),
            Err(error) => give_up(&format!(
                "seeds cannot be written to {}: {error}",
                target.display()
            )),
        }
    }
    let Some((_, read)) = READERS.iter().find(|(reader, _)| name == *reader) else {
        give_up(&format!(
            "{} is no reader; call one by its name in tests/fuzz/corpus",
            name.display()
        ));
    };
    READER.get_or_init(|| *read);
}

fn give_up(why: &str) -> ! {
    eprintln!("{why}");
    process::exit(2)
}

fn write_seeds(target: &Path) -> io::Result<()> {
    for (name, read) in READERS {
        let folder = target.join(name);
        fs::create_dir_all(&folder)?;
        for (seed, number) in seeds::of(name).iter().zip(0..) {
            if !read(seed) {
                return Err(io::Error::other(format!(
                    "{name} refuses seed {number}: little of it would be reached"
                )));
            }
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
