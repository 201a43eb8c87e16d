//! `runnel console`: a machine's serial console on this terminal.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;

use super::Failure;
use crate::api::{Api, InstanceInfo};
use crate::console::{Console, Left};
use crate::ending::Ending;
use crate::exit::Exit;
use crate::monitor::FAREWELL;
use crate::output::tell;
use crate::signals::Signals;
use crate::state::{ConsolePlace, Machine, MachineName, StateFolder};

const HELP: &str = "\
Every key goes to the guest, Ctrl-C too; Ctrl-] leaves, and the machine runs on. What the guest printed while nobody
was there comes first. There is one place: who comes second is told so, and waits until the first has left.

Examples:
    runnel console web
    echo uptime | runnel console web        not from a terminal: every byte is typed, and output goes on until Ctrl-C";

/// Join a machine's serial console
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ConsoleArgs {
    /// The machine
    machine: MachineName,
}

/// How often it is looked whether the place at a console is free.
const LOOK: Duration = Duration::from_millis(100);

/// What a wait for the place at a console came to.
enum Waited {
    Place(ConsolePlace),
    /// The machine has ended.
    End,
    Signal(i32),
}

/// Why the guest neither hears nor speaks, if it stands.
fn standstill(name: &MachineName, info: &InstanceInfo, is_saving_or_loading: bool) -> Option<String> {
    match &info.stalled {
        Some(stalled) if stalled.needs_repair => {
            return Some(format!(
                "{name} is stalled until its image is repaired: `runnel ps` says what it waits for."
            ));
        }
        Some(_) => {
            return Some(format!(
                "{name} is stalled, and goes on by itself: `runnel ps` says what it waits for."
            ));
        }
        None => {}
    }
    match info.state == "Paused" {
        // It stands by itself for a part of that, and goes on by itself.
        true if is_saving_or_loading => Some(format!("{name} is being saved or loaded.")),
        true => Some(format!(
            "{name} is paused: `runnel unpause {name}` lets it run on."
        )),
        false => None,
    }
}

/// Waits for the place at the console.
fn wait_for_place(machine: &Machine, signals: &Signals) -> Result<Waited, Failure> {
    let mut is_told = false;
    loop {
        match machine.folder.take_console() {
            Ok(Some(place)) => return Ok(Waited::Place(place)),
            Ok(None) => {}
            // Another command has removed its folder.
            Err(_) if machine.process.wait(Duration::ZERO)? => return Ok(Waited::End),
            Err(error) => return Err(error.into()),
        }
        if !std::mem::replace(&mut is_told, true) {
            tell(format_args!(
                "another console of {} is open, here or where it was started: waiting until it is left (Ctrl-C gives up)",
                machine.folder.name
            ));
        }
        if machine.process.wait(LOOK)? {
            return Ok(Waited::End);
        }
        if let Some(signal) = signals.next() {
            return Ok(Waited::Signal(signal));
        }
    }
}

pub(crate) fn run(args: &ConsoleArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let state = StateFolder::open()?;
    let machine = state.machine(&args.machine)?;
    let _place = match wait_for_place(&machine, &signals)? {
        Waited::Place(place) => place,
        Waited::End => return ended(args, &state, &machine),
        Waited::Signal(signal) => return Ok(Exit::Signal(signal)),
    };
    let console = Console::connect(&machine.folder.console_socket())?;
    let api = Api::new(&machine.folder.api_socket());
    // A monitor that does not answer has its console all the same.
    if let Ok(info) = api.instance_info()
        && let Some(reason) = standstill(&args.machine, &info, api.is_saving_or_loading())
    {
        tell(reason);
    }
    if std::io::stdin().is_terminal() {
        tell(format_args!("{}; Ctrl-] leaves its console.", args.machine));
    }
    Ok(match console.join(&signals)? {
        Left::Key => {
            tell(format_args!("\n{} runs on.", args.machine));
            Exit::Done
        }
        Left::Ended => return ended(args, &state, &machine),
        Left::Signal(signal) => Exit::Signal(signal),
    })
}

fn ended(args: &ConsoleArgs, state: &StateFolder, machine: &Machine) -> Result<Exit, Failure> {
    // The console closes a moment before the process ends. Whoever is told so can use the name again.
    if machine.process.wait(FAREWELL)? {
        state.forget(&machine.folder)?;
    }
    let log = state.ended_log(&args.machine);
    tell(format_args!(
        "{} has ended{}; its log is {}",
        args.machine,
        Ending::of(&log),
        log.display()
    ));
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Stalled;

    #[test]
    fn a_guest_that_cannot_answer_is_said_to_stand() {
        let name: MachineName = "web".parse().unwrap();
        let info = |state: &str, stalled| InstanceInfo {
            state: state.into(),
            stalled,
            guest_agent: None,
        };
        let stalled = Stalled {
            volume: "memory".into(),
            chunk: 1,
            reason: "away".into(),
            waiting_ms: 9,
            needs_repair: false,
        };
        assert_eq!(standstill(&name, &info("Running", None), false), None);
        let told = standstill(&name, &info("Paused", None), false).unwrap();
        assert!(told.contains("runnel unpause web"), "{told}");
        let told = standstill(&name, &info("Paused", None), true).unwrap();
        assert!(!told.contains("unpause"), "{told}");
        for (needs_repair, expected) in [(false, "by itself"), (true, "until its image is repaired")] {
            let stalled = Stalled {
                needs_repair,
                ..stalled.clone()
            };
            let told = standstill(&name, &info("Running", Some(stalled)), false).unwrap();
            assert!(told.contains(expected), "{told}");
        }
    }
}
