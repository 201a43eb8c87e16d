//! One request to a drive: parsed whole from its chain, and checked against the drive, before anything is done
//! (virtio 1.2 §5.2.6).

use runnel_snapshot::block_store::GuestSlice;
use runnel_snapshot::block_store::guest_io::Cursor;
use runnel_snapshot::units::ByteRange;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::super::DeviceFault;
use super::super::chain::{Chain, copy_from_guest};
use super::{DISCARD_SECTORS_MAX, DISCARD_SEGMENTS_MAX, SECTOR_BYTES};

/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// Bytes of one range of a discard or write-zeroes request: sector, number of sectors, flags.
const RANGE_BYTES: usize = 16;

/// A request as the driver sent it.
pub(super) struct Request<'m> {
    pub(super) head: u16,
    /// What to do, or why the guest is told that it cannot be done.
    pub(super) operation: Result<Operation<'m>, Refusal>,
    /// The last writable byte: how it went.
    pub(super) status: GuestSlice<'m>,
}

/// What to do. Ranges lie in the drive.
pub(super) enum Operation<'m> {
    Read {
        offset: u64,
        into: Vec<GuestSlice<'m>>,
        bytes: u32,
    },
    Write {
        offset: u64,
        from: Vec<GuestSlice<'m>>,
        bytes: u32,
    },
    Flush,
    Identify {
        into: Vec<GuestSlice<'m>>,
    },
    Discard(Vec<ByteRange>),
    WriteZeroes(Vec<(ByteRange, bool)>),
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It lies outside the drive, is no whole number of sectors, or writes to a read-only drive.
    Invalid,
    /// The device does not know it.
    Unsupported,
}

impl Refusal {
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Invalid => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

/// The drive as requests see it.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
}

impl<'m> Request<'m> {
    /// Takes a chain apart. The driver may cut header, data and status into buffers as it likes (§2.7.4).
    pub(super) fn parse(chain: &Chain<'m>, limits: Limits) -> Result<Self, DeviceFault> {
        let mut header = [0; HEADER_BYTES];
        if copy_from_guest(&chain.readable, &mut header) < HEADER_BYTES {
            return Err(DeviceFault::Request("a block request without a whole header"));
        }
        let writable_bytes = chain.writable_bytes();
        let Some(data_bytes) = writable_bytes.checked_sub(1) else {
            return Err(DeviceFault::Request(
                "a block request without room for its status",
            ));
        };
        let mut writable = Cursor::new(&chain.writable);
        let data_in = writable.take(data_bytes);
        let [status] = writable.take(1)[..] else {
            return Err(DeviceFault::Request(
                "a block request without room for its status",
            ));
        };
        let mut readable = Cursor::new(&chain.readable);
        drop(readable.take(HEADER_BYTES as u64));
        let data_out = readable.take(u64::MAX);
        let operation = Operation::parse(&header, data_in, data_out, limits);
        Ok(Self {
            head: chain.head,
            operation,
            status,
        })
    }

    /// The part of the drive that carrying it out will read, if any.
    pub(super) fn reads(&self) -> Option<ByteRange> {
        match &self.operation {
            Ok(Operation::Read { offset, bytes, .. }) => Some(ByteRange {
                start: *offset,
                len: (*bytes).into(),
            }),
            _ => None,
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn bytes_of(slices: &[GuestSlice<'_>]) -> Result<u32, Refusal> {
    let bytes = runnel_snapshot::block_store::guest_io::total(slices);
    // One more for the status must fit a used element.
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes < u32::MAX)
        .ok_or(Refusal::Invalid)
}

impl<'m> Operation<'m> {
    fn parse(
        header: &[u8; HEADER_BYTES],
        data_in: Vec<GuestSlice<'m>>,
        data_out: Vec<GuestSlice<'m>>,
        limits: Limits,
    ) -> Result<Self, Refusal> {
        let sector = u64_at(header, 8);
        match u32_at(header, 0) {
            VIRTIO_BLK_T_IN => {
                let bytes = bytes_of(&data_in)?;
                Ok(Self::Read {
                    offset: data_offset(sector, bytes, limits)?,
                    into: data_in,
                    bytes,
                })
            }
            VIRTIO_BLK_T_OUT => {
                limits.writable()?;
                let bytes = bytes_of(&data_out)?;
                Ok(Self::Write {
                    offset: data_offset(sector, bytes, limits)?,
                    from: data_out,
                    bytes,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::Identify { into: data_in }),
            VIRTIO_BLK_T_DISCARD => {
                let ranges = parse_ranges(&data_out, limits)?;
                let without_flags = |(range, flags)| {
                    if flags == 0 {
                        Ok(range)
                    } else {
                        Err(Refusal::Unsupported)
                    }
                };
                Ok(Self::Discard(
                    ranges.into_iter().map(without_flags).collect::<Result<_, _>>()?,
                ))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let ranges = parse_ranges(&data_out, limits)?;
                let with_unmap = |(range, flags)| match flags {
                    0 => Ok((range, false)),
                    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Ok((range, true)),
                    _ => Err(Refusal::Unsupported),
                };
                Ok(Self::WriteZeroes(
                    ranges.into_iter().map(with_unmap).collect::<Result<_, _>>()?,
                ))
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl Limits {
    fn writable(self) -> Result<(), Refusal> {
        if self.read_only {
            Err(Refusal::Invalid)
        } else {
            Ok(())
        }
    }

    /// The bytes of `count` sectors from `sector` on, if the drive has them all.
    fn range(self, sector: u64, count: u64) -> Result<ByteRange, Refusal> {
        match sector.checked_add(count) {
            // The drive's length in bytes fits 64 bits, and so does what lies in it.
            Some(end) if end <= self.sectors => Ok(ByteRange {
                start: sector * SECTOR_BYTES,
                len: count * SECTOR_BYTES,
            }),
            _ => Err(Refusal::Invalid),
        }
    }
}

fn data_offset(sector: u64, bytes: u32, limits: Limits) -> Result<u64, Refusal> {
    let bytes = u64::from(bytes);
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Refusal::Invalid);
    }
    Ok(limits.range(sector, bytes / SECTOR_BYTES)?.start)
}

/// The ranges of a discard or write-zeroes request with their flags, all inside the drive and none empty.
fn parse_ranges(data: &[GuestSlice<'_>], limits: Limits) -> Result<Vec<(ByteRange, u32)>, Refusal> {
    limits.writable()?;
    let bytes = bytes_of(data)? as usize;
    if bytes == 0 || !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > DISCARD_SEGMENTS_MAX as usize
    {
        return Err(Refusal::Invalid);
    }
    let mut raw = vec![0; bytes];
    copy_from_guest(data, &mut raw);
    let parse = |raw: &[u8]| {
        let (sector, count, flags) = (u64_at(raw, 0), u32_at(raw, 8), u32_at(raw, 12));
        if count == 0 || count > DISCARD_SECTORS_MAX {
            return Err(Refusal::Invalid);
        }
        Ok((limits.range(sector, count.into())?, flags))
    };
    raw.chunks_exact(RANGE_BYTES).map(parse).collect()
}
