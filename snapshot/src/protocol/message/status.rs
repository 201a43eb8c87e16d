//! What an agent says of itself: its images, and what they cost.

use serde::{Deserialize, Serialize};

use super::MESSAGE_BYTES_MAX;
use super::bytes::REASON_BYTES_MAX;
use crate::digest::BlobDigest;
use crate::volume::VolumeName;

/// What an agent has open, and what it cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent's process.
    pub process: u32,
    /// Its images.
    pub images: Vec<ImageStatus>,
    /// What their page files take, and may.
    #[serde(default)]
    pub cache: CacheStatus,
}

/// What an agent's page files take, and may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Those of memory.
    pub memory: PoolStatus,
    /// Those of drives.
    pub drives: PoolStatus,
}

/// Page files of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes that they may take.
    pub bytes_max: u64,
    /// Bytes that were taken out of them to make room, since the agent started.
    pub bytes_evicted: u64,
}

/// One of an agent's images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// Where it is read, or was last.
    pub image: String,
    /// The manifest's digest.
    pub digest: BlobDigest,
    /// Machines that are connected.
    pub machines: u64,
    /// Bytes that came over the network for it: manifest, state, index and chunks, with HTTP's heads and TLS's records.
    pub bytes_received: u64,
    /// Bytes that went out for it.
    pub bytes_sent: u64,
    /// Bytes that its page files take, but for those that are somebody else's.
    #[serde(default)]
    pub bytes_kept: u64,
    /// The volumes whose page files are somebody else's: the memory of a machine that the image was made of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopted: Vec<AdoptedVolume>,
    /// Chunks that were copied from page files of other images, and not fetched.
    #[serde(default)]
    pub chunks_copied: u64,
    /// Bytes, as the image stores them, that were not fetched for these.
    #[serde(default)]
    pub bytes_saved: u64,
    /// Each place in which the last read of it failed, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// What of it the agent cannot keep: volume, folder and reason of each. A full file system, most often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unkept: Option<String>,
}

/// A volume whose page file was handed over, and is not the agent's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedVolume {
    /// Which.
    pub volume: VolumeName,
    /// Bytes that the file takes, for whoever made it and the image's machines together.
    pub bytes: u64,
}

/// The most images that a [`AgentStatus`] tells of: more do not fit into a message.
const STATUS_IMAGES_MAX: usize = 100;

/// The longest name of an image in it.
const IMAGE_BYTES_MAX: usize = 256;

/// So much of an image's trouble is told where many are in trouble.
const TROUBLE_BYTES_MIN: usize = 256;

impl AgentStatus {
    /// The status in bytes, as `to_bytes` makes them of it: as much of it as fits into a message.
    pub(super) fn cut_to_fit(&self, to_bytes: impl Fn(&Self) -> Vec<u8>) -> Vec<u8> {
        let mut status = self.clone();
        status.images.truncate(STATUS_IMAGES_MAX);
        // Whole where there is room, as there is unless many images are in trouble.
        shorten(&mut status.images, REASON_BYTES_MAX);
        let mut bytes = to_bytes(&status);
        if bytes.len() > MESSAGE_BYTES_MAX {
            shorten(&mut status.images, TROUBLE_BYTES_MIN);
            bytes = to_bytes(&status);
        }
        // Texts of odd characters are longer in JSON.
        while bytes.len() > MESSAGE_BYTES_MAX && !status.images.is_empty() {
            status.images.truncate(status.images.len() * 3 / 4);
            bytes = to_bytes(&status);
        }
        bytes
    }
}

/// Cuts what an agent says of its images.
fn shorten(images: &mut [ImageStatus], trouble_bytes_max: usize) {
    let cut = |text: &mut String, bytes_max| text.truncate(text.floor_char_boundary(bytes_max));
    for image in images {
        cut(&mut image.image, IMAGE_BYTES_MAX);
        for text in image.trouble.iter_mut().chain(&mut image.unkept) {
            cut(text, trouble_bytes_max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::FromAgent;
    use super::*;

    #[test]
    fn a_status_of_many_images_with_odd_names_fits_its_cap() {
        let image = ImageStatus {
            image: "\u{1}".repeat(4000),
            digest: BlobDigest::of(b"m"),
            machines: u64::MAX,
            bytes_received: u64::MAX,
            bytes_sent: u64::MAX,
            bytes_kept: u64::MAX,
            adopted: vec![AdoptedVolume {
                volume: VolumeName::Memory,
                bytes: u64::MAX,
            }],
            chunks_copied: u64::MAX,
            bytes_saved: u64::MAX,
            trouble: Some("\"".repeat(4000)),
            unkept: Some("\"".repeat(4000)),
        };
        let status = FromAgent::Status(AgentStatus {
            process: 1,
            images: vec![image; 1000],
            cache: CacheStatus::default(),
        });
        let bytes = status.to_bytes();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        let FromAgent::Status(read) = FromAgent::parse(&bytes).unwrap() else {
            panic!()
        };
        assert!(read.images.len() > 10, "{}", read.images.len());
    }

    #[test]
    fn a_status_of_an_agent_that_knows_less_is_read_and_what_is_not_so_takes_no_room() {
        let digest = BlobDigest::of(b"m");
        let image = format!(
            r#"{{"image":"http://h/web","digest":"{digest}","machines":1,"bytes_received":2,"bytes_sent":3}}"#
        );
        let told = format!(r#"{{"process":7,"images":[{image}]}}"#);
        let read: AgentStatus = serde_json::from_str(&told).unwrap();
        assert_eq!((read.process, read.images.len()), (7, 1));
        assert!(read.images[0].adopted.is_empty() && read.images[0].bytes_kept == 0);
        assert!(!serde_json::to_string(&read).unwrap().contains("adopted"));
    }

    #[test]
    fn the_trouble_of_few_images_is_told_whole() {
        let trouble = "x".repeat(REASON_BYTES_MAX);
        let image = ImageStatus {
            image: "http://h/web".into(),
            digest: BlobDigest::of(b"m"),
            machines: 1,
            bytes_received: 1,
            bytes_sent: 1,
            bytes_kept: 1,
            adopted: Vec::new(),
            chunks_copied: 1,
            bytes_saved: 1,
            trouble: Some(trouble.clone()),
            unkept: None,
        };
        let status = FromAgent::Status(AgentStatus {
            process: 1,
            images: vec![image; 3],
            cache: CacheStatus::default(),
        });
        let FromAgent::Status(read) = FromAgent::parse(&status.to_bytes()).unwrap() else {
            panic!()
        };
        assert!(
            read.images
                .iter()
                .all(|image| image.trouble.as_ref() == Some(&trouble))
        );
    }
}
