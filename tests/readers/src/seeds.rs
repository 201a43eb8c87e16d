//! Valid inputs of every reader, made here rather than kept: a fuzzer begins with them, and a test holds each against
//! its reader, so that no reader is fed with nothing but what it refuses.

use std::fs;
use std::path::{Path, PathBuf};

use runnel_devices::virtio::block::CacheType;
use runnel_snapshot::digest::{BlobDigest, ChunkDigest};
use runnel_snapshot::image::Image;
use runnel_snapshot::image::reference::Wanted;
use runnel_snapshot::index::{Entry, IndexBuilder, LayerNumber, StoredChunk};
use runnel_snapshot::layer::frame::{append_zero_frame, zero_frame_bytes};
use runnel_snapshot::layer::seek_table::SeekTableWriter;
use runnel_snapshot::protocol::{
    Adopt, FromAgent, FromMonitor, Hello, IndexFound, Opened, OpenedVolume, PROTOCOL_VERSION, Refused,
    WantIndex,
};
use runnel_snapshot::section::SavedSection;
use runnel_snapshot::source::{Arrived, ChunkFailure, ChunkId, SourceVolume, Urgency, VolumeId};
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ByteRange, ChunkIndex, ChunkSize};
use runnel_snapshot::volume::VolumeName;
use runnel_snapshot::working_set::WorkingSet;
use runnel_vmm::state::vcpu::{Vcpu, VcpuState};
use serde_json::{Value, json};

use crate::{image, transport};

/// What the reader `name` accepts.
///
/// # Panics
/// When there is no such reader.
#[must_use]
pub fn of(name: &str) -> Vec<Vec<u8>> {
    match name {
        "api_request" => api_requests(),
        "chunk_frame" => vec![chunk_frame(&b"the bytes of a chunk".repeat(50)), chunk_frame(&[0; 5000])],
        "compatibility" => vec![
            b"{}".to_vec(),
            json_bytes(&json!({"cpuid.1.ecx": "0x1", "xcr0": "0x7", "cpuid.address_bits": 40, "host.kernel": "6.1"})),
        ],
        "config_file" => vec![json_bytes(&config_file())],
        "credentials" => vec![credentials()],
        "device_state" => transport::saved_sections().iter().map(json_bytes).collect(),
        "from_agent" => from_agent().iter().map(FromAgent::to_bytes).collect(),
        "from_monitor" => from_monitor().iter().map(FromMonitor::to_bytes).collect(),
        "guest_channel" => [
            "hello 1\nready 0123456789abcdef\n",
            "hello 1 web\r\nfailed 0123456789abcdef no room\n",
            "hello 1\nbye\n",
        ]
        .map(|text| text.as_bytes().to_vec())
        .into(),
        "http_answer" => http_answers(),
        "http_fields" => vec![
            b"https://host:5000/v2/web?x=1\n/other\nBasic realm=\"x\"".to_vec(),
            b"http://[::1]/v2/\nhttps://cdn.example/blob?sig=1#part\nBearer realm=\"https://auth/token\",service=\"r\",scope=\"a:b\"".to_vec(),
        ],
        // No digest is left wrong, and nothing is edited; then edits that do no harm.
        "image" => vec![vec![0], vec![0, 0, 1, 1, 0, 0]],
        "index_json" => vec![image::seed_part("index.json")],
        "index_root" => vec![image::seed_part("root")],
        "index_segment" => vec![index_segment()],
        "kernel" => vec![elf(), bzimage()],
        "machine_state" => {
            let golden = golden().into_iter().map(|(_, state)| json_bytes(&state));
            golden.chain([image::seed_part("state")]).collect()
        }
        "manifest" => {
            let golden = golden().into_iter().map(|(manifest, _)| manifest);
            golden.chain([image::seed_part("manifest")]).collect()
        }
        "names" => names(),
        "opening" => vec![opening()],
        "page_walk" => vec![page_walk()],
        "sections" => sections(),
        "seek_table" => vec![seek_table()],
        "serve_request" => serve_requests(),
        "virtio_block" => vec![block_requests()],
        "virtio_net" => vec![packets()],
        "virtio_registers" => (0..3).map(|device| vec![device, 3, 4, 0, 4, 1, 5, 6, 0, 6, 1, 0, 0x70, 0, 4]).collect(),
        "working_set" => working_sets(),
        "zero_frame" => vec![zero_frame(200_000), zero_frame(1)],
        other => panic!("there is no reader {other}"),
    }
}

