//! The command line: Firecracker's flags.

use std::path::PathBuf;

use clap::{ArgAction, Parser};

use crate::api::BODY_BYTES_MAX;
use crate::config::{InstanceId, LoggerBody};
use crate::version::LONG_VERSION;

const EXIT_CODES: &str = "\
Exit codes:
    0  the guest switched itself off or asked for a reset, or the monitor was asked to end
       (SIGTERM, SIGINT, SIGHUP)
    1  something failed; the log says what
    2  a bug in the monitor
    3  the guest ended in a triple fault
    4  KVM could not go on with a vCPU
  152  the configuration file cannot be had as it stands
  153  the command line cannot be understood
A second SIGTERM, SIGINT or SIGHUP ends the monitor at once, with 128 and the signal's number.";

/// Runs one microVM, and serves Firecracker's API for it on a unix socket.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "runnel-vmm",
    display_name = "Firecracker",
    version = LONG_VERSION,
    disable_version_flag = true,
    after_help = EXIT_CODES,
)]
pub struct Cli {
    /// Unix socket at which the API is served. One left behind by a monitor that was killed is replaced.
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,

    /// JSON file that describes the whole machine, which is then started at once.
    #[arg(long, value_name = "PATH")]
    pub config_file: Option<PathBuf>,

    /// Serve no API.
    #[arg(long, requires = "config_file")]
    pub no_api: bool,

    /// The machine's name: 1 to 64 letters, digits and hyphens.
    #[arg(long, value_name = "ID", default_value = InstanceId::DEFAULT)]
    pub id: InstanceId,

    /// File or named pipe that gets the log. Without it, warnings and errors go to standard error.
    #[arg(long, value_name = "PATH")]
    pub log_path: Option<PathBuf>,

    /// Least important lines that are logged: Off, Error, Warning, Info, Debug or Trace.
    #[arg(long, value_name = "LEVEL")]
    pub level: Option<String>,

    /// Log lines of this module alone.
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,

    /// Show the level of each line.
    #[arg(long)]
    pub show_level: bool,

    /// Show the file and line that each line comes from.
    #[arg(long)]
    pub show_log_origin: bool,

    /// Give the guest a device by which it says that it has booted; how long that took is logged.
    #[arg(long)]
    pub boot_timer: bool,

    /// Bytes of a request's body that the API takes.
    #[arg(long, value_name = "BYTES", default_value_t = BODY_BYTES_MAX)]
    pub http_api_max_payload_size: usize,

    /// End when standard input is hung up, unless a machine was started or loaded by then: whoever starts the monitor
    /// holds the other end, and it does not stay behind should he die.
    #[arg(long)]
    pub lifeline: bool,

    /// Print what this host's KVM offers machines, as JSON, and run none.
    #[arg(long, exclusive = true)]
    pub describe_host: bool,

    /// Accepted, since Firecracker's users give it: this version has no seccomp filters.
    #[arg(long, hide = true)]
    pub no_seccomp: bool,

    /// Print Firecracker's version whose API is spoken, and Runnel's own.
    #[arg(long, short = 'V', action = ArgAction::Version)]
    version: Option<bool>,
}

impl Cli {
    /// What the flags say of the log, if they say anything.
    #[must_use]
    pub fn logger(&self) -> Option<LoggerBody> {
        let body = LoggerBody {
            log_path: self.log_path.clone(),
            level: self.level.clone(),
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        };
        (body != LoggerBody::default()).then_some(body)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;
    use crate::exit::ExitCode;

    fn parse(arguments: &[&str]) -> Result<Cli, ErrorKind> {
        Cli::try_parse_from([&["runnel-vmm"], arguments].concat()).map_err(|error| error.kind())
    }

    #[test]
    fn the_version_begins_as_firecrackers_clients_expect_and_names_runnel_after_it() {
        let printed = Cli::command().render_version();
        let mut lines = printed.lines();
        assert_eq!(lines.next(), Some("Firecracker v1.17.0"));
        assert_eq!(lines.nth(1), Some(concat!("Runnel v", env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn firecrackers_flags_are_understood() {
        let cli = parse(&[
            "--api-sock",
            "/tmp/s",
            "--config-file",
            "c",
            "--no-api",
            "--id",
            "a-1",
            "--log-path",
            "l",
            "--level",
            "Debug",
            "--module",
            "m",
            "--show-level",
            "--show-log-origin",
            "--boot-timer",
            "--no-seccomp",
            "--http-api-max-payload-size",
            "100",
        ])
        .unwrap();
        assert_eq!(cli.api_sock, PathBuf::from("/tmp/s"));
        assert_eq!(cli.id.as_str(), "a-1");
        assert_eq!(cli.http_api_max_payload_size, 100);
        assert_eq!(cli.logger().unwrap().level.as_deref(), Some("Debug"));
        assert_eq!(parse(&["--version"]).unwrap_err(), ErrorKind::DisplayVersion);
        assert_eq!(parse(&["--help"]).unwrap_err(), ErrorKind::DisplayHelp);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(
            parse(&["--no-api"]).unwrap_err(),
            ErrorKind::MissingRequiredArgument
        );
        assert_eq!(parse(&["--id", "a_b"]).unwrap_err(), ErrorKind::ValueValidation);
        assert_eq!(parse(&["--enable-pci"]).unwrap_err(), ErrorKind::UnknownArgument);
        assert!(parse(&[]).unwrap().logger().is_none());
    }

    #[test]
    fn every_exit_code_is_documented() {
        let help = Cli::command().render_help().to_string();
        for code in [
            ExitCode::Ok,
            ExitCode::Failure,
            ExitCode::Unexpected,
            ExitCode::TripleFault,
            ExitCode::VcpuFailed,
            ExitCode::BadConfiguration,
            ExitCode::BadArguments,
        ] {
            let number = (code as u8).to_string();
            assert!(
                help.lines()
                    .any(|line| line.split_whitespace().next() == Some(&number)),
                "{number}: {help}"
            );
        }
    }
}
