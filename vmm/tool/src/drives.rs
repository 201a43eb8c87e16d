//! Files behind drives of which a guest would not see the end: whoever made one should hear of it, and not only a log.

use std::path::Path;

use runnel_snapshot::shell::shell_word;

/// What a drive counts in (virtio 1.2 §5.2.4).
const SECTOR_BYTES: u64 = 512;

/// Warns of the files that do not end with a whole sector.
pub(crate) fn warn_of_rests<'p>(files: impl Iterator<Item = &'p str>) {
    for file in files {
        if let Some(warning) = warning(Path::new(file)) {
            tracing::warn!("{warning}");
        }
    }
}

fn warning(path: &Path) -> Option<String> {
    // Block devices, whose length this is not, consist of sectors; what is not there the monitor refuses.
    let bytes = path.metadata().ok().filter(|about| about.is_file())?.len();
    let rest = bytes % SECTOR_BYTES;
    (rest != 0).then(|| {
        format!(
            "{} has {bytes} bytes, and its last {rest} are not a whole sector of {SECTOR_BYTES}: the guest does not see them \
             (`truncate -s %{SECTOR_BYTES} {}` fills it up)",
            path.display(),
            shell_word(path)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_warned_of_and_whole_sectors_and_what_is_no_file_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("my disk");
        std::fs::write(&file, [0; 1000]).unwrap();
        let told = warning(&file).unwrap();
        assert!(told.contains("its last 488"), "{told}");
        let advice = format!("`truncate -s %512 '{}'`", file.display());
        assert!(told.contains(&advice), "{told}");
        std::fs::write(&file, [0; 1024]).unwrap();
        assert_eq!(warning(&file), None);
        assert_eq!(warning(folder.path()), None);
        assert_eq!(warning(&folder.path().join("none")), None);
    }
}
