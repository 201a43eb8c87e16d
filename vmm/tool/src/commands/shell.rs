//! `runnel completions` and `runnel man`: what shells and `man` know of the tool.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Failure;
use crate::cli::Cli;
use crate::exit::Exit;
use crate::output::print;

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
    runnel completions bash > /etc/bash_completion.d/runnel
    runnel completions zsh > ~/.zfunc/_runnel
    runnel completions fish > ~/.config/fish/completions/runnel.fish")]
pub(crate) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

/// Write manual pages
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
    mkdir -p ~/.local/share/man/man1 && runnel man ~/.local/share/man/man1
    man runnel-resume")]
pub(crate) struct ManArgs {
    /// The folder that gets a page for each command, runnel.1, runnel-run.1 and so on; it must be there
    folder: PathBuf,
}

/// A page could not be written.
#[derive(Debug, thiserror::Error)]
#[error("writing {path} failed: its folder must be there, and be yours to write", path = path.display())]
struct WriteError {
    path: PathBuf,
    source: io::Error,
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<Exit, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "runnel", &mut text);
    print(&String::from_utf8(text)?)?;
    Ok(Exit::Done)
}

pub(crate) fn man(args: &ManArgs) -> Result<Exit, Failure> {
    // Fills in the global options.
    let mut root = Cli::command();
    root.build();
    page(&args.folder, "runnel", &root)?;
    // `runnel help` prints what the pages of the others say.
    let is_shown = |command: &&clap::Command| !command.is_hide_set() && command.get_name() != "help";
    for command in root.get_subcommands().filter(is_shown) {
        let name = format!("runnel-{}", command.get_name());
        page(&args.folder, &name, command)?;
        // `runnel image` has commands of its own.
        for inner in command.get_subcommands().filter(is_shown) {
            page(&args.folder, &format!("{name}-{}", inner.get_name()), inner)?;
        }
    }
    Ok(Exit::Done)
}

fn page(folder: &Path, name: &str, command: &clap::Command) -> Result<(), WriteError> {
    let path = folder.join(format!("{name}.1"));
    let mut text = Vec::new();
    let page = clap_mangen::Man::new(command.clone()).title(name.to_owned());
    let written = page.render(&mut text).and_then(|()| fs::write(&path, &text));
    written.map_err(|source| WriteError { path, source })
}
