//! `runnel-agent`: the network side of a host's machines, as a process of its own. See [`runnel_agent::agent`].

#![warn(clippy::print_stderr)]

use std::fs::DirBuilder;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::process::ExitCode;

use clap::Parser;
use runnel_agent::agent::Agent;
use runnel_agent::cli::{AgentArguments, tidy_up};
use runnel_snapshot::causes::with_causes;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::filter::LevelFilter;

/// Fetches, verifies and keeps chunks of images for the machines of this host
#[derive(Parser)]
#[command(name = "runnel-agent", version)]
struct Arguments {
    #[command(flatten)]
    agent: AgentArguments,

    /// What to log: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: LevelFilter,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_max_level(arguments.log_level)
        .with_writer(std::io::stderr)
        // Told with `eprintln!`, which panics where standard error takes nothing.
        .log_internal_errors(false)
        .with_target(false)
        .init();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("runnel-agent: {}\n", with_causes(error.as_ref()));
            // Where standard error takes nothing, the exit code is all that is left to tell.
            let _ = std::io::stderr().write_all(text.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let settings = arguments.agent.settings()?;
    // Of the default socket: the folder of one that was named is there.
    if let Some(folder) = settings
        .socket
        .parent()
        .filter(|_| arguments.agent.socket.is_none())
    {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let (mut terminate, mut interrupt) = {
        let _entered = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    let (socket, drive_folder) = (settings.socket.clone(), settings.drive_folder.clone());
    let agent = Agent::start(settings)?;
    tracing::info!(socket = %socket.display(), "listening");
    runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    tracing::info!("ending");
    agent.stop_soon()?;
    tidy_up(&drive_folder);
    Ok(())
}
