//! Layers: their seek table, and what their frames decompress to.

use runnel_snapshot::decode::{ChunkDecoder, DecodeError, check_zeros};
use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::layer::seek_table::{LayerSeekTable, SeekTableWriter};

use crate::input::Input;
use crate::store::OneBlob;

/// The longest content that a frame is asked for here: more only takes longer.
const CONTENT_BYTES_MAX: u32 = 256 << 10;

/// A layer that ends as the bytes do.
pub fn seek_table(bytes: &[u8]) -> bool {
    let store = OneBlob(bytes.to_vec());
    let as_layer = LayerSeekTable::read(&store, &store.blob());
    let alone = LayerSeekTable::parse(bytes);
    // Where the table is all there is, both ways lead to the same; frames are expected before one that lists some.
    let Some(table) = as_layer.ok().or(alone.ok()) else {
        return false;
    };
    assert!(table.frame(table.frames()).is_none());
    let mut writer = SeekTableWriter::default();
    let (mut stored, mut content) = (0, 0);
    for number in 0..table.frames() {
        let frame = table.frame(number).expect("it has so many");
        assert_eq!((frame.stored.start, frame.content.start), (stored, content));
        stored += frame.stored.len;
        content += frame.content.len;
        let len = |len: u64| u32::try_from(len).expect("an entry has 32 bits");
        let pushed = writer.push(len(frame.stored.len), len(frame.content.len));
        pushed.expect("it held as many");
    }
    assert_eq!((table.stored_bytes(), table.content_bytes()), (stored, content));
    let mut written = Vec::new();
    let finished = writer.finish(|piece| {
        written.extend_from_slice(piece);
        Ok::<_, ()>(())
    });
    finished.expect("memory takes all");
    assert!(
        bytes.ends_with(&written),
        "there is one way to write a seek table"
    );
    true
}

/// A frame: the length of its chunk, then the frame. It is asked for with the digest that it turns out to have.
pub fn chunk_frame(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let len = 1 + input.u32() % CONTENT_BYTES_MAX;
    let mut plain = vec![0; len as usize];
    let frame = input.rest();
    let mut decoder = ChunkDecoder::new().expect("zstd has memory");
    let nothing = ChunkDigest::of(b"");
    let found = match decoder.decode(frame, &nothing, &mut plain) {
        Ok(()) => panic!("a chunk of {len} bytes has the digest of nothing"),
        Err(DecodeError::Digest { found, .. }) => found,
        Err(_) => return false,
    };
    assert_eq!(found, ChunkDigest::of(&plain));
    let first = plain.clone();
    let again = decoder.decode(frame, &found, &mut plain);
    again.expect("a frame with its own digest is its chunk");
    assert_eq!(first, plain);
    true
}

/// A frame of zeros: the length of its content, then the frame.
pub fn zero_frame(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let content = u64::from(input.u32() % CONTENT_BYTES_MAX);
    let frame = input.rest();
    if check_zeros(frame, content).is_err() {
        return false;
    }
    let longer = check_zeros(frame, content + 1);
    assert!(longer.is_err(), "it has two lengths");
    true
}
