//! What people and manifests name things by.

use runnel_snapshot::digest::{BlobDigest, ChunkDigest};
use runnel_snapshot::image::reference::{ImageReference, Wanted, is_name, is_tag, without_secret};
use runnel_snapshot::volume::VolumeName;
use runnel_vmm::config::{InstanceId, MacAddress, ResourceId};

use crate::input::text;

/// References of images, volumes, digests, identifiers: what is accepted survives its text.
pub fn names(bytes: &[u8]) -> bool {
    let text = text(bytes);
    let told = without_secret(text);
    assert!(told.len() <= text.len() + '…'.len_utf8(), "{told:?}");
    let mut accepted = reference(text);
    if let Ok(volume) = text.parse::<VolumeName>() {
        assert_eq!(volume.to_string(), text);
        accepted = true;
    }
    if let Ok(digest) = text.parse::<BlobDigest>() {
        assert_eq!(digest.to_string(), text);
        assert!(digest.hex().bytes().all(|c| c.is_ascii_hexdigit()));
        accepted = true;
    }
    if let Ok(digest) = text.parse::<ChunkDigest>() {
        assert_eq!(digest.to_string(), text);
        accepted = true;
    }
    if let Ok(id) = text.parse::<ResourceId>() {
        assert_eq!(id.as_str(), text);
        assert!(
            !text.contains(['/', '.', '\0']),
            "an identifier becomes part of a path"
        );
        accepted = true;
    }
    if let Ok(id) = text.parse::<InstanceId>() {
        assert_eq!(id.to_string(), text);
        accepted = true;
    }
    if let Ok(mac) = text.parse::<MacAddress>() {
        assert_eq!(mac.to_string().parse::<MacAddress>().ok(), Some(mac));
        accepted = true;
    }
    accepted
}

fn reference(text: &str) -> bool {
    let Ok(reference) = text.parse::<ImageReference>() else {
        return false;
    };
    let again = reference.to_string().parse::<ImageReference>();
    assert_eq!(again.expect("what is shown can be read"), reference);
    if let ImageReference::Remote { base, name, wanted } = &reference {
        assert!(is_name(name), "{name:?}");
        assert!(!base.contains('@'), "no password is kept in a reference");
        if let Wanted::Named(tag) = wanted {
            assert!(is_tag(tag), "{tag:?}");
        }
    }
    true
}
