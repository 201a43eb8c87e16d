//! What KVM itself can do: recorded by the kernel's names of its capabilities, and checked where a saved machine cannot be
//! put back without.

use std::collections::BTreeMap;

use kvm_ioctls::Cap;
use serde_json::{Map, Value};

use super::{Capability, Incompatible, malformed};

const NAME: &str = "kvm.capabilities";

/// Whether a machine that was saved with a capability can be resumed without.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weight {
    Needed,
    /// It is held against the saved registers themselves, or is for people.
    Told,
}

const CAPABILITIES: [(&str, Cap, Weight); 21] = {
    use Weight::{Needed, Told};
    [
        ("KVM_CAP_ADJUST_CLOCK", Cap::AdjustClock, Needed),
        ("KVM_CAP_CLOCKSOURCE", Cap::Clocksource, Needed),
        ("KVM_CAP_DEBUGREGS", Cap::Debugregs, Needed),
        ("KVM_CAP_EXT_CPUID", Cap::ExtCpuid, Needed),
        ("KVM_CAP_GET_TSC_KHZ", Cap::GetTscKhz, Told),
        ("KVM_CAP_IMMEDIATE_EXIT", Cap::ImmediateExit, Needed),
        ("KVM_CAP_INTR_SHADOW", Cap::IntrShadow, Needed),
        ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd, Needed),
        ("KVM_CAP_IRQCHIP", Cap::Irqchip, Needed),
        ("KVM_CAP_IRQFD", Cap::Irqfd, Needed),
        ("KVM_CAP_KVMCLOCK_CTRL", Cap::KvmclockCtrl, Told),
        ("KVM_CAP_MAX_VCPUS", Cap::MaxVcpus, Told),
        ("KVM_CAP_MP_STATE", Cap::MpState, Needed),
        ("KVM_CAP_PIT2", Cap::Pit2, Needed),
        ("KVM_CAP_PIT_STATE2", Cap::PitState2, Needed),
        ("KVM_CAP_TSC_CONTROL", Cap::TscControl, Told),
        ("KVM_CAP_TSC_DEADLINE_TIMER", Cap::TscDeadlineTimer, Needed),
        ("KVM_CAP_USER_MEMORY", Cap::UserMemory, Needed),
        ("KVM_CAP_VCPU_EVENTS", Cap::VcpuEvents, Needed),
        ("KVM_CAP_XCRS", Cap::Xcrs, Needed),
        ("KVM_CAP_XSAVE", Cap::Xsave, Needed),
    ]
};

/// What the KVM of this host answers.
#[must_use]
pub fn of_kvm(capability: &Capability<'_>) -> (String, Value) {
    let answers: Map<String, Value> = CAPABILITIES
        .iter()
        .map(|(name, cap, _)| ((*name).to_owned(), capability(*cap).into()))
        .collect();
    (NAME.to_owned(), Value::Object(answers))
}

/// What a machine was saved with and this host's KVM lacks.
pub(super) fn lacking(
    record: &BTreeMap<String, Value>,
    capability: &Capability<'_>,
) -> Result<Vec<String>, Incompatible> {
    let Some(value) = record.get(NAME) else {
        return Ok(Vec::new());
    };
    let answers = value.as_object().ok_or_else(|| malformed(NAME, value))?;
    let mut lacking = Vec::new();
    for (name, cap, weight) in &CAPABILITIES {
        let Some(answer) = answers.get(*name) else {
            continue;
        };
        let had = answer.as_i64().ok_or_else(|| malformed(NAME, value))?;
        if *weight == Weight::Needed && had > 0 && capability(*cap) <= 0 {
            lacking.push((*name).to_owned());
        }
    }
    Ok(lacking)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without(lacked: &'static [Cap]) -> impl Fn(Cap) -> i32 {
        move |cap| i32::from(!lacked.contains(&cap))
    }

    #[test]
    fn what_a_machine_is_put_back_with_must_be_there_and_the_rest_is_told() {
        let record = BTreeMap::from([of_kvm(&without(&[]))]);
        assert_eq!(lacking(&record, &without(&[])).unwrap(), [""; 0]);
        let less = without(&[Cap::TscDeadlineTimer, Cap::TscControl, Cap::Xcrs]);
        assert_eq!(
            lacking(&record, &less).unwrap(),
            ["KVM_CAP_TSC_DEADLINE_TIMER", "KVM_CAP_XCRS"]
        );
        // It did not have it where it ran, and needs it nowhere.
        let record = BTreeMap::from([of_kvm(&without(&[Cap::Xcrs]))]);
        assert_eq!(lacking(&record, &without(&[Cap::Xcrs])).unwrap(), [""; 0]);
    }

    #[test]
    fn an_older_record_asks_for_nothing_and_nonsense_is_refused() {
        assert_eq!(lacking(&BTreeMap::new(), &|_| 0).unwrap(), [""; 0]);
        for value in [Value::Null, serde_json::json!({"KVM_CAP_XCRS": "yes"})] {
            let record = BTreeMap::from([(NAME.to_owned(), value)]);
            assert!(matches!(
                lacking(&record, &|_| 1),
                Err(Incompatible::Malformed { .. })
            ));
        }
    }
}