fn json_bytes(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("it has a JSON form")
}

fn api_requests() -> Vec<Vec<u8>> {
    let ask = |first: &str, body: &Value| match body {
        Value::Null => first.as_bytes().to_vec(),
        body => format!("{first}\n{body}").into_bytes(),
    };
    vec![
        ask("GET /", &Value::Null),
        ask("GET /snapshot/progress", &Value::Null),
        ask("DELETE /snapshot/load", &Value::Null),
        ask(
            "PUT /machine-config",
            &json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": false}),
        ),
        ask("PATCH /machine-config", &json!({"track_dirty_pages": true})),
        ask(
            "PUT /boot-source",
            &json!({"kernel_image_path": "/k", "initrd_path": "/i", "boot_args": "console=ttyS0"}),
        ),
        ask(
            "PUT /drives/rootfs",
            &json!({"drive_id": "rootfs", "path_on_host": "/d", "is_root_device": true, "cache_type": "Writeback"}),
        ),
        ask(
            "PUT /network-interfaces/eth0",
            &json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"}),
        ),
        ask("PUT /actions", &json!({"action_type": "InstanceStart"})),
        ask("PATCH /vm", &json!({"state": "Paused"})),
        ask(
            "PUT /snapshot/create",
            &json!({"snapshot_path": "/s", "mem_file_path": "/m"}),
        ),
        ask(
            "PUT /snapshot/create",
            &json!({"image_path": "/i", "excluded_drives": ["data"]}),
        ),
        ask(
            "PUT /snapshot/load",
            &json!({"image": "http://h:5000/web", "agent_path": "/a", "stall_after_ms": 5,
                "drive_overrides": [{"drive_id": "a", "path_on_host": "/p"}],
                "network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap1"}]}),
        ),
        ask(
            "PUT /snapshot/load",
            &json!({"image": "/i", "record": {"path": "/w", "duration_ms": 5}}),
        ),
        ask(
            "PUT /snapshot/load",
            &json!({"snapshot_path": "/s", "mem_backend": {"backend_type": "File", "backend_path": "/m"}, "resume_vm": true}),
        ),
    ]
}

fn working_sets() -> Vec<Vec<u8>> {
    let volume = |name| SourceVolume {
        name,
        bytes: 1 << 26,
        chunk_size: ChunkSize::DEFAULT,
    };
    let volumes = [VolumeName::Memory, VolumeName::Drive("rootfs".to_owned())].map(volume);
    let touched = [(0, 900), (0, 901), (1, 3), (0, 5), (1, 2)].map(|(volume, chunk)| ChunkId {
        volume: VolumeId(volume),
        chunk: ChunkIndex(chunk),
    });
    let all = [WorkingSet::of(&volumes, touched), WorkingSet::default()];
    all.iter().map(WorkingSet::to_bytes).collect()
}

fn config_file() -> Value {
    json!({
        "boot-source": {"kernel_image_path": "/k", "boot_args": "console=ttyS0"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [{"drive_id": "rootfs", "path_on_host": "/d", "is_root_device": false}],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "entropy": {},
        "vsock": {"guest_cid": 3},
    })
}

fn credentials() -> Vec<u8> {
    let file = json!({"auths": {
        "registry.example:5000": {"auth": "dXNlcjpwYXNzd29yZA=="},
        "https://other.example/v1/": {"username": "user", "password": "password"},
        "third": {"registrytoken": "t0ken"},
    }});
    format!("http://registry.example:5000/\n{file}").into_bytes()
}

fn chunk_frame(plain: &[u8]) -> Vec<u8> {
    let mut bytes = (plain.len() as u32 - 1).to_le_bytes().to_vec();
    bytes.extend(zstd::bulk::compress(plain, 1).expect("zstd has memory"));
    bytes
}

fn zero_frame(content: u32) -> Vec<u8> {
    let mut bytes = content.to_le_bytes().to_vec();
    append_zero_frame(content.into(), &mut bytes);
    bytes
}

fn id(volume: u16, chunk: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(volume),
        chunk: ChunkIndex(chunk),
    }
}

