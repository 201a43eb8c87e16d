//! A capture under way, as the operation that the API shows and cancels.

use std::sync::Arc;

use runnel_snapshot::capture::Progress;
use runnel_snapshot::capture::progress::Stage;

use crate::control::Operation;

/// Lets `operation` show how far `progress` is, and call it off.
pub fn watch(operation: &Operation, progress: &Arc<Progress>) {
    let seen = Arc::clone(progress);
    operation.measure_with(move || {
        seen.volumes().iter().fold((0, 0), |(done, total), volume| {
            (done + volume.bytes_done, total + volume.bytes_total)
        })
    });
    let enter = operation.phases();
    progress.on_stage(move |stage| match stage {
        Stage::Copying | Stage::Published => {}
        Stage::Publishing => enter("publishing"),
    });
    let told = Arc::clone(progress);
    operation.on_cancel(move || told.cancel());
}

#[cfg(test)]
mod tests {
    use runnel_snapshot::volume::VolumeName;

    use super::*;
    use crate::config::InstanceId;
    use crate::control::{OperationKind, Status};

    #[test]
    fn a_capture_is_shown_and_called_off_through_its_operation() {
        let status = Status::new(InstanceId::default());
        let operation = status.begin(OperationKind::Create);
        let drive = VolumeName::Drive("rootfs".to_owned());
        let progress = Arc::new(Progress::new([(VolumeName::Memory, 100), (drive, 50)]));
        watch(&operation, &progress);
        let shown = status.progress().unwrap();
        assert_eq!((shown.bytes_done, shown.bytes_total), (0, 150));
        assert!(!progress.is_cancelled());
        assert!(status.cancel(OperationKind::Create));
        assert!(progress.is_cancelled());
    }
}
