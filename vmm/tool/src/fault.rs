//! What the monitor says of a refused request, in the words of whoever typed a command.
//!
//! The monitor speaks of its API's fields and paths. The tool has flags and commands for them; this is the one place
//! that knows which.

/// The API's words, and the tool's.
const WORDS: [(&str, &str); 10] = [
    // What to give comes with how it is written.
    ("with `drive_overrides`", "with `--drive ID=PATH`"),
    ("with `network_overrides`", "with `--tap ID=TAP`"),
    ("`drive_overrides`", "`--drive`"),
    ("`network_overrides`", "`--tap`"),
    ("`excluded_drives`", "`--exclude`"),
    ("`overlay_directory`", "`--overlay-directory`"),
    ("`guest_hook`", "`--guest-hook`"),
    ("PUT /guest-channel", "`runnel run --guest-channel`"),
    ("Invalid host_dev_name", "Invalid tap"),
    ("GET / no longer says so", "`runnel ps` no longer says so"),
];

/// What comes before a reason and tells nobody more: that the reason is not the client's, or that the tool's own JSON
/// carried it.
const PREFIXES: [&str; 2] = [
    "Internal VMM error: ",
    "An error occurred when deserializing the json body of a request: ",
];

/// A `fault_message` as the tool tells it: without a full stop, since more may follow.
pub(crate) fn reworded(fault: &str) -> String {
    let stripped = PREFIXES.iter().find_map(|prefix| fault.strip_prefix(prefix));
    let start = without_repetition(without_position(stripped.unwrap_or(fault).trim_end_matches('.')));
    WORDS
        .iter()
        .fold(start, |text, (api, tool)| text.replace(api, tool))
}

/// Whether a request failed for want of a chunk of the image that a machine came from.
pub(crate) fn is_of_a_chunk(fault: &str) -> bool {
    // That it is stalled is said with what to do.
    let is_it = |cause: &str| {
        let rest = cause.strip_prefix("chunk ");
        rest.is_some_and(|rest| rest.ends_with(" cannot be had") && !rest.contains('('))
    };
    fault.split(": ").any(is_it)
}

/// A reason and its causes, none of which only begins again what the one before it said, as in «chunk 7 of memory cannot be
/// had: chunk 7 of memory: …».
fn without_repetition(reason: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for cause in reason.split(": ") {
        let last = kept.last().and_then(|last| last.strip_prefix(cause));
        if !last.is_some_and(|rest| rest.starts_with(' ')) {
            kept.push(cause);
        }
    }
    kept.join(": ")
}

/// A reason without the place in the JSON, which the tool has written itself.
fn without_position(reason: &str) -> &str {
    match reason.rsplit_once(" at line ") {
        Some((what, place))
            if place.starts_with(|c: char| c.is_ascii_digit()) && place.contains(" column ") =>
        {
            what
        }
        _ => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_that_is_missing_is_told_from_a_machine_that_is_stalled_already() {
        let missing = "reading volume memory failed: chunk 7 of memory cannot be had: blob sha256:00 cannot be had: away";
        assert!(is_of_a_chunk(missing));
        for other in [
            "the machine is stalled: chunk 7 of memory is missing (blob sha256:00 cannot be had: away); try again",
            "blob sha256:00 cannot be had: away",
        ] {
            assert!(!is_of_a_chunk(other), "{other}");
        }
    }

    #[test]
    fn fields_become_flags_and_reasons_are_not_called_internal() {
        for (fault, told) in [
            (
                "Load snapshot error: drive data is not in the image: supply it with `drive_overrides`",
                "Load snapshot error: drive data is not in the image: supply it with `--drive ID=PATH`",
            ),
            (
                "Internal VMM error: the machine is stalled: chunk 7 of memory is missing (away); try again when GET / no longer says so",
                "the machine is stalled: chunk 7 of memory is missing (away); try again when `runnel ps` no longer says so",
            ),
            (
                "An error occurred when deserializing the json body of a request: invalid type: string \"2\", expected u8 at line 1 column 18.",
                "invalid type: string \"2\", expected u8",
            ),
            (
                "Create snapshot error: chunk 7 of memory cannot be had: chunk 7 of memory: cannot connect to http://h: refused",
                "Create snapshot error: chunk 7 of memory cannot be had: cannot connect to http://h: refused",
            ),
            (
                "`network_overrides` names eth0 twice.",
                "`--tap` names eth0 twice",
            ),
        ] {
            assert_eq!(reworded(fault), told);
        }
    }
}
