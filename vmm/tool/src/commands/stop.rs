//! `runnel stop`, which asks the guest, and `runnel kill`, which asks nobody.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::{ArgGroup, Args};
use runnel_snapshot::causes::with_causes;
use rustix::process::Signal;
use serde_json::json;

use super::Failure;
use crate::api::{Api, ApiError, InstanceInfo};
use crate::exit::Exit;
use crate::monitor::FAREWELL;
use crate::output::{print, tell};
use crate::signals::Signals;
use crate::size::{duration, parse_duration};
use crate::state::{Machine, MachineFolder, MachineName, StateError, StateFolder};

/// How often signals are looked for while the guest shuts down.
const LOOK: Duration = Duration::from_millis(100);

/// Why a machine did not end.
#[derive(Debug, thiserror::Error)]
enum StopError {
    /// The guest takes its time.
    #[error(
        "{name} did not end within {}: wait longer with --timeout, or end it with `runnel kill {name}`",
        duration(*.patience)
    )]
    StillRuns {
        /// The machine.
        name: MachineName,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The guest cannot be asked.
    #[error("{name} cannot be asked to shut down, and `runnel kill {name}` ends it all the same")]
    Deaf {
        /// The machine.
        name: MachineName,
        /// Why.
        #[source]
        source: ApiError,
    },
    /// It stands.
    #[error(
        "{0} is paused, and its guest cannot shut down: `runnel unpause {0}` lets it run on first, `runnel kill {0}` ends it as it is"
    )]
    Paused(MachineName),
    /// It waits.
    #[error(
        "{0} is stalled, and its guest cannot shut down: `runnel ps` says what it waits for, `runnel kill {0}` ends it as it is"
    )]
    Stalled(MachineName),
    /// One of the names is no machine's.
    #[error("no machine was ended")]
    NoneEnded(#[source] StateError),
    /// Not even the kernel can end it now.
    #[error("{0} was killed and has not ended: its process waits for the kernel, for instance for a disk")]
    Unkillable(MachineName),
}

/// Ask guests to shut down, as Ctrl-Alt-Del does, and wait until they have
#[derive(Debug, Args)]
#[command(after_help = "\
Whether a guest shuts down is its own decision. One that is paused, or stalled for good, cannot. If one of the names is no
machine's, none is asked.

Examples:
    runnel stop web
    runnel stop web db --timeout 2m")]
pub(crate) struct StopArgs {
    /// The machines
    #[arg(required = true)]
    machines: Vec<MachineName>,

    /// How long each may take, with its unit: 30s, 2m
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

/// End machines at once, whatever their guests do
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).args(["machines", "all"])))]
#[command(after_help = "\
The monitor ends in order if it can. What the guest had not written to its disks is lost. If one of the names is no
machine's, none is ended.

Examples:
    runnel kill web
    runnel kill --all")]
pub(crate) struct KillArgs {
    /// The machines
    machines: Vec<MachineName>,

    /// All that run
    #[arg(long)]
    all: bool,
}

pub(crate) fn stop(args: &StopArgs) -> Result<Exit, Failure> {
    let signals = Signals::take()?;
    let state = StateFolder::open()?;
    let machines = find(&state, &args.machines)?;
    let mut failures = Vec::new();
    let mut asked = Vec::new();
    for machine in &machines {
        match ask(&machine.folder) {
            Ok(()) => asked.push(machine),
            Err(failure) => failures.push(failure),
        }
    }
    let mut ended = String::new();
    // All were asked at once, so all share the time.
    let deadline = Instant::now() + args.timeout;
    for machine in asked {
        let has_ended = loop {
            if machine.process.wait(LOOK)? {
                break true;
            }
            if let Some(signal) = signals.next() {
                return Ok(Exit::Signal(signal));
            }
            if Instant::now() >= deadline {
                break false;
            }
        };
        if has_ended {
            state.forget(&machine.folder)?;
            ended += &format!("{} has ended\n", machine.folder.name);
        } else {
            let (name, patience) = (machine.folder.name.clone(), args.timeout);
            failures.push(StopError::StillRuns { name, patience });
        }
    }
    // At the end: where nobody reads it, the others are waited for all the same.
    let told = print(&ended);
    let Some(last) = failures.pop() else {
        told?;
        return Ok(Exit::Done);
    };
    for failure in failures {
        tell(format_args!("runnel: {}", with_causes(&failure)));
    }
    Err(last.into())
}

