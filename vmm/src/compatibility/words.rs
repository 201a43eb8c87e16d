//! The feature words of CPUID: where each is, and what its bits are called.

use kvm_bindings::kvm_cpuid_entry2;

/// Where a feature word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A word of which every bit is a feature.
pub(super) struct Word {
    pub(super) name: &'static str,
    function: u32,
    index: u32,
    register: Register,
    /// Bits that follow what the guest does, or that KVM gives on every host.
    pub(super) ignored: u32,
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

pub(super) const WORDS: [Word; 13] = [
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
    // What IA32_XSS may enable.
    word(
        "cpuid.d.1.ecx",
        0xd,
        1,
        Register::Ecx,
        0,
        &[
            (8, "the state of processor trace"),
            (10, "the state of PASID"),
            (11, "the state of CET in user mode"),
            (12, "the state of CET in kernel mode"),
            (13, "the state of hardware duty cycling"),
            (14, "the state of user interrupts"),
            (15, "the state of LBR"),
        ],
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

impl Word {
    pub(super) fn of(&self, cpuid: &[kvm_cpuid_entry2]) -> u32 {
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

    pub(super) fn name_of(&self, bit: u8) -> String {
        let known = self.bits.iter().find(|(number, _)| *number == bit);
        known.map_or_else(
            || format!("{} bit {bit}", self.name),
            |(_, name)| (*name).to_owned(),
        )
    }
}
