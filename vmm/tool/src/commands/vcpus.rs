//! `runnel pause` and `runnel unpause`.

use clap::Args;
use serde_json::json;

use super::Failure;
use crate::api::Api;
use crate::exit::Exit;
use crate::output::{print, tell};
use crate::state::{MachineName, StateFolder};

/// Let a machine stand still
#[derive(Debug, Args)]
#[command(after_help = "\
Its memory stays where it is; its clock stands still, too.

Examples:
    runnel pause web")]
pub(crate) struct PauseArgs {
    /// The machine
    machine: MachineName,
}

/// Let a paused machine run on
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n    runnel unpause web")]
pub(crate) struct UnpauseArgs {
    /// The machine
    machine: MachineName,
}

pub(crate) fn pause(args: &PauseArgs) -> Result<Exit, Failure> {
    set(&args.machine, "Paused", "is paused")
}

pub(crate) fn unpause(args: &UnpauseArgs) -> Result<Exit, Failure> {
    set(&args.machine, "Resumed", "runs")
}

fn set(machine: &MachineName, state: &str, told: &str) -> Result<Exit, Failure> {
    let machine = StateFolder::open()?.machine(machine)?;
    let api = Api::new(&machine.folder.api_socket());
    if api.is_saving_or_loading() {
        tell(format_args!(
            "{} is being saved or loaded: this comes after it (Ctrl-C gives up waiting)",
            machine.folder.name
        ));
    }
    api.patch("/vm", &json!({ "state": state }))?;
    let name = &machine.folder.name;
    let is_stalled = state == "Resumed" && api.instance_info().is_ok_and(|info| info.stalled.is_some());
    print(&match is_stalled {
        true => format!("{name} runs as soon as what it waits for is here: `runnel ps` says what\n"),
        false => format!("{name} {told}\n"),
    })?;
    Ok(Exit::Done)
}
