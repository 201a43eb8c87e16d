//! What a host must have for a machine: recorded when it is saved, checked before the first section is restored.
//!
//! The record is a map by names that people can read. `cpuid.*` are feature words of CPUID, in hexadecimal; every bit
//! that the machine was offered must be there on the new host, and a missing one is named. `host.*` is for people.
//! What only KVM can tell (registers, the TSC's frequency) is refused by the sections themselves.

use std::collections::BTreeMap;

use kvm_bindings::kvm_cpuid_entry2;
use serde_json::Value;

/// Where a feature word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A word of which every bit is a feature.
struct Word {
    name: &'static str,
    function: u32,
    index: u32,
    register: Register,
    /// Bits that follow what the guest does, or that KVM gives on every host.
    ignored: u32,
    /// Names of bits, as Linux has them in /proc/cpuinfo.
    bits: &'static [(u8, &'static str)],
}

const fn word(
    name: &'static str,
    function: u32,
    index: u32,
    register: Register,
    ignored: u32,
    bits: &'static [(u8, &'static str)],
) -> Word {
    Word {
        name,
        function,
        index,
        register,
        ignored,
        bits,
    }
}

/// MONITOR follows an MSR, x2APIC, TSC deadline and «hypervisor» are KVM's own, OSXSAVE follows CR4.
const IGNORED_1_ECX: u32 = 1 << 3 | 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31;
/// The local APIC's bit follows an MSR, that of several threads our own topology.
const IGNORED_1_EDX: u32 = 1 << 9 | 1 << 28;
/// OSPKE follows CR4.
const IGNORED_7_ECX: u32 = 1 << 4;
/// SYSCALL and APIC follow MSRs.
const IGNORED_EXT_EDX: u32 = 1 << 9 | 1 << 11;

