//! `golden DIR` makes a golden image with the Runnel of today: see `tests/golden/README.md`.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| std::io::Error::other("usage: golden DIR"))?;
    runnel_tests::golden::make(&folder);
    Ok(())
}
