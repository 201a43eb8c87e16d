//! A machine that was just started: its console here, or left to itself.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::commands::Failure;
use crate::console::{Console, Left};
use crate::ending::Ending;
use crate::exit::Exit;
use crate::monitor::Monitor;
use crate::output::{print, print_json, tell};
use crate::signals::Signals;
use crate::state::MachineName;

/// How often the console's socket is tried while the machine is built.
const LOOK: Duration = Duration::from_micros(200);

/// What becomes of a machine that was started.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Afterwards {
    /// Its console is shown here.
    Foreground,
    /// It runs on by itself, and the command ends.
    Detached {
        /// Whether to say so in JSON.
        json: bool,
    },
}

impl Afterwards {
    pub(crate) fn new(detach: bool, json: bool) -> Self {
        if detach {
            Self::Detached { json }
        } else {
            Self::Foreground
        }
    }
}

/// Starts a machine with `start`, which gives the signal that called it off, if one did; and then does what is to be done
/// afterwards.
///
/// The console is joined while the machine starts: a guest that prints a line and switches itself off is heard.
pub(crate) fn start_and_attend<E>(
    monitor: Monitor<'_>,
    afterwards: Afterwards,
    signals: &Signals,
    start: impl FnOnce(&Monitor<'_>) -> Result<Option<i32>, E>,
) -> Result<Exit, Failure>
where
    Failure: From<E>,
{
    let Afterwards::Detached { json } = afterwards else {
        // The machine is new: nobody else can be there, and whoever comes is told.
        let _place = monitor.folder().take_console()?;
        let (started, console) = start_with_console(&monitor, start);
        return match started?.or_else(|| signals.next()) {
            // Nobody is told that it runs.
            Some(signal) => Ok(called_off(monitor, signal)),
            None => attend(monitor, console, signals),
        };
    };
    if let Some(signal) = start(&monitor)?.or_else(|| signals.next()) {
        return Ok(called_off(monitor, signal));
    }
    let folder = monitor.folder();
    match json {
        true => print_json(&json!({
            "name": folder.name.to_string(),
            "api_socket": folder.api_socket(),
            "console_socket": folder.console_socket(),
            "log": folder.log(),
        }))?,
        false => print(&format!("{}\n", folder.name))?,
    }
    monitor.keep();
    Ok(Exit::Done)
}

fn start_with_console<T>(
    monitor: &Monitor<'_>,
    start: impl FnOnce(&Monitor<'_>) -> T,
) -> (T, Option<Console>) {
    let socket = monitor.folder().console_socket();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            loop {
                // Looked at before the try, so that the last try comes after the start.
                let last = is_over.load(Ordering::Acquire);
                match Console::connect(&socket) {
                    Ok(console) => return Some(console),
                    Err(_) if last => return None,
                    Err(_) => thread::sleep(LOOK),
                }
            }
        });
        let started = start(monitor);
        is_over.store(true, Ordering::Release);
        (started, connecting.join().unwrap_or_default())
    })
}

/// Ends a machine that a signal called off while it started, and says so.
fn called_off(monitor: Monitor<'_>, signal: i32) -> Exit {
    let name = monitor.folder().name.clone();
    drop(monitor);
    tell(format_args!(
        "called off: {name} was not started, and nothing is left of it but its log"
    ));
    Exit::Signal(signal)
}

fn attend(monitor: Monitor<'_>, console: Option<Console>, signals: &Signals) -> Result<Exit, Failure> {
    let name = monitor.folder().name.clone();
    let is_terminal = std::io::stdin().is_terminal();
    if is_terminal {
        tell(format_args!("{name} runs; Ctrl-] leaves its console."));
    }
    // None, if the machine has ended already.
    let left = console.map_or(Ok(Left::Ended), |console| console.join(signals))?;
    match left {
        Left::Key => {
            tell(format_args!(
                "\n{name} runs on: `runnel console {name}` returns to it, `runnel stop {name}` ends it."
            ));
            monitor.keep();
            Ok(Exit::Done)
        }
        Left::Signal(signal) => {
            // Dropped, the monitor ends.
            drop(monitor);
            Ok(Exit::Signal(signal))
        }
        Left::Ended => {
            let log = monitor.ended_log();
            let exit = monitor.wait(signals)?;
            if let Exit::Monitor(code) = exit {
                say_how(&name, code, &log);
            }
            Ok(exit)
        }
    }
}

/// Says how a machine ended; where that is no guest's wish, where to read on.
fn say_how(name: &MachineName, code: u8, log: &Path) {
    let ending = Ending {
        // One that was killed could not say so itself.
        code: Some(code),
        ..Ending::of(log)
    };
    match code {
        0 => tell(format_args!("{name} has ended{ending}")),
        _ => tell(format_args!(
            "runnel: {name} has ended{ending}; its log is {}",
            log.display()
        )),
    }
}
