//! Capture: volumes and machine state become an image.

pub mod volume_writer;
