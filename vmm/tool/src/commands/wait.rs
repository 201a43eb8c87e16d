//! `runnel wait`: until machines have ended.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use crate::ending::Ending;
use crate::exit::Exit;
use crate::output::{OutputArgs, print, print_json, tell};
use crate::signals::Signals;
use crate::size::{duration, parse_duration};
use crate::state::{Machine, MachineName, StateError, StateFolder};

const HELP: &str = "\
Says of each machine how it ended, as soon as it has. One that has ended before counts, as long as its log is kept. If one of
the names was never a machine's, none is waited for.

Ends with 0 once all have ended, however that was: the exit code of each monitor is \"code\" in JSON (`runnel-vmm --help`
lists them). Ends with 3 if the --timeout is over before; the machines run on, and those that do are named.

Examples:
    runnel wait web
    runnel wait web db --timeout 10m --json | jq '.[] | select(.code != 0) | .name'";

/// How often machines and signals are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Wait until machines have ended
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct WaitArgs {
    /// The machines
    #[arg(required = true)]
    machines: Vec<MachineName>,

    /// How long to wait for all of them, with its unit: 30s, 2m; without end unless given
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,

    #[command(flatten)]
    output: OutputArgs,
}

/// One of the names is no machine's.
#[derive(Debug, thiserror::Error)]
#[error("no machine was waited for")]
struct NoneAwaited(#[source] StateError);

/// Those who are waited for.
struct Wait<'s> {
    state: &'s StateFolder,
    output: OutputArgs,
    ended: Vec<Value>,
    running: Vec<Machine>,
}

impl<'s> Wait<'s> {
    /// Sorts them into those that run and those that have ended already.
    fn of(state: &'s StateFolder, args: &WaitArgs) -> Result<Self, Failure> {
        let names: BTreeSet<&MachineName> = args.machines.iter().collect();
        let mut wait = Self {
            state,
            output: args.output,
            ended: Vec::new(),
            running: Vec::new(),
        };
        let mut ended = Vec::new();
        for name in names {
            match state.machine(name) {
                Ok(machine) => wait.running.push(machine),
                Err(StateError::Unknown { .. }) if state.ended_log(name).exists() => ended.push(name),
                Err(error) => return Err(NoneAwaited(error).into()),
            }
        }
        for name in ended {
            wait.has_ended(name)?;
        }
        Ok(wait)
    }

    /// Looks who has ended since, for a moment.
    fn look(&mut self) -> Result<(), Failure> {
        if let Some(first) = self.running.first() {
            first.process.wait(LOOK)?;
        }
        let mut running = Vec::new();
        for machine in std::mem::take(&mut self.running) {
            if machine.process.wait(Duration::ZERO)? {
                self.state.forget(&machine.folder)?;
                self.has_ended(&machine.folder.name)?;
            } else {
                running.push(machine);
            }
        }
        self.running = running;
        Ok(())
    }

    fn has_ended(&mut self, name: &MachineName) -> Result<(), Failure> {
        let ending = Ending::of(&self.state.ended_log(name));
        if !self.output.json {
            print(&format!("{name} has ended{ending}\n"))?;
        }
        self.ended.push(json!({
            "name": name.to_string(),
            "ended": true,
            "code": ending.code,
            "reason": ending.reason,
        }));
        Ok(())
    }

    /// Says in JSON who has ended, and who has not.
    fn print_json(&self) -> Result<(), Failure> {
        let running = self.running.iter();
        let running =
            running.map(|machine| json!({ "name": machine.folder.name.to_string(), "ended": false }));
        let all: Vec<Value> = self.ended.iter().cloned().chain(running).collect();
        Ok(print_json(&all)?)
    }
}

pub(crate) fn run(args: &WaitArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let state = StateFolder::open()?;
    // What is too far away to be a moment is never.
    let deadline = args
        .timeout
        .and_then(|patience| Instant::now().checked_add(patience));
    let mut wait = Wait::of(&state, args)?;
    let exit = loop {
        wait.look()?;
        if wait.running.is_empty() {
            break Exit::Done;
        }
        if let Some(signal) = signals.next() {
            break Exit::Signal(signal);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            for machine in &wait.running {
                let patience = duration(args.timeout.unwrap_or_default());
                tell(format_args!(
                    "{} did not end within {patience}",
                    machine.folder.name
                ));
            }
            break Exit::Unfinished;
        }
    };
    if args.output.json {
        wait.print_json()?;
    }
    Ok(exit)
}
