//! `runnel-vmm`: one process, one machine.
//!
//! Signals are blocked before any thread exists; the API's thread serves from the moment that the socket is there;
//! this thread then runs [`control`](runnel_vmm::control) until the machine ends.

use std::fs;
use std::io::{self, Write as _};
use std::panic;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use runnel_snapshot::causes::with_causes;
use runnel_vmm::api::{ApiServer, ApiSocket, BindError, ServeError};
use runnel_vmm::cli::Cli;
use runnel_vmm::config::{MicrovmConfig, WholeFile, WholeFileError};
use runnel_vmm::control::{
    CannotWait, Control, Fault, Inbox, Request, SignalError, Status, block_signals, run, watch_lifeline,
    watch_signals,
};
use runnel_vmm::engine::KvmEngine;
use runnel_vmm::exit::ExitCode;
use runnel_vmm::kvm;
use runnel_vmm::logger::{self, Logger, LoggerError};
use runnel_vmm::version::{FIRECRACKER_VERSION, RUNNEL_VERSION};
use rustix::fs::Mode;

/// Bytes of a configuration file: far more than 32 vCPUs' worth of devices need.
const CONFIG_FILE_BYTES_MAX: u64 = 1 << 20;

/// Why the monitor cannot run.
#[derive(Debug, thiserror::Error)]
enum MonitorError {
    #[error("the log cannot be had")]
    Logger(#[from] LoggerError),
    #[error("signals cannot be taken")]
    Signals(#[from] SignalError),
    #[error("standard input cannot be watched")]
    Lifeline(#[source] io::Error),
    #[error("there is no event descriptor to be had")]
    Event(#[source] io::Error),
    #[error("cannot read the configuration file {path:?}")]
    ReadConfig { path: PathBuf, source: io::Error },
    #[error("the configuration file {path:?} is larger than {CONFIG_FILE_BYTES_MAX} bytes")]
    LargeConfig { path: PathBuf },
    #[error("the configuration file {path:?} cannot be had as it stands")]
    Config { path: PathBuf, source: WholeFileError },
    #[error("cannot serve the API")]
    Bind(#[from] BindError),
    #[error("cannot serve the API")]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Start(Fault),
    #[error(transparent)]
    Wait(#[from] CannotWait),
}

impl From<&MonitorError> for ExitCode {
    fn from(error: &MonitorError) -> Self {
        match error {
            MonitorError::ReadConfig { .. }
            | MonitorError::LargeConfig { .. }
            | MonitorError::Config { .. } => Self::BadConfiguration,
            _ => Self::Failure,
        }
    }
}

fn main() -> std::process::ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(told) => {
            // Help and the version come this way too. Where nobody reads them, nothing can be done.
            let _ = told.print();
            return if told.use_stderr() {
                ExitCode::BadArguments.into()
            } else {
                ExitCode::Ok.into()
            };
        }
    };
    if cli.describe_host {
        return describe_host();
    }
    let logger = Logger::new(cli.id.clone());
    // A panic unwinds through everything that gives something back: the terminal, the sockets.
    let ended = panic::catch_unwind(panic::AssertUnwindSafe(|| monitor(&cli, &logger)));
    let code = match ended {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            last_words(&logger, &format!("Error: {}", with_causes(&error)));
            ExitCode::from(&error)
        }
        Err(_) => ExitCode::Unexpected,
    };
    tracing::info!("Runnel exiting. exit_code={}", code as u8);
    code.into()
}

fn describe_host() -> std::process::ExitCode {
    let printed = serde_json::to_string(&kvm::describe())
        .map_err(io::Error::from)
        .and_then(|description| writeln!(io::stdout(), "{description}"));
    match printed {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => {
            eprintln!("Error: this host's description cannot be printed: {error}");
            ExitCode::Failure.into()
        }
    }
}

/// Says on standard error why the monitor ends, and in the log, unless that is the same place.
fn last_words(logger: &Logger, words: &str) {
    if !logger.is_on_stderr() {
        tracing::error!("{words}");
    }
    logger::say_last(words);
}

fn monitor(cli: &Cli, logger: &Logger) -> Result<ExitCode, MonitorError> {
    // Whatever the monitor makes (sockets, images, logs) is its owner's alone.
    let strict = Mode::RWXG | Mode::RWXO;
    rustix::process::umask(strict);
    block_signals()?;
    set_up_log(cli, logger)?;
    tracing::info!("Running Runnel v{RUNNEL_VERSION}, with the API of Firecracker v{FIRECRACKER_VERSION}");

    let (config, must_start) = configure(cli, logger)?;
    let status = Status::new(cli.id.clone());
    let inbox = Inbox::new().map_err(MonitorError::Event)?;
    if cli.lifeline {
        // Before anything is made at a path: another monitor may be there by the time.
        watch_lifeline(Arc::clone(&inbox), Arc::clone(&status)).map_err(MonitorError::Lifeline)?;
    }
    let server = serve(cli, &inbox, &status)?;
    let socket = server.is_some().then(|| cli.api_sock.clone());
    watch_signals(Arc::clone(&inbox), Arc::clone(&status), move || {
        // The process ends without unwinding; the next monitor would find the socket abandoned, and replace it.
        if let Some(socket) = socket {
            let _ = fs::remove_file(socket);
        }
    })?;

    let logger = logger.clone();
    let set_logger = Box::new(move |body| Ok(logger.update(&body)?));
    let mut control = Control::new(
        KvmEngine {
            machine: cli.id.to_string(),
        },
        inbox,
        status,
        config,
        set_logger,
    );
    if must_start {
        control
            .handle(Request::InstanceStart)
            .map_err(MonitorError::Start)?;
        tracing::info!("Successfully started microvm that was configured from one single json");
    }
    let code = run(&mut control)?;
    // Answers leave before the machine is taken apart, which takes a while if it is stalled.
    if let Some(server) = server {
        server.stop();
    }
    Ok(code)
}

fn set_up_log(cli: &Cli, logger: &Logger) -> Result<(), MonitorError> {
    logger.install()?;
    if let Some(body) = cli.logger() {
        logger.update(&body)?;
    }
    let logger = logger.clone();
    panic::set_hook(Box::new(move |info| {
        last_words(&logger, &format!("Runnel {info}"))
    }));
    Ok(())
}

/// The machine of `--config-file`, and whether there is one to start.
fn configure(cli: &Cli, logger: &Logger) -> Result<(MicrovmConfig, bool), MonitorError> {
    let (mut config, must_start) = match &cli.config_file {
        Some(path) => (configure_from(path, logger)?, true),
        None => (MicrovmConfig::default(), false),
    };
    config.boot_timer = cli.boot_timer;
    Ok((config, must_start))
}

fn configure_from(path: &PathBuf, logger: &Logger) -> Result<MicrovmConfig, MonitorError> {
    let refused = |source| MonitorError::Config {
        path: path.clone(),
        source,
    };
    let file = WholeFile::parse(&read_config(path)?).map_err(refused)?;
    if let Some(body) = &file.logger {
        logger.update(body)?;
    }
    for name in file.unknown_parts() {
        tracing::warn!("{path:?} has a part {name:?} that nobody knows; it is ignored");
    }
    file.into_config().map_err(refused)
}

fn read_config(path: &PathBuf) -> Result<String, MonitorError> {
    let failed = |source| MonitorError::ReadConfig {
        path: path.clone(),
        source,
    };
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, CONFIG_FILE_BYTES_MAX + 1), &mut text)
        .map_err(failed)?;
    if text.len() as u64 > CONFIG_FILE_BYTES_MAX {
        return Err(MonitorError::LargeConfig { path: path.clone() });
    }
    Ok(text)
}

fn serve(cli: &Cli, inbox: &Arc<Inbox>, status: &Arc<Status>) -> Result<Option<ApiServer>, MonitorError> {
    if cli.no_api {
        return Ok(None);
    }
    let socket = ApiSocket::bind(&cli.api_sock)?;
    tracing::info!("Listening on API socket ({:?}).", cli.api_sock);
    let body_bytes_max = cli.http_api_max_payload_size;
    Ok(Some(ApiServer::start(
        socket,
        Arc::clone(inbox),
        Arc::clone(status),
        body_bytes_max,
    )?))
}
