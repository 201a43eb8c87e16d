//! CPUID: what each vCPU says of itself. It starts from what KVM supports on this host, and then topology, identity
//! and what must not be used are put right.
//!
//! Sources: Intel SDM vol. 2A "CPUID"; AMD APM vol. 3 appendix E; Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM's own feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Bits of it: asynchronous page faults, their delivery to nested hypervisors, and by interrupt.
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// AMD's nested virtualization, as [`adjust`] has it of Intel's.
const NESTED_SVM: u32 = 1 << 2;

/// How the vCPUs of a machine share cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// How many vCPUs.
    pub vcpus: u8,
    /// Whether vCPUs 2n and 2n+1 are threads of one core.
    pub smt: bool,
}

impl Topology {
    fn threads_per_core(self) -> u8 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    fn cores(self) -> u8 {
        self.vcpus.div_ceil(self.threads_per_core())
    }

    /// How many low bits of an APIC identifier number threads within a core.
    fn thread_bits(self) -> u32 {
        bits_for(self.threads_per_core())
    }

    /// How many low bits of an APIC identifier number threads within the package.
    fn package_bits(self) -> u32 {
        self.thread_bits() + bits_for(self.cores())
    }
}

/// Bits that number `count` things.
fn bits_for(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// The leaves of vCPU `number`, of those that are `supported`.
#[must_use]
pub fn of_vcpu(supported: &CpuId, number: u8, topology: Topology) -> CpuId {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .copied()
        .filter(|entry| !is_topology(entry.function))
        .collect();
    let is_intel = vendor_is(&entries, *b"GenuineIntel");
    for entry in &mut entries {
        adjust(entry, number, topology, is_intel);
    }
    // Intel's leaf 0xb and its successor; AMD's processors and Linux know 0xb too.
    entries.extend(topology_leaves(0xb, number, topology));
    entries.sort_by_key(|entry| (entry.function, entry.index));
    // At most as many as KVM listed and two more, far below the vector's limit.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

/// Leaves that describe the host's topology; ours are put in their place.
fn is_topology(function: u32) -> bool {
    matches!(function, 0xb | 0x1f | 0x8000_0026)
}

fn vendor_is(entries: &[kvm_cpuid_entry2], vendor: [u8; 12]) -> bool {
    entries
        .iter()
        .find(|entry| entry.function == 0)
        .is_some_and(|entry| {
            let words = [entry.ebx, entry.edx, entry.ecx];
            words.iter().flat_map(|word| word.to_le_bytes()).eq(vendor)
        })
}

fn adjust(entry: &mut kvm_cpuid_entry2, number: u8, topology: Topology, is_intel: bool) {
    let cores = u32::from(topology.cores());
    let vcpus = u32::from(topology.vcpus);
    match entry.function {
        1 => {
            const TSC_DEADLINE: u32 = 1 << 24;
            const HYPERVISOR: u32 = 1 << 31;
            // A machine's own virtual machines would not be saved with it.
            const NESTED_VMX: u32 = 1 << 5;
            const SEVERAL_THREADS: u32 = 1 << 28;
            entry.ecx = entry.ecx & !NESTED_VMX | TSC_DEADLINE | HYPERVISOR;
            entry.ebx = entry.ebx & 0xffff | vcpus << 16 | u32::from(number) << 24;
            entry.edx = entry.edx & !SEVERAL_THREADS | if topology.vcpus > 1 { SEVERAL_THREADS } else { 0 };
        }
        // Intel's caches: of a thread and core each below level 3, of the package from there on.
        4 if is_intel && entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                1 << topology.package_bits()
            } else {
                u32::from(topology.threads_per_core())
            };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14 | (cores - 1) << 26;
        }
        // Power management that a guest cannot do: turbo, and the energy-performance bias.
        6 => {
            entry.eax &= !(1 << 1);
            entry.ecx &= !(1 << 3);
        }
        // The performance counters' state does not travel between hosts.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // A page that is awaited is a stalled vCPU, never a promise to the guest: after a resume elsewhere nobody
        // would keep it.
        KVM_FEATURES => entry.eax &= !ASYNC_PAGE_FAULTS,
        0x8000_0001 => entry.ecx &= !NESTED_SVM,
        0x8000_0008 => {
            // AMD: threads in the package less one, and the bits of an APIC identifier that number them.
            entry.ecx = if is_intel {
                entry.ecx
            } else {
                (vcpus - 1) | topology.package_bits() << 12
            };
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                vcpus
            } else {
                u32::from(topology.threads_per_core())
            };
            entry.eax = entry.eax & 0x3fff | (sharing - 1) << 14;
        }
        0x8000_001e => {
            let threads = u32::from(topology.threads_per_core());
            entry.eax = u32::from(number);
            entry.ebx = u32::from(number) >> topology.thread_bits() | (threads - 1) << 8;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn topology_leaves(function: u32, number: u8, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index, shift, threads: u8, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: u32::from(threads),
        ecx: index | kind << 8,
        edx: u32::from(number),
        ..Default::default()
    };
    [
        level(0, topology.thread_bits(), topology.threads_per_core(), THREAD),
        level(1, topology.package_bits(), topology.vcpus, CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(vendor: [u8; 12]) -> CpuId {
        let word =
            |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x1f, word(0), word(8), word(4)),
            leaf(1, 0x806f8, 0xff7f_0800, 1, 0),
            leaf(4, 0xfc1f_c163, 0, 0, 0),
            leaf(0xb, 1, 96, 0x100, 7),
            leaf(0xa, 0x0730_0802, 1, 2, 3),
            leaf(KVM_FEATURES, u32::MAX, 0, 0, 0),
            leaf(0x8000_0008, 0x3030, 0, 0x705f, 0),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_has_an_identifier_of_its_own_and_no_trace_of_the_hosts_topology() {
        let topology = Topology { vcpus: 4, smt: true };
        for number in 0..4 {
            let cpuid = of_vcpu(&supported(*b"GenuineIntel"), number, topology);
            assert_eq!(leaf(&cpuid, 1, 0).ebx, u32::from(number) << 24 | 4 << 16 | 0x0800);
            let (threads, package) = (leaf(&cpuid, 0xb, 0), leaf(&cpuid, 0xb, 1));
            assert_eq!((threads.eax, threads.ebx, threads.edx), (1, 2, u32::from(number)));
            assert_eq!((package.eax, package.ebx, package.edx), (2, 4, u32::from(number)));
            assert_eq!(
                cpuid
                    .as_slice()
                    .iter()
                    .filter(|entry| entry.function == 0xb)
                    .count(),
                3
            );
        }
    }

    #[test]
    fn asynchronous_page_faults_and_performance_counters_are_never_offered() {
        let cpuid = of_vcpu(&supported(*b"GenuineIntel"), 0, Topology { vcpus: 1, smt: false });
        let features = leaf(&cpuid, KVM_FEATURES, 0).eax;
        assert_eq!(features, !(1 << 4) & !(1 << 10) & !(1 << 14));
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
    }

    #[test]
    fn the_count_of_threads_is_told_in_amds_leaf_on_amd_alone() {
        let topology = Topology { vcpus: 3, smt: false };
        assert_eq!(
            leaf(
                &of_vcpu(&supported(*b"AuthenticAMD"), 0, topology),
                0x8000_0008,
                0
            )
            .ecx,
            2 | 2 << 12
        );
        assert_eq!(
            leaf(
                &of_vcpu(&supported(*b"GenuineIntel"), 0, topology),
                0x8000_0008,
                0
            )
            .ecx,
            0x705f
        );
    }
}
