//! Connections to whoever leads.
//!
//! The engine forwards requests to the leader by itself, over one connection that notices a leader which stands still only after 35 s. So we
//! forward on connections of our own, made anew for each leadership: they live in a runtime of their own, and ending that ends all that hangs on them.

use crate::failures::Trouble;
use blixard_raft::Client;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Mutex;
use tokio::time::sleep;

const LOOK: Duration = Duration::from_millis(50);

pub struct Links {
    local: Client,
    own_id: u64,
    secret: String,
    /// With TLS: whether certificates are verified.
    tls: Option<bool>,
    current: Mutex<Option<Link>>,
}

struct Link {
    term: u64,
    leader: u64,
    client: Client,
    runtime: Option<Runtime>,
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Links {
    pub fn new(local: Client, own_id: u64, secret: String, tls: Option<bool>) -> Arc<Self> {
        Arc::new(Links { local, own_id, secret, tls, current: Mutex::new(None) })
    }

    /// Let go of the connection to a leader that leads no more, as soon as this is known: requests on it fail then, and can be repeated.
    pub async fn watch(self: Arc<Self>) {
        loop {
            sleep(LOOK).await;
            let Ok((term, leader)) = blixard_raft::leadership(&self.local).await else { continue };
            let mut current = self.current.lock().await;
            let is_old =
                current.as_ref().is_some_and(|link| leader.as_ref().is_some_and(|(id, _)| (link.term, link.leader) != (term, *id)));
            if is_old {
                *current = None;
            }
        }
    }

    /// Where a write goes: to this node's own client if it leads, else to a connection.
    pub async fn for_write(&self) -> Result<Client, Trouble> {
        let (_, leader) = blixard_raft::leadership(&self.local).await?;
        if leader.is_some_and(|(id, _)| id == self.own_id) && blixard_raft::writes_here(&self.local).await? {
            return Ok(self.local.clone());
        }
        self.for_read().await
    }

    /// A connection to the leader, who may be this node.
    pub async fn for_read(&self) -> Result<Client, Trouble> {
        let (term, leader) = blixard_raft::leadership(&self.local).await?;
        let Some((leader, address)) = leader else { return Err(Trouble::NoLeader("the nodes are electing a leader".into())) };
        let mut current = self.current.lock().await;
        if let Some(link) = current.as_ref().filter(|link| (link.term, link.leader) == (term, leader)) {
            return Ok(link.client.clone());
        }
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("blixard-link").enable_all().build();
        let runtime = runtime.map_err(|error| Trouble::NoLeader(format!("no thread for a connection: {error}")))?;
        let opening = blixard_raft::link(address, self.secret.clone(), self.tls.is_some(), self.tls.unwrap_or(true));
        let opened = runtime.spawn(opening).await;
        // Owned by a link from here on: a runtime must not be dropped in a task.
        match opened {
            Ok(Ok(client)) => {
                *current = Some(Link { term, leader, client: client.clone(), runtime: Some(runtime) });
                Ok(client)
            }
            other => {
                runtime.shutdown_background();
                Err(Trouble::NoLeader(format!("no connection to the leader: {:?}", other.err().map(|error| error.to_string()))))
            }
        }
    }
}