fn from_monitor() -> Vec<FromMonitor> {
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        image: "http://host/web".to_owned(),
        digest: Some(BlobDigest::of(b"m")),
        machine: "web".to_owned(),
    };
    vec![
        FromMonitor::Hello(hello),
        FromMonitor::Ask(Urgency::Demand, vec![id(0, 1), id(1, 2)]),
        FromMonitor::Cancel(vec![id(0, 1)]),
        FromMonitor::Status,
        FromMonitor::WantIndex(WantIndex {
            protocol: PROTOCOL_VERSION,
            image: BlobDigest::of(b"m"),
            volume: VolumeName::Memory,
        }),
        FromMonitor::Adopt(Adopt {
            protocol: PROTOCOL_VERSION,
            image: "/images/web".to_owned(),
            digest: BlobDigest::of(b"m"),
            volume: VolumeName::Memory,
            machine: "web".to_owned(),
        }),
    ]
}

fn opened() -> FromAgent {
    FromAgent::Opened(Opened {
        digest: BlobDigest::of(b"m"),
        volumes: vec![OpenedVolume {
            name: VolumeName::Memory,
            bytes: 1 << 14,
            chunk_size: ChunkSize::DEFAULT,
        }],
    })
}

fn from_agent() -> Vec<FromAgent> {
    let (reason, transient) = ("it is away".to_owned(), true);
    let refused = Refused {
        reason: reason.clone(),
        transient,
    };
    vec![
        opened(),
        FromAgent::Refused(refused),
        FromAgent::Arrived(vec![(id(0, 1), Arrived::Data), (id(1, 2), Arrived::Zero)]),
        FromAgent::Failed(id(0, 1), ChunkFailure { reason, transient }),
        FromAgent::parse(b"\x15{\"process\":1,\"images\":[]}").expect("it is a status"),
        FromAgent::Index(IndexFound {
            blobs_at: vec!["http://host/v2/web/blobs/sha256:".to_owned()],
        }),
    ]
}

/// Three descriptors: state, manifest, and a page file as long as the volume.
fn opening() -> Vec<u8> {
    let mut bytes = vec![3, 1, 0, 2, 0, 64, 0];
    bytes.extend(opened().to_bytes());
    bytes
}

fn http_answers() -> Vec<Vec<u8>> {
    let answers = [
        "HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world",
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 Partial Content\r\nContent-Range: bytes 2-5/10\r\ncontent-length: 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8;x=y\r\nabcdefgh\r\n2\r\nij\r\n0\r\nTrailer: x\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\nuntil the connection is closed",
        "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
    ];
    answers.map(|answer| answer.as_bytes().to_vec()).to_vec()
}

fn serve_requests() -> Vec<Vec<u8>> {
    let digest = BlobDigest::of(b"x");
    let requests = [
        "/v2/\n\n\n\n".to_owned(),
        "/v2/_catalog\nn=2&last=team%2Fdb\n\n\n".to_owned(),
        "/v2/team/web/tags/list\nn=1\nbytes=-3\nBearer 0123456789abcdef\n10".to_owned(),
        format!("/v2/web/blobs/{digest}\n\nbytes=2-5\nBasic eDowMTIzNDU2Nzg5YWJjZGVm\n100"),
        format!("/v2/web/manifests/{digest}\nn=0\nbytes=9-\n\n10"),
    ];
    requests.map(String::into_bytes).to_vec()
}

