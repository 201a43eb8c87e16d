//! Why a request was refused before anybody looked at what it asks for. The texts are Firecracker's.

use super::route::Verb;
use crate::config::SnapshotError;

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The path ends where a name should be.
    #[error("The ID cannot be empty.")]
    EmptyId,
    /// A name that Firecracker would not take.
    #[error("API Resource IDs can only contain alphanumeric characters and underscores.")]
    InvalidId,
    /// A drive's name in the body is not the one in the path.
    #[error("The id from the path does not match the id from the body!")]
    DriveId,
    /// An interface's name in the body is not the one in the path.
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    InterfaceId {
        /// In the path.
        path: String,
        /// In the body.
        body: String,
    },
    /// Nobody serves that.
    #[error("Invalid request method and/or path: {verb} {path}.")]
    Unknown {
        /// How.
        verb: Verb,
        /// What, without the first slash.
        path: String,
    },
    /// Firecracker serves it.
    #[error("{verb} {path} is not supported by this version of Runnel.")]
    Later {
        /// How.
        verb: Verb,
        /// What, without the first slash.
        path: String,
    },
    /// `/snapshot` and nothing after it.
    #[error("Missing snapshot operation type.")]
    NoSnapshotOperation,
    /// A `GET` with a body.
    #[error("GET request cannot have a body.")]
    BodyOfGet,
    /// A `DELETE` with a body.
    #[error("DELETE request cannot have a body.")]
    BodyOfDelete,
    /// A `PUT` without a body.
    #[error("Empty PUT request.")]
    EmptyPut,
    /// A `PATCH` without a body, or with one that changes nothing.
    #[error("Empty PATCH request.")]
    EmptyPatch,
    /// The body is not what the path takes.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
    /// The body is what the path takes, and asks for what cannot be.
    #[error("{0}.")]
    Snapshot(SnapshotError),
    /// A method that is not of this API.
    #[error("Invalid HTTP Method: Unsupported HTTP method.")]
    Method,
    /// Too large a body.
    #[error("Request payload with size {size} is larger than the limit of {limit} allowed by server.")]
    TooLarge {
        /// So large, or at least so large where the length is not announced.
        size: u64,
        /// So large at most.
        limit: usize,
    },
    /// The body did not come as announced.
    #[error("The request's body could not be read: {0}")]
    Body(String),
    /// There is nothing to cancel.
    #[error("There is no such operation under way.")]
    NothingToCancel,
}

impl From<SnapshotError> for RequestError {
    fn from(error: SnapshotError) -> Self {
        match error {
            // Of fields that are missing or too many Firecracker makes errors of its parser.
            SnapshotError::Missing(_) | SnapshotError::NoMemory | SnapshotError::TwoMemories => {
                Self::Json(serde::de::Error::custom(error))
            }
            other => Self::Snapshot(other),
        }
    }
}
