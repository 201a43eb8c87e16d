//! `runnel`: the operator's tool.
//!
//! It starts monitors and talks to them over their API sockets, serves and reads images through the agent's and the
//! image format's libraries, and keeps what runs in a folder of its own. It holds no state between commands but that
//! folder, needs no daemon, and never touches guest memory.

// It panics where standard error takes nothing, and `output::tell` does not.
#![warn(clippy::print_stderr)]

mod api;
mod boot;
mod cli;
mod commands;
mod console;
mod drives;
mod ending;
mod exit;
mod fault;
mod foreground;
mod held;
mod images;
mod monitor;
mod operation;
mod output;
mod process;
mod program;
mod progress;
mod remote;
mod signals;
mod size;
mod stall;
mod state;
mod table;
mod taps;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use images::StoreError;
use runnel_snapshot::causes::with_causes;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let level = if cli.verbose {
        LevelFilter::DEBUG
    } else {
        LevelFilter::WARN
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        // Told with `eprintln!`, too.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .init();
    match cli.command.run() {
        Ok(exit) => exit.into(),
        // Whoever reads the output has seen enough, as with `runnel ps | head -1`.
        Err(error) if output::is_closed(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            output::tell(format_args!("runnel: {}", with_causes(error.as_ref())));
            ExitCode::from(if is_usage(error.as_ref()) {
                exit::USAGE
            } else {
                exit::FAILED
            })
        }
    }
}

/// Whether a name that was typed cannot be one, whatever became of the command for it.
fn is_usage(error: &(dyn std::error::Error + 'static)) -> bool {
    let is_usage = |error: &(dyn std::error::Error + 'static)| {
        let error = error.downcast_ref();
        error.is_some_and(StoreError::is_usage)
    };
    std::iter::successors(Some(error), |error| error.source()).any(is_usage)
}
