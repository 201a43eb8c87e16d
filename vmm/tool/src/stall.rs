//! What is said of a machine that waits for a chunk which cannot be had: for which, why, and what ends the wait.

use runnel_snapshot::image::reference::ImageReference;

use crate::api::Stalled;
use crate::table::one_line;

/// The longest reason that is shown. An agent sends no longer one.
const REASON_CHARS_MAX: usize = 4096;

/// The longest name of a volume that is shown.
const VOLUME_CHARS_MAX: usize = 80;

/// How the monitor ends a reason which says what to do itself: a file system is full.
const ROOM: &str = ": make room in ";

/// What mostly has to happen before an image of another host can be read again.
const SERVER: &str = ", as when its server is back";

/// What it waits for, and the whole reason why that is not here.
pub(crate) fn cause(stalled: &Stalled) -> String {
    format!(
        "chunk {} of {}: {}",
        stalled.chunk,
        one_line(&stalled.volume, VOLUME_CHARS_MAX),
        one_line(&stalled.reason, REASON_CHARS_MAX)
    )
}

/// What lets the machine `name` go on, which was resumed from `image`.
pub(crate) fn cure(name: &str, image: Option<&str>, stalled: &Stalled) -> String {
    if stalled.reason.contains(ROOM) {
        return format!("{name} goes on by itself once there is room");
    }
    let elsewhere = elsewhere(name, image);
    let server = if elsewhere.is_empty() { "" } else { SERVER };
    match stalled.needs_repair {
        // The same reason will come again and again.
        true => format!(
            "{name} goes on once that is repaired where the image lies (`runnel verify` there names all damage, and the \
             blobs of a sound copy can take the damaged ones' place){elsewhere}; or `runnel kill {name}` ends it"
        ),
        false => format!("{name} goes on by itself once that can be read again{server}{elsewhere}"),
    }
}

/// The other way: an agent reads an image in all places that it was told of, for all machines that run from it.
pub(crate) fn elsewhere(name: &str, image: Option<&str>) -> String {
    match image.and_then(|image| image.parse().ok()) {
        Some(ImageReference::Remote { name: image, .. }) => format!(
            "; or once the same image is resumed from another URL of it (`runnel resume \
             http://OTHER/{image}`), since its agent reads there for {name} too"
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stalled(reason: &str, needs_repair: bool) -> Stalled {
        Stalled {
            volume: "memory".into(),
            chunk: 12,
            reason: reason.into(),
            waiting_ms: 9000,
            needs_repair,
        }
    }

    #[test]
    fn a_long_reason_is_said_to_its_end_and_in_one_line() {
        let reason = format!("{}: connection refused\x1b[2J", "x".repeat(1000));
        let told = cause(&stalled(&reason, false));
        assert!(told.starts_with("chunk 12 of memory: x"), "{told}");
        assert!(told.ends_with(": connection refused [2J"), "{told}");
    }

    #[test]
    fn what_ends_a_wait_depends_on_where_the_image_is_and_what_is_wrong() {
        let url = Some(
            "http://10.0.0.1:5000/team/web@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        );
        for (image, reason, needs_repair, expected, others) in [
            (
                url,
                "refused",
                false,
                ["its server is back", "`runnel resume http://OTHER/team/web`"],
                "kill",
            ),
            (
                url,
                "damaged",
                true,
                ["`runnel verify`", "`runnel resume http://OTHER/team/web`"],
                "server is back",
            ),
            (
                Some("/images/web"),
                "damaged",
                true,
                ["`runnel verify`", "`runnel kill m`"],
                "OTHER",
            ),
            (
                Some("/images/web"),
                "is gone",
                false,
                ["by itself", "can be read again"],
                "OTHER",
            ),
            (
                url,
                "full: make room in /tmp",
                false,
                ["by itself", "there is room"],
                "OTHER",
            ),
        ] {
            let told = cure("m", image, &stalled(reason, needs_repair));
            for expected in expected {
                assert!(told.contains(expected), "{told}");
            }
            assert!(!told.contains(others), "{told}");
        }
    }
}
