//! `runnel doctor`: what this host has and lacks for running machines, and what to do about it.
//!
//! Each check looks at one thing and says what it found; none changes anything.

mod host;
mod kvm;
mod userfaultfd;

use clap::Args;
use serde::Serialize;

use super::Failure;
use crate::exit::Exit;
use crate::output::{OutputArgs, print, print_json};

/// Look at what this host has and lacks for running machines
#[derive(Debug, Args)]
#[command(after_help = "\
Ends with 3 if something is missing that Runnel cannot do without.

Examples:
    runnel doctor
    runnel doctor --json | jq -r '.[] | select(.verdict != \"ok\") | .advice'")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    output: OutputArgs,
}

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Runnel works, and something of it does not, or not well.
    Warning,
    /// No machine runs.
    Missing,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    check: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it; nothing, where all is well.
    advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Warning,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn missing(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Missing,
            ..Self::warning(check, found, advice)
        }
    }

    fn describe(&self) -> String {
        let mark = match self.verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Missing => "MISSING",
        };
        let mut text = format!("{mark}  {:<12}  {}\n", self.check, self.found);
        if let Some(advice) = &self.advice {
            text.push_str(&format!("{:23}→ {advice}\n", ""));
        }
        text
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Failure> {
    let findings = examine();
    match args.output.json {
        true => print_json(&findings)?,
        false => print(&findings.iter().map(Finding::describe).collect::<String>())?,
    }
    let is_missing = |finding: &Finding| finding.verdict == Verdict::Missing;
    Ok(if findings.iter().any(is_missing) {
        Exit::Unsound
    } else {
        Exit::Done
    })
}

fn examine() -> Vec<Finding> {
    let mut findings = vec![host::kernel()];
    findings.extend(kvm::examine());
    findings.push(userfaultfd::examine());
    findings.push(host::tun());
    findings.push(host::programs());
    findings.push(host::state_folder());
    findings.push(host::agent());
    findings.push(host::memory());
    findings.push(host::tmpfs());
    findings.push(host::image_store());
    findings.push(host::overlays());
    findings.push(host::huge_pages());
    findings.push(host::open_files());
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_that_is_not_well_says_what_to_do() {
        let findings = examine();
        assert!(findings.len() >= 13);
        for finding in findings {
            assert!(!finding.found.is_empty(), "{finding:?}");
            assert_eq!(
                finding.advice.is_none(),
                finding.verdict == Verdict::Ok,
                "{finding:?}"
            );
            assert!(finding.describe().ends_with('\n'));
        }
    }

    #[test]
    fn advice_stands_below_what_was_found() {
        let text = Finding::missing("kvm", "no /dev/kvm", "load the module").describe();
        assert_eq!(
            text,
            "MISSING  kvm           no /dev/kvm\n                       → load the module\n"
        );
    }
}