fn names() -> Vec<Vec<u8>> {
    let digest = BlobDigest::of(b"m");
    let names = [
        "/images/web".to_owned(),
        format!("./web@{digest}"),
        "https://registry.example:5000/team/web:v1.2".to_owned(),
        format!("http://[::1]:7070/web:v1@{digest}"),
        "memory".to_owned(),
        "drive:rootfs".to_owned(),
        digest.to_string(),
        ChunkDigest::of(b"c").to_string(),
        "06:00:00:00:00:01".to_owned(),
    ];
    names.map(String::into_bytes).to_vec()
}

fn index_segment() -> Vec<u8> {
    let (log2_chunk_size, layer_bytes) = (16u8, 1_000_000u32);
    let volume_bytes = 10 << log2_chunk_size;
    let chunk_size = ChunkSize::new(1 << log2_chunk_size).expect("it is a size");
    let mut builder = IndexBuilder::new(volume_bytes, chunk_size, 1).expect("it is not large");
    let mut segment = Vec::new();
    for (start, len) in [(0, 500), (500, 600), (0, 0), (0, 0), (1200, 30_000), (40_000, 9)] {
        let stored = StoredChunk {
            layer: LayerNumber(0),
            frame: ByteRange { start, len },
            digest: ChunkDigest::of(&[len as u8]),
        };
        let entry = if len == 0 {
            Entry::Zero
        } else {
            Entry::Data(stored)
        };
        push(&mut builder, entry, &mut segment);
    }
    (0..4).for_each(|_| push(&mut builder, Entry::Zero, &mut segment));
    let mut bytes = vec![log2_chunk_size - 14];
    bytes.extend((volume_bytes as u32 - 1).to_le_bytes());
    bytes.push(0);
    bytes.extend(layer_bytes.to_le_bytes());
    bytes.extend(segment);
    bytes
}

fn push(builder: &mut IndexBuilder, entry: Entry, into: &mut Vec<u8>) {
    let pushed = builder.push(entry, |segment| {
        into.extend_from_slice(segment);
        Ok::<_, ()>(())
    });
    pushed.expect("memory takes all");
}

fn seek_table() -> Vec<u8> {
    let (mut layer, mut writer) = (Vec::new(), SeekTableWriter::default());
    for content in [300_000, 1, 70_000] {
        append_zero_frame(content, &mut layer);
        let stored = zero_frame_bytes(content) as u32;
        writer.push(stored, content as u32).expect("there are few");
    }
    let finished = writer.finish(|piece| {
        layer.extend_from_slice(piece);
        Ok::<_, ()>(())
    });
    finished.expect("memory takes all");
    layer
}

/// An ELF64 of one segment, at 1 MiB.
fn elf() -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes()); // an executable
    put(18, &62u16.to_le_bytes()); // for x86-64
    put(20, &1u32.to_le_bytes());
    put(24, &0x10_0000u64.to_le_bytes()); // where it is entered
    put(32, &64u64.to_le_bytes()); // where its program headers are
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // to be loaded
    put(72, &120u64.to_le_bytes());
    put(80, &0x10_0000u64.to_le_bytes());
    put(88, &0x10_0000u64.to_le_bytes());
    put(96, &16u64.to_le_bytes());
    put(104, &4096u64.to_le_bytes());
    elf.extend([0xf4; 16]);
    elf
}

/// A `bzImage` of version 2.12 with a 64-bit entry.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // sectors of set-up
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20cu16.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000u32.to_le_bytes()); // where
    put(0x22c, &u32::MAX.to_le_bytes());
    put(0x236, &1u16.to_le_bytes()); // a 64-bit entry
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image.extend([0xf4; 0x400]);
    image
}

/// Long mode, and tables that lead to themselves.
fn page_walk() -> Vec<u8> {
    let registers = [
        1 << 31,
        0x1000,
        0,
        1 << 10,
        0,
        0,
        0x3000,
        0x4000,
        0x5000,
        0x10_0000,
        0x20_0000,
    ];
    let entries = [0x1003, 0x2003, 0x8000_0083, 0x3003];
    let words = registers.into_iter().chain(entries);
    words.flat_map(u64::to_le_bytes).collect()
}

