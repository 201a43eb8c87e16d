//! Every reader fed with what is kept for it: valid inputs, and what fuzzing found worth keeping.

#![allow(clippy::unwrap_used)] // An assertion, in helpers of tests as in tests.

use std::fs;
use std::path::PathBuf;

use runnel_readers::{READERS, seeds};

/// `tests/fuzz/corpus/<reader>`.
fn corpus(name: &str) -> Vec<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn every_reader_accepts_the_seeds_that_are_made_for_it() {
    for (name, read) in READERS {
        for (seed, number) in seeds::of(name).iter().zip(0..) {
            assert!(
                read(seed),
                "{name} refuses seed {number}: {}",
                String::from_utf8_lossy(seed)
            );
        }
    }
}

#[test]
fn no_reader_breaks_a_rule_over_the_corpus_that_is_kept() {
    for (name, read) in READERS {
        for path in corpus(name) {
            // A panic names the test alone.
            println!("{}", path.display());
            let _ = read(&fs::read(&path).unwrap());
        }
    }
}

#[test]
fn every_corpus_is_a_readers() {
    let corpora = fs::read_dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus")).unwrap();
    let mut corpora: Vec<_> = corpora.map(|entry| entry.unwrap().file_name()).collect();
    corpora.sort();
    assert_eq!(corpora, READERS.map(|(name, _)| name));
}
