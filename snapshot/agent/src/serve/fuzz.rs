//! What is read of a request, for whoever feeds it strange bytes: the readers, and what must hold of all they accept.

use runnel_snapshot::image::reference::{is_name, is_tag};

use super::access::Token;
use super::page::Page;
use super::range::{self, Asked};
use super::route::{self, Reference, Route};

/// Reads the path of a request. Whether it leads anywhere.
///
/// # Panics
/// When it leads out of its directory.
#[must_use]
pub fn reads_path(path: &str) -> bool {
    let Ok(route) = route::parse(path) else {
        return false;
    };
    let name = match &route {
        Route::Version | Route::Catalog => return true,
        Route::Manifest { name, reference } => {
            if let Reference::Tag(tag) = reference {
                assert!(is_tag(tag), "{path}: {tag:?}");
            }
            name
        }
        Route::Blob { name, .. } | Route::Tags { name } => name,
    };
    assert!(is_name(name), "{path}: {name:?}");
    assert!(
        !name
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == ".."),
        "{path}: {name:?} leaves its directory"
    );
    true
}

/// Reads a `Range` of something of so many bytes. Whether it asks for a part.
///
/// # Panics
/// When the part does not lie in it.
#[must_use]
pub fn reads_range(header: &[u8], bytes: u64) -> bool {
    match range::parse(Some(header), bytes) {
        Asked::Whole | Asked::Beyond => false,
        Asked::Part(part) => {
            assert!(part.len > 0 && part.fits_in(bytes), "{part} of {bytes}");
            true
        }
    }
}

/// Reads a query for a page of `list`, which is sorted, and turns all pages from there on. Whether it asks for one.
///
/// # Panics
/// When the pages do not lead to the end of the list, each name once.
#[must_use]
pub fn reads_page(query: &str, list: &[&str]) -> bool {
    let Ok(mut page) = Page::parse(Some(query)) else {
        return false;
    };
    let mut seen = Vec::new();
    for _ in 0..=list.len() {
        let found = page.of(list.iter().copied());
        seen.extend(found.names);
        let Some(next) = found.next else {
            assert!(list.ends_with(&seen), "{query}: {seen:?}");
            return true;
        };
        page = Page::parse(Some(&next)).expect("a server understands its own links");
    }
    panic!("{query}: its pages have no end");
}

/// Reads an `Authorization`. Whether `token` is in it.
///
/// # Panics
/// When the token is none.
#[must_use]
pub fn admits(token: &str, header: &[u8]) -> bool {
    Token::new(token).expect("it is a token").admits(Some(header))
}