const WORDS: [Word; 12] = [
    word(
        "cpuid.1.ecx",
        1,
        0,
        Register::Ecx,
        IGNORED_1_ECX,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    word(
        "cpuid.1.edx",
        1,
        0,
        Register::Edx,
        IGNORED_1_EDX,
        &[
            (4, "tsc"),
            (6, "pae"),
            (8, "cx8"),
            (15, "cmov"),
            (19, "clflush"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    word(
        "cpuid.7.0.ebx",
        7,
        0,
        Register::Ebx,
        0,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    word(
        "cpuid.7.0.ecx",
        7,
        0,
        Register::Ecx,
        IGNORED_7_ECX,
        &[
            (1, "avx512vbmi"),
            (2, "umip"),
            (3, "pku"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
        ],
    ),
    word(
        "cpuid.7.0.edx",
        7,
        0,
        Register::Edx,
        0,
        &[
            (4, "fsrm"),
            (10, "md_clear"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
            (26, "ibrs"),
            (27, "stibp"),
            (29, "arch_capabilities"),
            (31, "ssbd"),
        ],
    ),
    word(
        "cpuid.7.1.eax",
        7,
        1,
        Register::Eax,
        0,
        &[(4, "avx_vnni"), (5, "avx512_bf16"), (21, "amx_fp16")],
    ),
    word(
        "cpuid.d.0.eax",
        0xd,
        0,
        Register::Eax,
        0,
        &[
            (2, "the state of AVX"),
            (5, "the state of AVX-512"),
            (9, "the state of PKU"),
            (17, "the state of AMX"),
            (18, "the state of AMX"),
        ],
    ),
    word(
        "cpuid.d.1.eax",
        0xd,
        1,
        Register::Eax,
        0,
        &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")],
    ),
    word(
        "cpuid.80000001.ecx",
        0x8000_0001,
        0,
        Register::Ecx,
        0,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (8, "3dnowprefetch"),
            (22, "topoext"),
        ],
    ),
    word(
        "cpuid.80000001.edx",
        0x8000_0001,
        0,
        Register::Edx,
        IGNORED_EXT_EDX,
        &[(20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")],
    ),
    word(
        "cpuid.80000008.ebx",
        0x8000_0008,
        0,
        Register::Ebx,
        0,
        &[
            (0, "clzero"),
            (12, "amd_ibpb"),
            (14, "amd_ibrs"),
            (15, "amd_stibp"),
            (24, "amd_ssbd"),
        ],
    ),
    word(
        "cpuid.40000001.eax",
        0x4000_0001,
        0,
        Register::Eax,
        0,
        &[
            (0, "kvmclock"),
            (3, "kvmclock of the newer kind"),
            (5, "KVM's steal time"),
            (6, "KVM's end of interrupt"),
            (7, "KVM's unhalt"),
            (9, "KVM's TLB flush"),
            (11, "KVM's inter-processor interrupts"),
        ],
    ),
];

const VENDOR: &str = "cpuid.vendor";

/// Why a host cannot carry a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incompatible {
    /// Another maker's processor.
    #[error(
        "the machine was saved on a processor of {wanted:?}, and this one is of {host:?}: resume it on one like its own"
    )]
    Vendor {
        /// In the image.
        wanted: String,
        /// Here.
        host: String,
    },
    /// Features that the machine was offered and this host lacks.
    #[error("this host lacks what the machine was offered where it ran: {}: resume it on a host that has it", .0.join(", "))]
    Features(Vec<String>),
    /// A record that makes no sense.
    #[error("the image's record of what a host must have says {value} for {name:?}")]
    Malformed {
        /// Which entry.
        name: String,
        /// What it holds, shortened.
        value: String,
    },
}

/// What a host must have for a machine whose vCPUs say `cpuid`.
#[must_use]
pub fn record(cpuid: &[kvm_cpuid_entry2]) -> BTreeMap<String, Value> {
    let mut record: BTreeMap<String, Value> = WORDS
        .iter()
        .map(|word| {
            (
                word.name.to_owned(),
                Value::String(format!("{:#x}", word.of(cpuid))),
            )
        })
        .collect();
    record.insert(VENDOR.to_owned(), Value::String(vendor(cpuid)));
    let uname = rustix::system::uname();
    record.insert(
        "host.kernel".to_owned(),
        Value::String(uname.release().to_string_lossy().into_owned()),
    );
    record
}

/// Holds `record` against a host that can give a vCPU `host`. Entries that this Runnel does not know are left alone:
/// they concern what it does not offer.
///
/// # Errors
/// What the host lacks, by name.
pub fn check(record: &BTreeMap<String, Value>, host: &[kvm_cpuid_entry2]) -> Result<(), Incompatible> {
    if let Some(wanted) = record.get(VENDOR) {
        let (wanted, host) = (text(VENDOR, wanted)?, vendor(host));
        if wanted != host {
            return Err(Incompatible::Vendor {
                wanted: wanted.chars().take(12).collect(),
                host,
            });
        }
    }
    let mut missing = Vec::new();
    for word in &WORDS {
        let Some(value) = record.get(word.name) else {
            continue;
        };
        let digits = text(word.name, value)?.strip_prefix("0x");
        let wanted = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let wanted = wanted.ok_or_else(|| malformed(word.name, value))?;
        let lacking = wanted & !word.of(host) & !word.ignored;
        missing.extend(
            (0u8..32)
                .filter(|bit| lacking >> bit & 1 == 1)
                .map(|bit| word.name_of(bit)),
        );
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Incompatible::Features(missing))
    }
}

fn text<'v>(name: &str, value: &'v Value) -> Result<&'v str, Incompatible> {
    value.as_str().ok_or_else(|| malformed(name, value))
}

fn malformed(name: &str, value: &Value) -> Incompatible {
    Incompatible::Malformed {
        name: name.to_owned(),
        value: value.to_string().chars().take(40).collect(),
    }
}

fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let leaf = cpuid
        .iter()
        .find(|entry| entry.function == 0)
        .copied()
        .unwrap_or_default();
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Word {
    fn of(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
        let entry = cpuid
            .iter()
            .find(|entry| entry.function == self.function && entry.index == self.index);
        entry.map_or(0, |entry| match self.register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }) & !self.ignored
    }

    fn name_of(&self, bit: u8) -> String {
        let known = self.bits.iter().find(|(number, _)| *number == bit);
        known.map_or_else(
            || format!("{} bit {bit}", self.name),
            |(_, name)| (*name).to_owned(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(ebx_7: u32) -> Vec<kvm_cpuid_entry2> {
        let entry = |function, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        vec![
            entry(
                0,
                u32::from_le_bytes(*b"Genu"),
                u32::from_le_bytes(*b"ntel"),
                u32::from_le_bytes(*b"ineI"),
            ),
            entry(7, ebx_7, 0, 0),
        ]
    }

    #[test]
    fn a_host_with_more_is_taken_and_one_with_less_is_refused_by_the_features_name() {
        let record = record(&host(1 << 5));
        assert_eq!(check(&record, &host(1 << 5 | 1 << 16)), Ok(()));
        let refusal = check(&record, &host(1 << 16)).unwrap_err();
        assert_eq!(refusal, Incompatible::Features(vec!["avx2".to_owned()]));
        assert!(refusal.to_string().contains("avx2"), "{refusal}");
    }

    #[test]
    fn another_maker_is_refused_by_name() {
        let mut amd = host(0);
        amd[0].ebx = u32::from_le_bytes(*b"Auth");
        assert!(matches!(
            check(&record(&host(0)), &amd),
            Err(Incompatible::Vendor { .. })
        ));
    }

    #[test]
    fn what_follows_the_guest_is_no_feature() {
        let mut saved = host(0);
        saved.push(kvm_cpuid_entry2 {
            function: 1,
            ecx: 1 << 27,
            edx: 1 << 9,
            ..Default::default()
        });
        assert_eq!(check(&record(&saved), &host(0)), Ok(()));
    }

    #[test]
    fn nonsense_in_a_record_is_refused() {
        for value in [
            Value::Null,
            Value::String("0xfffffffff".into()),
            Value::String("many".into()),
        ] {
            let record = BTreeMap::from([("cpuid.7.0.ebx".to_owned(), value)]);
            assert!(matches!(
                check(&record, &host(0)),
                Err(Incompatible::Malformed { .. })
            ));
        }
        let unknown = BTreeMap::from([("gpu".to_owned(), Value::Bool(true))]);
        assert_eq!(check(&unknown, &host(0)), Ok(()));
    }
}
