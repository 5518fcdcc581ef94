//! The few calls of hiqlite that Blixard makes. The engine is full of generic code, which is compiled where it is used: here, and only here.

pub use hiqlite::rusqlite;
pub use hiqlite::tls::{ServerTlsConfig, ServerTlsConfigCerts};
pub use hiqlite::{Client, Error, Node, NodeConfig, RaftConfig};
use hiqlite::{Param, Row};
use std::future::Future;
use std::pin::Pin;

pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

pub fn start(config: NodeConfig) -> Boxed<'static, Client> {
    Box::pin(hiqlite::start_node(config))
}

/// Put a statement with one blob parameter into the log; return the blob `answer` of its one row, once this is applied at the leader.
pub fn write<'a>(client: &'a Client, sql: &'static str, request: Vec<u8>) -> Boxed<'a, Vec<u8>> {
    Box::pin(async move {
        let rows = client.execute_returning(sql, vec![Param::Blob(request)]).await?;
        rows.into_iter().next().ok_or_else(no_answer)??.try_get("answer")
    })
}

/// The same for a read at the leader, who first makes sure that it is the leader.
pub fn read_at_leader<'a>(client: &'a Client, sql: &'static str, request: Vec<u8>) -> Boxed<'a, Vec<u8>> {
    Box::pin(async move { take_answer(client.query_consistent(sql, vec![Param::Blob(request)]).await?) })
}

/// The same from this node's own database.
pub fn read_here<'a>(client: &'a Client, sql: &'static str, request: Vec<u8>) -> Boxed<'a, Vec<u8>> {
    Box::pin(async move { take_answer(client.query_raw(sql, vec![Param::Blob(request)]).await?) })
}

fn take_answer(rows: Vec<Row<'_>>) -> Result<Vec<u8>, Error> {
    rows.into_iter().next().ok_or_else(no_answer)?.try_get("answer")
}

fn no_answer() -> Error {
    Error::Sqlite("the statement returned no row".into())
}

/// Open a connection of its own to the API of one member. It is set up in the background of the runtime that polls this, reconnects as long as
/// that runtime lives, and ends with it.
pub fn link(address: String, secret: String, tls: bool, verify: bool) -> Boxed<'static, Client> {
    Box::pin(Client::remote(vec![address], tls, !verify, secret, true, None))
}

/// Who leads, as far as this node knows: the term, and the leader's id and API address.
pub fn leadership(client: &Client) -> Boxed<'_, (u64, Option<(u64, String)>)> {
    Box::pin(async move {
        let metrics = client.metrics_db().await?;
        let address =
            |id: u64| metrics.membership_config.nodes().find(|(member, _)| **member == id).map(|(_, node)| (id, node.addr_api.clone()));
        Ok((metrics.current_term, metrics.current_leader.and_then(address)))
    })
}

/// Whether writes through this client are carried out here, without any connection.
pub fn writes_here(client: &Client) -> Boxed<'_, bool> {
    Box::pin(async move { Ok(client.is_leader_db().await) })
}

pub fn shutdown(client: &Client) -> Boxed<'_, ()> {
    Box::pin(client.shutdown())
}

/// What a node knows about its cluster.
pub struct Status {
    pub node_id: u64,
    pub state: String,
    pub leader: Option<u64>,
    pub term: u64,
    pub last_log: Option<u64>,
    pub last_applied: Option<u64>,
    pub snapshot: Option<u64>,
    pub purged: Option<u64>,
    pub quorum_ms: Option<u64>,
    pub failure: Option<String>,
    /// Id, Raft address, API address, whether it votes.
    pub members: Vec<(u64, String, String, bool)>,
    /// At the leader: how far each member's log has come.
    pub replicated: Vec<(u64, Option<u64>)>,
}

pub fn status(client: &Client) -> Boxed<'_, Status> {
    Box::pin(async move {
        let metrics = client.metrics_db().await?;
        let membership = &metrics.membership_config;
        let voters: Vec<u64> = membership.voter_ids().collect();
        let member = |(id, node): (&u64, &Node)| (*id, node.addr_raft.clone(), node.addr_api.clone(), voters.contains(id));
        Ok(Status {
            node_id: metrics.id,
            state: format!("{:?}", metrics.state).to_lowercase(),
            leader: metrics.current_leader,
            term: metrics.current_term,
            last_log: metrics.last_log_index,
            last_applied: metrics.last_applied.map(|log| log.index),
            snapshot: metrics.snapshot.map(|log| log.index),
            purged: metrics.purged.map(|log| log.index),
            quorum_ms: metrics.millis_since_quorum_ack,
            failure: metrics.running_state.as_ref().err().map(ToString::to_string),
            members: membership.nodes().map(member).collect(),
            replicated: metrics.replication.iter().flatten().map(|(id, log)| (*id, log.map(|log| log.index))).collect(),
        })
    })
}

pub fn default_raft_config(logs_until_snapshot: u64) -> RaftConfig {
    NodeConfig::default_raft_config(logs_until_snapshot)
}
