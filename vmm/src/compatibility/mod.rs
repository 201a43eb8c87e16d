//! What a host must have for a machine: recorded when it is saved, checked before the first section is restored.
//!
//! The record is a map by names that people can read:
//!
//! | name | holds | is checked |
//! | --- | --- | --- |
//! | `cpuid.*` | feature words, in hexadecimal | each bit that the machine was offered must be there; a missing one is named |
//! | `cpuid.vendor` | the processor's maker | must be the same |
//! | `cpuid.physical_address_bits` | a number | must be reached |
//! | `xcr0` | the extended state that the guest enabled | each bit must be possible |
//! | `kvm.capabilities` | what KVM answered, by the kernel's names | those that a saved machine is put back with must be there |
//! | `tsc.khz`, `host.kernel` | the frequency, the kernel | for people |
//!
//! The registers themselves, and the TSC's frequency that they count in, are refused by their sections, by name too and
//! before the first instruction: only KVM knows what it takes. An entry that is not there, as in images of older
//! versions, is not checked.

mod capabilities;
mod words;

pub use capabilities::of_kvm;

use std::collections::{BTreeMap, BTreeSet};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Cap;
use serde_json::Value;

use words::WORDS;

const VENDOR: &str = "cpuid.vendor";
const ADDRESS_BITS: &str = "cpuid.physical_address_bits";
const XCR0: &str = "xcr0";

/// What KVM answers for a capability; 0 where it is not there.
pub type Capability<'a> = dyn Fn(Cap) -> i32 + 'a;

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
    if let Some(bits) = address_bits(cpuid) {
        record.insert(ADDRESS_BITS.to_owned(), bits.into());
    }
    let uname = rustix::system::uname();
    record.insert(
        "host.kernel".to_owned(),
        Value::String(uname.release().to_string_lossy().into_owned()),
    );
    record
}

/// What a vCPU has beyond what it says of itself: the extended state that its guest enabled, and the frequency of its
/// time stamp counter, 0 if the host did not know.
#[must_use]
pub fn of_vcpu(xcr0: u64, tsc_khz: u32) -> [(String, Value); 2] {
    [
        (XCR0.to_owned(), Value::String(format!("{xcr0:#x}"))),
        ("tsc.khz".to_owned(), tsc_khz.into()),
    ]
}

/// Holds `record` against a host that can give a vCPU `host`, and whose KVM has `capability`. Entries that this Runnel
/// does not know are left alone: they concern what it does not offer.
///
/// # Errors
/// What the host lacks, by name.
pub fn check(
    record: &BTreeMap<String, Value>,
    host: &[kvm_cpuid_entry2],
    capability: &Capability<'_>,
) -> Result<(), Incompatible> {
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
        let wanted = hexadecimal(word.name, value)?;
        let wanted = u32::try_from(wanted).map_err(|_| malformed(word.name, value))?;
        let lacking = wanted & !word.of(host) & !word.ignored;
        missing.extend(
            (0u8..32)
                .filter(|bit| lacking >> bit & 1 == 1)
                .map(|bit| word.name_of(bit)),
        );
    }
    missing.extend(lacking_address_bits(record, host)?);
    missing.extend(lacking_state(record, host)?);
    missing.extend(capabilities::lacking(record, capability)?);
    // The same may be missing in two ways.
    let mut seen = BTreeSet::new();
    missing.retain(|name| seen.insert(name.clone()));
    if missing.is_empty() {
        Ok(())
    } else {
        Err(Incompatible::Features(missing))
    }
}

/// Physical addresses that the guest may have put into its page tables, and that this processor takes for malformed.
fn lacking_address_bits(
    record: &BTreeMap<String, Value>,
    host: &[kvm_cpuid_entry2],
) -> Result<Option<String>, Incompatible> {
    let (Some(value), Some(has)) = (record.get(ADDRESS_BITS), address_bits(host)) else {
        return Ok(None);
    };
    let wanted = value.as_u64().ok_or_else(|| malformed(ADDRESS_BITS, value))?;
    let is_lacking = wanted > u64::from(has);
    Ok(is_lacking.then(|| format!("physical addresses of {wanted} bits (it has {has})")))
}

