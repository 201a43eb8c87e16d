//! Connections that outlive an image: the next image of the same server finds them open.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::ClientConfig;

use super::client::RemoteSettings;
use super::connection::Dial;
use super::error::RemoteError;
use super::pool::Pool;
use super::url::Origin;
use crate::tls;

/// The most servers whose connections are kept: those that are asked, and those that they redirect to.
const ORIGINS_MAX: usize = 64;

/// Connections by server, shared by all clones of the settings that hold this.
#[derive(Clone, Default)]
pub struct KeptConnections(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    pools: HashMap<Origin, Arc<Pool>>,
    tls: Option<Arc<ClientConfig>>,
}

impl KeptConnections {
    /// The connections to one server.
    pub(super) fn to(&self, origin: &Origin, settings: &RemoteSettings) -> Result<Arc<Pool>, RemoteError> {
        let mut kept = self.lock();
        if let Some(pool) = kept.pools.get(origin) {
            return Ok(Arc::clone(pool));
        }
        let tls = match origin.tls {
            true => Some(kept.tls(settings.authorities.as_deref())?),
            false => None,
        };
        if kept.pools.len() >= ORIGINS_MAX {
            // What is in use stays open for its users, and comes back.
            kept.pools.clear();
        }
        let dial = Dial {
            origin: origin.clone(),
            tls,
            connect_deadline: settings.connect_deadline,
            idle_deadline: settings.idle_deadline,
        };
        let pool = Arc::new(Pool::new(dial, settings.connections.max(1)));
        kept.pools.insert(origin.clone(), Arc::clone(&pool));
        Ok(pool)
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn tls(&mut self, authorities: Option<&Path>) -> Result<Arc<ClientConfig>, RemoteError> {
        if let Some(config) = &self.tls {
            return Ok(Arc::clone(config));
        }
        let config = tls::client_config(authorities)?;
        Ok(Arc::clone(self.tls.insert(config)))
    }
}

impl fmt::Debug for KeptConnections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().pools.keys()).finish()
    }
}