/// Asks a guest to shut down, if it can hear.
fn ask(machine: &MachineFolder) -> Result<(), StopError> {
    let (api, name) = (Api::new(&machine.api_socket()), &machine.name);
    let deaf = |source| StopError::Deaf {
        name: name.clone(),
        source,
    };
    let info = api.instance_info().map_err(deaf)?;
    check_hearing(name, &info)?;
    if info.stalled.is_some() {
        // It hears of it when what it waits for has come.
        tell(format_args!("{name} is stalled: it is asked, and waited for"));
    }
    if api.is_saving_or_loading() {
        tell(format_args!(
            "{name} is being saved or loaded: it is asked after that"
        ));
    }
    let press = json!({ "action_type": "SendCtrlAltDel" });
    api.put("/actions", &press).map_err(deaf)
}

/// Whether a guest that is asked will ever hear of it.
fn check_hearing(name: &MachineName, info: &InstanceInfo) -> Result<(), StopError> {
    if info.state == "Paused" {
        return Err(StopError::Paused(name.clone()));
    }
    match &info.stalled {
        Some(stalled) if stalled.needs_repair => Err(StopError::Stalled(name.clone())),
        _ => Ok(()),
    }
}

pub(crate) fn kill(args: &KillArgs) -> Result<Exit, Failure> {
    let state = StateFolder::open()?;
    let machines = if args.all {
        state.machines()?
    } else {
        find(&state, &args.machines)?
    };
    for machine in &machines {
        machine.process.signal(Signal::TERM)?;
    }
    for machine in &machines {
        if !machine.process.wait(FAREWELL)? {
            machine.process.signal(Signal::KILL)?;
            if !machine.process.wait(FAREWELL)? {
                return Err(StopError::Unkillable(machine.folder.name.clone()).into());
            }
        }
        state.forget(&machine.folder)?;
    }
    let ended: String = machines
        .iter()
        .map(|machine| format!("{} has ended\n", machine.folder.name))
        .collect();
    match ended.is_empty() {
        true => tell("no machine runs"),
        false => print(&ended)?,
    }
    Ok(Exit::Done)
}

/// All of them, each once, before anything is done to one.
fn find(state: &StateFolder, names: &[MachineName]) -> Result<Vec<Machine>, StopError> {
    let names: BTreeSet<&MachineName> = names.iter().collect();
    let machines = names.into_iter().map(|name| state.machine(name));
    machines.collect::<Result<_, _>>().map_err(StopError::NoneEnded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Stalled;

    #[test]
    fn guests_that_will_never_hear_are_not_asked_and_those_that_will_are() {
        let name: MachineName = "web".parse().unwrap();
        let told = |state: &str, needs_repair: Option<bool>| {
            let stalled = needs_repair.map(|needs_repair| Stalled {
                volume: "memory".into(),
                chunk: 1,
                reason: "away".into(),
                waiting_ms: 9,
                needs_repair,
            });
            let state = state.into();
            check_hearing(
                &name,
                &InstanceInfo {
                    state,
                    stalled,
                    guest_agent: None,
                },
            )
            .map_err(|error| error.to_string())
        };
        assert_eq!(told("Running", None), Ok(()));
        assert_eq!(told("Running", Some(false)), Ok(()));
        let stalled = told("Running", Some(true)).unwrap_err();
        for expected in ["web is stalled", "`runnel ps`", "`runnel kill web`"] {
            assert!(stalled.contains(expected), "{stalled}");
        }
        let paused = told("Paused", None).unwrap_err();
        assert!(paused.contains("`runnel unpause web`"), "{paused}");
    }
}
