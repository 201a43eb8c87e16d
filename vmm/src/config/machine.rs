//! `machine-config`: how many vCPUs, how much memory.

use std::num::NonZeroU8;

use serde::{Deserialize, Serialize};

/// Firecracker's static CPU templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // The names are Firecracker's and Amazon's.
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// What backs guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Pages of 4 KiB.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// Pages of 2 MiB from hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// `PUT /machine-config`, and what `GET` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineBody {
    /// How many vCPUs.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Whether two vCPUs share a core.
    #[serde(default)]
    pub smt: bool,
    /// A static CPU template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether KVM records which pages the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What backs guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// `PATCH /machine-config`: what is not given stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineUpdate {
    /// How many vCPUs.
    pub vcpu_count: Option<u8>,
    /// Guest memory in MiB.
    pub mem_size_mib: Option<u64>,
    /// Whether two vCPUs share a core.
    pub smt: Option<bool>,
    /// A static CPU template.
    pub cpu_template: Option<CpuTemplate>,
    /// Whether KVM records which pages the guest writes.
    pub track_dirty_pages: Option<bool>,
    /// What backs guest memory.
    pub huge_pages: Option<HugePages>,
}

impl MachineUpdate {
    /// Whether it would change nothing; the API refuses that.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The body of a `PUT` that brings `machine` to where this update wants it.
    #[must_use]
    pub fn onto(&self, machine: &Machine) -> MachineBody {
        let now = MachineBody::from(machine);
        MachineBody {
            vcpu_count: self.vcpu_count.unwrap_or(now.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(now.mem_size_mib),
            smt: self.smt.unwrap_or(now.smt),
            cpu_template: self.cpu_template.or(now.cpu_template),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(now.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(now.huge_pages),
        }
    }
}

/// Why a machine cannot be made that way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Too many vCPUs, none, or an odd number with SMT.
    #[error(
        "The number of vCPUs must be from 1 to {max}, and 1 or even if SMT is enabled; {found} (smt: {smt}) is not.",
        max = VcpuCount::MAX
    )]
    Vcpus {
        /// What was asked for.
        found: u8,
        /// With SMT.
        smt: bool,
    },
    /// Too little memory, or too much.
    #[error(
        "The memory size must be from {min} to {max} MiB; {found} MiB is not.",
        min = MemorySize::MIB_MIN, max = MemorySize::MIB_MAX
    )]
    Memory {
        /// What was asked for, in MiB.
        found: u64,
    },
    /// Memory of huge pages.
    #[error("huge_pages {0:?} is not supported by this version of Runnel: leave it out, or give \"None\".")]
    HugePages(HugePages),
    /// A CPU template.
    #[error("cpu_template {0:?} is not supported by this version of Runnel: leave it out, or give \"None\".")]
    CpuTemplate(CpuTemplate),
}

/// How many vCPUs: 1 to 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VcpuCount(NonZeroU8);

impl VcpuCount {
    /// The most, as Firecracker has it.
    pub const MAX: u8 = 32;
    /// One.
    pub const ONE: Self = Self(NonZeroU8::MIN);

    /// Checks `count`.
    #[must_use]
    pub fn new(count: u8) -> Option<Self> {
        NonZeroU8::new(count)
            .filter(|count| count.get() <= Self::MAX)
            .map(Self)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0.get()
    }
}

/// How much guest memory: 32 MiB to 64 GiB, in whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize {
    mib: u64,
}

impl MemorySize {
    /// Below 32 MiB no stock kernel boots.
    pub const MIB_MIN: u64 = 32;
    /// 64 GiB.
    pub const MIB_MAX: u64 = 64 << 10;
    /// What a machine has that was not configured, as Firecracker has it.
    pub const DEFAULT: Self = Self { mib: 128 };

    /// Checks `mib`.
    #[must_use]
    pub fn from_mib(mib: u64) -> Option<Self> {
        (Self::MIB_MIN..=Self::MIB_MAX)
            .contains(&mib)
            .then_some(Self { mib })
    }

    /// In MiB.
    #[must_use]
    pub const fn mib(self) -> u64 {
        self.mib
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.mib << 20
    }
}

/// vCPUs and memory, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// How many vCPUs.
    pub vcpus: VcpuCount,
    /// How much guest memory.
    pub memory: MemorySize,
    /// Whether vCPUs 2n and 2n+1 share a core.
    pub smt: bool,
    /// Whether KVM records which pages the guest writes.
    pub track_dirty_pages: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            vcpus: VcpuCount::ONE,
            memory: MemorySize::DEFAULT,
            smt: false,
            track_dirty_pages: false,
        }
    }
}

impl TryFrom<MachineBody> for Machine {
    type Error = MachineError;

