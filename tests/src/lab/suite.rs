//! Tests that need Linux guests. Where KVM runs Linux they run in this process; elsewhere the suite's own program is
//! carried into a nested host and runs there. Both print what `cargo test` prints.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::nested::NestedHost;
use super::{CARRIED, Level, evidence, is_full, is_nested, level, program, thing};

/// One test: its name, by behaviour, and what panics if the behaviour is another.
pub type Test = (&'static str, fn());

/// A set of tests that share one nested host: booting one takes longer than most of them.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The Debian kernels of the nested hosts, each of which runs every test.
    pub host_kernels: &'static [&'static str],
    /// The nested host's memory.
    pub memory_mib: u32,
    /// When a nested host is given up.
    pub deadline: Duration,
    /// What the tests will ask [`program`] for.
    pub programs: &'static [&'static str],
    /// What the tests will ask [`thing`] for.
    pub things: &'static [&'static str],
    /// The tests, in order. They run one after the other: the machine is slow enough with one guest.
    pub tests: &'static [Test],
    /// Whether what the tests leave in [`leave`](super::leave) is [carried](super::carried) to the next nested host.
    pub carries: bool,
}

impl Suite {
    /// The `main` of a test program with `harness = false`. Arguments that are not flags choose tests by a part of
    /// their name, as with `cargo test`.
    #[must_use]
    pub fn main(&self) -> ExitCode {
        let arguments: Vec<String> = env::args().skip(1).collect();
        let filters: Vec<&String> = arguments
            .iter()
            .filter(|argument| !argument.starts_with('-'))
            .collect();
        let chosen =
            |test: &&Test| filters.is_empty() || filters.iter().any(|part| test.0.contains(part.as_str()));
        let tests: Vec<&Test> = self.tests.iter().filter(chosen).collect();

        if arguments.iter().any(|argument| argument == "--list") {
            tests.iter().for_each(|(name, _)| println!("{name}: test"));
            return ExitCode::SUCCESS;
        }
        match level::of_this_machine() {
            _ if tests.is_empty() => run_here(&tests, self.tests.len()),
            Level::Linux => run_here(&tests, self.tests.len() - tests.len()),
            found if is_nested() => {
                println!("the nested host has {found}: it should run Linux");
                ExitCode::FAILURE
            }
            _ => match nested_host_is_possible() {
                Ok(()) => self.run_nested(&arguments),
                Err(reason) if is_full() => {
                    println!("{reason}; under RUNNEL_LAB=full that is a failure");
                    ExitCode::FAILURE
                }
                Err(reason) => {
                    tests
                        .iter()
                        .for_each(|(name, _)| println!("test {name} ... ignored, {reason}"));
                    println!(
                        "\ntest result: ok. 0 passed; 0 failed; {} ignored; 0 measured; 0 filtered out",
                        tests.len()
                    );
                    ExitCode::SUCCESS
                }
            },
        }
    }

    fn run_nested(&self, arguments: &[String]) -> ExitCode {
        let work = env::temp_dir().join(format!("runnel-suite-{}", std::process::id()));
        let result = self.stage(&work, arguments).and_then(|(script, files)| {
            let mut code = ExitCode::SUCCESS;
            for kernel in self.host_kernels {
                println!("\nin a nested host, Debian's kernel {kernel}:");
                let mut host = NestedHost::of(kernel)
                    .memory_mib(self.memory_mib)
                    .deadline(self.deadline);
                let mut files = files.clone();
                let (carried, left) = (work.join(CARRIED), work.join("left"));
                if self.carries {
                    fs::create_dir_all(&carried)?;
                    files.push(carried.clone());
                    host = host.take(&left);
                }
                if !host.run(&script, &files).success() {
                    code = ExitCode::FAILURE;
                }
                if self.carries {
                    fs::remove_dir_all(&carried)?;
                    fs::rename(&left, &carried)?;
                }
            }
            Ok(code)
        });
        let _ = fs::remove_dir_all(&work); // nothing hangs on a folder left in /tmp
        result.unwrap_or_else(|error| {
            println!(
                "cannot prepare the nested host's files in {}: {error}",
                work.display()
            );
            ExitCode::FAILURE
        })
    }

    /// The script that runs this program in the nested host, and what it needs there.
    fn stage(&self, work: &Path, arguments: &[String]) -> std::io::Result<(PathBuf, Vec<PathBuf>)> {
        // The lab's things keep their names, so that the same question has the same answer there.
        let lab = work.join("lab");
        for name in self.things {
            let link = lab.join(name);
            fs::create_dir_all(link.parent().unwrap_or(&lab))?;
            std::os::unix::fs::symlink(thing(name), link)?;
        }
        fs::create_dir_all(&lab)?;
        let own = work.join("suite");
        std::os::unix::fs::symlink(env::current_exe()?, &own)?;
        let script = work.join("run");
        let quoted: String = arguments
            .iter()
            .map(|argument| format!(" '{}'", argument.replace('\'', r"'\''")))
            .collect();
        let text = format!(
            "#!/bin/sh\nexport RUNNEL_LAB=full RUNNEL_LAB_HOST=nested RUNNEL_LAB_DIR=/lab/in/lab RUNNEL_PROGRAMS=/lab/in\n\
             exec ./suite{quoted}\n"
        );
        fs::write(&script, text)?;
        fs::set_permissions(&script, Permissions::from_mode(0o755))?;
        let mut files = vec![own, lab];
        files.extend(self.programs.iter().map(|name| program(name)));
        Ok((script, files))
    }
}

/// The lab needs root and Debian's packages.
fn nested_host_is_possible() -> Result<(), &'static str> {
    let is_root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !is_root {
        return Err("this KVM does not run Linux, and a nested host is made by root alone");
    }
    if !Path::new("/etc/debian_version").exists() {
        return Err("this KVM does not run Linux, and a nested host is made of Debian's packages");
    }
    Ok(())
}

fn run_here(tests: &[&Test], filtered_out: usize) -> ExitCode {
    println!("\nrunning {} tests", tests.len());
    let started = Instant::now();
    let failed = tests.iter().filter(|(name, run)| !passes(name, *run)).count();
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored; 0 measured; {filtered_out} filtered out; \
         finished in {:.2}s\n",
        tests.len() - failed,
        started.elapsed().as_secs_f64()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn passes(name: &str, run: fn()) -> bool {
    let started = Instant::now();
    // The panic's message was printed when it happened, above the verdict.
    let passed = panic::catch_unwind(AssertUnwindSafe(run)).is_ok();
    let verdict = if passed { "ok" } else { "FAILED" };
    println!(
        "test {name} ... {verdict} ({:.1} s)",
        started.elapsed().as_secs_f64()
    );
    if !passed {
        println!("{}", evidence::of_host());
    }
    passed
}
