//! Prints which guests this machine's KVM runs: `linux`, `bare` or `none`. For scripts.

use runnel_tests::lab::{Level, level};

fn main() {
    println!(
        "{}",
        match level::of_this_machine() {
            Level::Linux => "linux",
            Level::Bare => "bare",
            Level::NoKvm => "none",
        }
    );
}
