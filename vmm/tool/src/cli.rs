//! The command line.

use clap::{Parser, Subcommand};

use crate::commands::{
    Failure, agent, console, doctor, fork, image, inspect, logs, ps, resume, run, serve, shell, snapshot,
    stop, vcpus, verify, wait,
};
use crate::exit::{EXIT_CODES, Exit};

const EXAMPLES: &str = "\
Examples:
    runnel doctor                                     what this host has and lacks
    runnel run --kernel vmlinuz --initrd initrd.img --memory 512M --name web
    runnel snapshot web web-v1                        save it, while it runs, as an image
    runnel fork web-v1 -n 10                          ten machines of it, which share what they do not write
    runnel serve web-v1                               let other hosts pull it
    runnel resume http://10.0.0.1:5000/web-v1         run it here, before it has arrived
";

const ENVIRONMENT: &str = "\
Environment:
    RUNNEL_IMAGES       the local store of images, an absolute path (`runnel image --help`)
    RUNNEL_VMM          the monitor; else runnel-vmm beside this program, else in PATH
    REGISTRY_AUTH_FILE  passwords and tokens of registries (`runnel agent --help`)
    XDG_RUNTIME_DIR     what runs is remembered below it, in runnel: it must be yours, and nobody else's to write; root
                        without it uses /run/runnel
";

/// Runs microVMs that can be saved, streamed and resumed elsewhere.
#[derive(Debug, Parser)]
#[command(name = "runnel", version, after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n{ENVIRONMENT}\n{EXIT_CODES}"))]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Say more about what is done, on standard error; monitors and agents that are started say more in their logs.
    #[arg(long, short, global = true)]
    pub(crate) verbose: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(run::RunArgs),
    Resume(resume::ResumeArgs),
    Fork(fork::ForkArgs),
    Ps(ps::PsArgs),
    Console(console::ConsoleArgs),
    Logs(logs::LogsArgs),
    Pause(vcpus::PauseArgs),
    Unpause(vcpus::UnpauseArgs),
    Snapshot(snapshot::SnapshotArgs),
    Wait(wait::WaitArgs),
    Stop(stop::StopArgs),
    Kill(stop::KillArgs),
    Serve(serve::ServeArgs),
    Agent(agent::AgentArgs),
    Inspect(inspect::InspectArgs),
    Verify(verify::VerifyArgs),
    Image(image::ImageArgs),
    Doctor(doctor::DoctorArgs),
    Completions(shell::CompletionsArgs),
    Man(shell::ManArgs),
}

impl Command {
    /// Does it.
    pub(crate) fn run(&self) -> Result<Exit, Failure> {
        match self {
            Self::Run(args) => run::run(args),
            Self::Resume(args) => resume::run(args),
            Self::Fork(args) => fork::run(args),
            Self::Ps(args) => ps::run(args),
            Self::Console(args) => console::run(args),
            Self::Logs(args) => logs::run(args),
            Self::Pause(args) => vcpus::pause(args),
            Self::Unpause(args) => vcpus::unpause(args),
            Self::Snapshot(args) => snapshot::run(args),
            Self::Wait(args) => wait::run(args),
            Self::Stop(args) => stop::stop(args),
            Self::Kill(args) => stop::kill(args),
            Self::Serve(args) => serve::run(args),
            Self::Agent(args) => agent::run(args),
            Self::Inspect(args) => inspect::run(args),
            Self::Verify(args) => verify::run(args),
            Self::Image(args) => image::run(args),
            Self::Doctor(args) => doctor::run(args),
            Self::Completions(args) => shell::completions(args),
            Self::Man(args) => shell::man(args),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_says_what_it_does_and_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} has no description");
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains(&format!("runnel {name}")),
                "{name} has no example: {help:?}"
            );
        }
    }

    #[test]
    fn every_exit_code_is_documented() {
        for code in ["0", "1", "2", "3", "130"] {
            let documented = EXIT_CODES
                .lines()
                .any(|line| line.split_whitespace().next() == Some(code));
            assert!(documented, "{code}");
        }
    }
}
