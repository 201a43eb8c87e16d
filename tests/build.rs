//! Builds the bare guest with the host's C compiler. It is never committed: a test that ran an old one would lie.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 8] = [
    "start.S",
    "main.c",
    "commands.c",
    "memory.c",
    "block.c",
    "serial.c",
    "smp.c",
    "agent.c",
];

fn main() {
    println!("cargo::rerun-if-changed=bare-guest");
    println!("cargo::rerun-if-env-changed=CC");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bare-guest.elf");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "gcc".into());
    let status = Command::new(&compiler)
        .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"])
        // No operating system below, no FPU, and no interrupt may write below the stack pointer unseen.
        .args([
            "-ffreestanding",
            "-nostdlib",
            "-static",
            "-no-pie",
            "-fno-pie",
            "-mno-red-zone",
        ])
        .args([
            "-mgeneral-regs-only",
            "-mcmodel=small",
            "-fno-stack-protector",
            "-fcf-protection=none",
        ])
        .args([
            "-fno-asynchronous-unwind-tables",
            "-fno-strict-aliasing",
            "-fno-tree-loop-distribute-patterns",
        ])
        .args([
            "-Wl,-T,bare-guest/guest.ld",
            "-Wl,--build-id=none",
            "-Wl,-z,max-page-size=4096",
            "-Wl,-z,noexecstack",
        ])
        .args(["-Wl,--no-warn-rwx-segments"])
        .args(SOURCES.map(|source| Path::new("bare-guest").join(source)))
        .arg("-o")
        .arg(&out)
        .status();
    match status {
        Ok(status) if status.success() => println!("cargo::rustc-env=BARE_GUEST={}", out.display()),
        Ok(status) => panic!("{} cannot build the bare guest: {status}", compiler.display()),
        Err(error) => panic!(
            "cannot run {} to build the bare guest (apt install gcc): {error}",
            compiler.display()
        ),
    }
}