/// Manifest and state of each golden image.
fn golden() -> Vec<(Vec<u8>, MachineState)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden");
    let entries = fs::read_dir(folder).expect("golden images are kept");
    let folders = entries.map(|entry| entry.expect("the folder can be read").path());
    let read = |folder: PathBuf| {
        let image = Image::open_directory(&folder, &Wanted::Only).expect("a golden image is one");
        let manifest = fs::read(folder.join("blobs/sha256").join(image.digest().hex()));
        let state = image.state().expect("a golden image has a state");
        (manifest.expect("a manifest can be read"), state)
    };
    let images = folders.map(|folder| folder.join("image"));
    images.filter(|image| image.is_dir()).map(read).collect()
}

/// Those of a real machine are longer than any fuzzer makes them, and one of each kind that is not.
fn sections() -> Vec<Vec<u8>> {
    let vcpu = SavedSection::of::<Vcpu<'_>>("0", &VcpuState::default());
    let mut all = vec![json_bytes(&vcpu.expect("it has a JSON form"))];
    let section = |kind: &str, state: Value| json_bytes(&json!({"kind": kind, "version": 1, "state": state}));
    all.push(section("clock", json!({"guest_ns": 1, "host_wall_ns": 2})));
    all.push(section(
        "i8042",
        json!({"control": 0, "output_port": 3, "command": null, "output": []}),
    ));
    all.push(section(
        "serial",
        json!({"divisor_low": 12, "divisor_high": 0, "interrupt_enable": 2, "interrupt_identification": 1,
            "line_control": 3, "line_status": 0x61, "modem_control": 8, "modem_status": 0xb0, "scratch": 0,
            "received": [97]}),
    ));
    all.push(section(
        "machine",
        json!({"vcpus": 2, "smt": false, "memory_mib": 64, "entropy": true,
            "drives": [{"id": "rootfs", "path": "/gone", "is_root": true, "is_read_only": false,
                "cache_type": CacheType::Writeback, "in_image": true, "bytes": 4096}],
            "interfaces": [{"id": "eth0", "tap": "tap0", "mac": "06:00:00:00:00:01"}]}),
    ));
    let saved = golden().into_iter().flat_map(|(_, state)| state.sections);
    let saved = saved.filter(|section| !section.kind.starts_with("virtio"));
    all.extend(saved.map(|section| json_bytes(&section)));
    all
}

/// A descriptor of a ring, as `fill` of the rings takes it.
fn descriptor(address: u64, len: u16, flags: u8, next: u8) -> Vec<u8> {
    let mut bytes = ((address / 4) as u16).to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend([flags, next]);
    bytes
}

/// A write of a sector that the driver wants to hear of, and a read of it.
fn block_requests() -> Vec<u8> {
    const NEXT: u8 = 1;
    const WRITE: u8 = 2;
    let mut bytes = vec![1 | 4 | 8, 0, 0, 6];
    bytes.extend(descriptor(0x4000, 16, NEXT, 1));
    bytes.extend(descriptor(0x5000, 512, NEXT, 2));
    bytes.extend(descriptor(0x4020, 1, WRITE, 0));
    bytes.extend(descriptor(0x4010, 16, NEXT, 4));
    bytes.extend(descriptor(0x6000, 512, NEXT | WRITE, 5));
    bytes.extend(descriptor(0x4024, 1, WRITE, 0));
    bytes.extend([2, 0, 0, 3]);
    // The headers: a write, then a read, of sector 2.
    for kind in [1u32, 0] {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
    }
    bytes
}

/// A packet that comes and one that goes.
fn packets() -> Vec<u8> {
    let mut bytes = vec![4, 1, 100, 0, 3, 0, 0, 0, 0];
    bytes.push(1);
    bytes.extend(descriptor(0x5000, 2048, 2, 0));
    bytes.extend([1, 0, 0]);
    bytes.push(1);
    bytes.extend(descriptor(0x4000, 80, 0, 0));
    bytes.extend([1, 0, 0]);
    bytes
}
