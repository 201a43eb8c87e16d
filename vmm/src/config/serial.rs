//! `serial`: where the guest's serial console ends on the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::limiter::{LimiterUnsupported, TokenBucketBody, refuse_bucket};

/// `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialBody {
    /// A file or named pipe that gets what the guest writes.
    pub serial_out_path: Option<PathBuf>,
    /// Limits what the guest writes.
    pub rate_limiter: Option<TokenBucketBody>,
    /// Runnel's own: a unix socket to make, at which one client at a time reads and writes the console.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_socket_path: Option<PathBuf>,
}

/// Why the console cannot end there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SerialError {
    /// A rate limit is asked for.
    #[error(transparent)]
    Limiter(#[from] LimiterUnsupported),
    /// Two ends.
    #[error("serial_out_path and serial_socket_path exclude each other: give one of them")]
    TwoEnds,
}

/// Where the serial console ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Serial {
    /// The monitor's standard input and output.
    #[default]
    Standard,
    /// A file or a named pipe; the guest hears nothing.
    File(PathBuf),
    /// A unix socket that the monitor makes.
    Socket(PathBuf),
}

impl TryFrom<SerialBody> for Serial {
    type Error = SerialError;

    fn try_from(body: SerialBody) -> Result<Self, SerialError> {
        refuse_bucket("rate_limiter", body.rate_limiter.as_ref())?;
        match (body.serial_out_path, body.serial_socket_path) {
            (None, None) => Ok(Self::Standard),
            (Some(file), None) => Ok(Self::File(file)),
            (None, Some(socket)) => Ok(Self::Socket(socket)),
            (Some(_), Some(_)) => Err(SerialError::TwoEnds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial(json: &str) -> Result<Serial, SerialError> {
        serde_json::from_str::<SerialBody>(json).unwrap().try_into()
    }

    #[test]
    fn the_console_has_one_end() {
        assert_eq!(serial("{}"), Ok(Serial::Standard));
        assert_eq!(
            serial(r#"{"serial_out_path": "/tmp/out"}"#),
            Ok(Serial::File("/tmp/out".into()))
        );
        assert_eq!(
            serial(r#"{"serial_socket_path": "/tmp/s"}"#),
            Ok(Serial::Socket("/tmp/s".into()))
        );
        assert_eq!(
            serial(r#"{"serial_out_path": "a", "serial_socket_path": "b"}"#),
            Err(SerialError::TwoEnds)
        );
        let limited = serial(r#"{"rate_limiter": {"size": 10, "refill_time": 10}}"#);
        assert!(matches!(limited, Err(SerialError::Limiter(_))));
    }
}
