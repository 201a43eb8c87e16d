//! The HTTP API on a unix socket: Firecracker's paths, fields, codes and texts, and Runnel's own beside them.
//!
//! ```text
//!  client ──► server (tokio, one thread) ──► route ──► call ──┬──► status: GET /, /version, progress, cancel
//!                                                             └──► inbox ──► control thread ──► answer
//! ```
//!
//! `resources/openapi.yaml` describes exactly what [`ROUTES`] serves; a test holds one against the other.
//!
//! What the API's thread answers by itself never waits for the control thread, which a snapshot keeps busy for
//! seconds. **Never**: touches guest memory, whose pages may be missing.

mod call;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod response;
mod route;
mod server;
mod socket;

#[cfg(test)]
mod tests;

pub use error::RequestError;
pub use route::{Endpoint, ROUTES, Route, Verb};
pub use server::{ApiServer, ServeError};
pub use socket::{ApiSocket, BindError};

/// Bytes of a body unless `--http-api-max-payload-size` says otherwise; Firecracker's limit.
pub const BODY_BYTES_MAX: usize = 51200;