/// Extended state that the guest enabled, and that this processor does not have.
fn lacking_state(
    record: &BTreeMap<String, Value>,
    host: &[kvm_cpuid_entry2],
) -> Result<Vec<String>, Incompatible> {
    let Some(value) = record.get(XCR0) else {
        return Ok(Vec::new());
    };
    let wanted = hexadecimal(XCR0, value)?;
    let leaf = host.iter().find(|leaf| (leaf.function, leaf.index) == (0xd, 0));
    // Without the leaf there is x87 and SSE, whose state has always been there.
    let has = leaf.map_or(0b11, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    let word = WORDS.iter().find(|word| word.name == "cpuid.d.0.eax");
    let name = |bit: u8| match word {
        Some(word) if bit < 32 => word.name_of(bit),
        _ => format!("{XCR0} bit {bit}"),
    };
    let lacking = wanted & !has;
    Ok((0..64).filter(|bit| lacking >> bit & 1 == 1).map(name).collect())
}

fn address_bits(cpuid: &[kvm_cpuid_entry2]) -> Option<u8> {
    let leaf = cpuid.iter().find(|leaf| leaf.function == 0x8000_0008)?;
    Some(leaf.eax.to_le_bytes()[0])
}

fn hexadecimal(name: &str, value: &Value) -> Result<u64, Incompatible> {
    let digits = text(name, value)?.strip_prefix("0x");
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| malformed(name, value))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A KVM that has everything.
    fn all(_: Cap) -> i32 {
        1
    }

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
        assert_eq!(check(&record, &host(1 << 5 | 1 << 16), &all), Ok(()));
        let refusal = check(&record, &host(1 << 16), &all).unwrap_err();
        assert_eq!(refusal, Incompatible::Features(vec!["avx2".to_owned()]));
        assert!(refusal.to_string().contains("avx2"), "{refusal}");
    }

    #[test]
    fn another_maker_is_refused_by_name() {
        let mut amd = host(0);
        amd[0].ebx = u32::from_le_bytes(*b"Auth");
        assert!(matches!(
            check(&record(&host(0)), &amd, &all),
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
        assert_eq!(check(&record(&saved), &host(0), &all), Ok(()));
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
                check(&record, &host(0), &all),
                Err(Incompatible::Malformed { .. })
            ));
        }
        let unknown = BTreeMap::from([("gpu".to_owned(), Value::Bool(true))]);
        assert_eq!(check(&unknown, &host(0), &all), Ok(()));
    }
    fn leaf(function: u32, index: u32, eax: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ecx,
            ..Default::default()
        }
    }

    #[test]
    fn addresses_and_extended_state_that_a_host_lacks_are_named() {
        const AVX512: u32 = 1 << 5 | 1 << 6 | 1 << 7;
        let with = |bits, xcr0, xss| {
            let mut cpuid = host(0);
            cpuid.extend([
                leaf(0x8000_0008, 0, bits, 0),
                leaf(0xd, 0, xcr0, 0),
                leaf(0xd, 1, 0, xss),
            ]);
            cpuid
        };
        let saved = with(46, 7 | AVX512, 1 << 12);
        let mut record = record(&saved);
        record.extend(of_vcpu(u64::from(7 | AVX512), 2_000_000));
        assert_eq!(check(&record, &saved, &all), Ok(()));
        assert_eq!(check(&record, &with(52, 7 | AVX512, 1 << 12), &all), Ok(()));
        let refusal = check(&record, &with(39, 7, 0), &all).unwrap_err().to_string();
        for name in [
            "physical addresses of 46 bits (it has 39)",
            "the state of AVX-512",
            "the state of CET in kernel mode",
        ] {
            assert_eq!(refusal.matches(name).count(), 1, "{name}: {refusal}");
        }
    }

    #[test]
    fn what_the_guest_enabled_must_be_possible_even_if_nothing_else_was_recorded() {
        let record = BTreeMap::from(of_vcpu(1 << 17, 0));
        let refusal = check(&record, &host(0), &all).unwrap_err();
        assert_eq!(
            refusal,
            Incompatible::Features(vec!["the state of AMX".to_owned()])
        );
    }
}