    fn try_from(body: MachineBody) -> Result<Self, MachineError> {
        let wrong_count = MachineError::Vcpus {
            found: body.vcpu_count,
            smt: body.smt,
        };
        let vcpus = VcpuCount::new(body.vcpu_count).ok_or_else(|| wrong_count.clone())?;
        if body.smt && vcpus > VcpuCount::ONE && vcpus.get() % 2 == 1 {
            return Err(wrong_count);
        }
        let memory = MemorySize::from_mib(body.mem_size_mib).ok_or(MachineError::Memory {
            found: body.mem_size_mib,
        })?;
        if body.huge_pages != HugePages::None {
            return Err(MachineError::HugePages(body.huge_pages));
        }
        match body.cpu_template {
            None | Some(CpuTemplate::None) => {}
            Some(template) => return Err(MachineError::CpuTemplate(template)),
        }
        Ok(Self {
            vcpus,
            memory,
            smt: body.smt,
            track_dirty_pages: body.track_dirty_pages,
        })
    }
}

impl From<&Machine> for MachineBody {
    fn from(machine: &Machine) -> Self {
        Self {
            vcpu_count: machine.vcpus.get(),
            mem_size_mib: machine.memory.mib(),
            smt: machine.smt,
            cpu_template: None,
            track_dirty_pages: machine.track_dirty_pages,
            huge_pages: HugePages::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(json: &str) -> Result<Machine, MachineError> {
        serde_json::from_str::<MachineBody>(json).unwrap().try_into()
    }

    #[test]
    fn vcpus_outside_1_to_32_are_refused_and_odd_ones_with_smt() {
        for (count, smt) in [(0, false), (33, false), (255, false), (3, true), (0, true)] {
            let json = format!(r#"{{"vcpu_count": {count}, "mem_size_mib": 128, "smt": {smt}}}"#);
            assert_eq!(machine(&json), Err(MachineError::Vcpus { found: count, smt }));
        }
        for (count, smt) in [(1, false), (3, false), (32, false), (1, true), (32, true)] {
            let json = format!(r#"{{"vcpu_count": {count}, "mem_size_mib": 128, "smt": {smt}}}"#);
            assert_eq!(machine(&json).unwrap().vcpus.get(), count);
        }
    }

    #[test]
    fn memory_outside_32_mib_to_64_gib_is_refused() {
        for mib in [0, 31, 65537, u64::MAX] {
            let json = format!(r#"{{"vcpu_count": 1, "mem_size_mib": {mib}}}"#);
            assert_eq!(machine(&json), Err(MachineError::Memory { found: mib }));
        }
        for mib in [32, 33, 65536] {
            let json = format!(r#"{{"vcpu_count": 1, "mem_size_mib": {mib}}}"#);
            assert_eq!(machine(&json).unwrap().memory.bytes(), mib * 1024 * 1024);
        }
    }

    #[test]
    fn what_this_version_cannot_do_is_refused_by_name_and_not_ignored() {
        let with = |more: &str| machine(&format!(r#"{{"vcpu_count": 1, "mem_size_mib": 128, {more}}}"#));
        assert_eq!(
            with(r#""huge_pages": "2M""#),
            Err(MachineError::HugePages(HugePages::Hugetlbfs2M))
        );
        assert_eq!(
            with(r#""huge_pages": "Transparent""#),
            Err(MachineError::HugePages(HugePages::Transparent))
        );
        assert_eq!(
            with(r#""cpu_template": "T2""#),
            Err(MachineError::CpuTemplate(CpuTemplate::T2))
        );
        assert!(with(r#""huge_pages": "None", "cpu_template": "None""#).is_ok());
        assert!(with(r#""cpu_template": null"#).is_ok());
    }

    #[test]
    fn an_update_changes_what_it_names_and_nothing_else() {
        let before = machine(r#"{"vcpu_count": 2, "mem_size_mib": 256, "track_dirty_pages": true}"#).unwrap();
        let update: MachineUpdate = serde_json::from_str(r#"{"mem_size_mib": 512}"#).unwrap();
        let after = Machine::try_from(update.onto(&before)).unwrap();
        assert_eq!(
            after,
            Machine {
                memory: MemorySize::from_mib(512).unwrap(),
                ..before
            }
        );
        assert!(serde_json::from_str::<MachineUpdate>("{}").unwrap().is_empty());
        assert!(!update.is_empty());
    }

    #[test]
    fn unknown_and_missing_fields_are_refused() {
        for json in [
            r#"{"vcpu_count": 1, "mem_size_mib": 128, "cores": 1}"#,
            r#"{"vcpu_count": 1}"#,
            "{}",
        ] {
            assert!(serde_json::from_str::<MachineBody>(json).is_err(), "{json}");
        }
        assert!(serde_json::from_str::<MachineUpdate>(r#"{"cores": 1}"#).is_err());
    }
}
