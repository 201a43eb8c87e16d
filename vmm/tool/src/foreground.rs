//! A machine that was just started: its console here, or left to itself.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::commands::Failure;
use crate::console::{Console, Left};
use crate::exit::Exit;
use crate::monitor::Monitor;
use crate::output::{print, print_json, tell};
use crate::signals::Signals;

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

/// Starts a machine with `start`, and then does what is to be done afterwards.
///
/// The console is joined while the machine starts: a guest that prints a line and switches itself off is heard.
pub(crate) fn start_and_attend<E>(
    monitor: Monitor<'_>,
    afterwards: Afterwards,
    signals: &Signals,
    start: impl FnOnce(&Monitor<'_>) -> Result<Option<Exit>, E>,
) -> Result<Exit, Failure>
where
    Failure: From<E>,
{
    let Afterwards::Detached { json } = afterwards else {
        // The machine is new: nobody else can be there, and whoever comes is told.
        let _place = monitor.folder().take_console()?;
        let (started, console) = start_with_console(&monitor, start);
        if let Some(exit) = started? {
            return Ok(exit);
        }
        return attend(monitor, console, signals);
    };
    if let Some(exit) = start(&monitor)? {
        return Ok(exit);
    }
    if let Some(signal) = signals.next() {
        return Ok(Exit::Signal(signal));
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

fn attend(monitor: Monitor<'_>, console: Option<Console>, signals: &Signals) -> Result<Exit, Failure> {
    // One that came while the machine started: it ends, and nobody is told that it runs.
    if let Some(signal) = signals.next() {
        return Ok(Exit::Signal(signal));
    }
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
            if let Exit::Monitor(code @ 1..) = exit {
                tell(format_args!(
                    "runnel: {name} ended with code {code}; its log is {}",
                    log.display()
                ));
            }
            Ok(exit)
        }
    }
}
