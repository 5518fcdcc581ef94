//! One member of a cluster, running in this process.

use crate::bridge::{Delivery, spawn};
use crate::codec::{Answer, Outcome, ReadRequest, WriteRequest};
use crate::failures::Trouble;
use crate::links::Links;
use crate::shared::{self, Shared};
use crate::values::{PyOperation, from_outcomes};
use blixard_raft::{Client, Node, NodeConfig, RaftConfig, ServerTlsConfig, ServerTlsConfigCerts, Status};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::{Instant, timeout, timeout_at};

const THREADS: usize = 2;
const READERS: usize = 4;
const APPLY: &str = "SELECT blixard_apply($1) AS answer";
const READ: &str = "SELECT blixard_read($1) AS answer";

#[pyclass(frozen, name = "Node", module = "blixard_hiqlite")]
pub struct PyNode {
    client: Client,
    links: Arc<Links>,
    shared: Arc<Shared>,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
}

impl Drop for PyNode {
    fn drop(&mut self) {
        self.stop_runtime();
    }
}

impl PyNode {
    /// Without waiting: whoever drops a node may hold the interpreter's lock, which tasks of the runtime want.
    fn stop_runtime(&self) {
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            self.shared.close();
            runtime.shutdown_background();
        }
    }

    fn check_open(&self) -> PyResult<()> {
        if self.shared.is_closing() {
            return Err(Trouble::Closed.into());
        }
        Ok(())
    }
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Settings {
    node_id: u64,
    members: Vec<(u64, String, String)>,
    data_dir: String,
    listen_raft: String,
    listen_api: String,
    secret_raft: String,
    secret_api: String,
    heartbeat_ms: u64,
    election_ms: (u64, u64),
    logs_until_snapshot: u64,
    log_file_bytes: u32,
    tls: Option<(String, String)>,
    is_learner: bool,
    start_seconds: f64,
}

impl Settings {
    fn into_config(self) -> Result<NodeConfig, Trouble> {
        let tls = self.tls.map(|(certificate, key)| ServerTlsConfig::Specific(ServerTlsConfigCerts::new(key, certificate)));
        let wal_sync = "immediate".try_into().map_err(|_| Trouble::StartFailed("the engine does not know its mode 'immediate'".into()))?;
        Ok(NodeConfig {
            node_id: self.node_id,
            nodes: self.members.into_iter().map(|(id, addr_raft, addr_api)| Node { id, addr_raft, addr_api }).collect(),
            listen_addr_api: self.listen_api.into(),
            listen_addr_raft: self.listen_raft.into(),
            data_dir: self.data_dir.into(),
            // The default acknowledges what no disk has yet.
            wal_sync,
            wal_size: self.log_file_bytes,
            read_pool_size: READERS,
            raft_config: RaftConfig {
                heartbeat_interval: self.heartbeat_ms,
                // All entries of one message must arrive within a heartbeat.
                max_payload_entries: 8,
                election_timeout_min: self.election_ms.0,
                election_timeout_max: self.election_ms.1,
                ..blixard_raft::default_raft_config(self.logs_until_snapshot)
            },
            tls_raft: tls.clone(),
            tls_api: tls,
            secret_raft: self.secret_raft,
            secret_api: self.secret_api,
            health_check_delay: Duration::from_secs(1),
            learner_only: self.is_learner,
            ..Default::default()
        })
    }
}

/// Start a member of a cluster; the awaitable is its `Node`.
///
/// It is ready once the node belongs to a cluster, which may need the others to be started. After `start_seconds` the start is given up.
#[pyfunction]
pub fn start<'py>(py: Python<'py>, settings: Settings) -> PyResult<Bound<'py, PyAny>> {
    let runtime = build_runtime().map_err(|error| Trouble::StartFailed(format!("no threads for the node: {error}")))?;
    let handle = runtime.handle().clone();
    spawn(py, &handle.clone(), async move {
        let (own_id, secret, tls) = (settings.node_id, settings.secret_api.clone(), settings.tls.as_ref().map(|_| true));
        let patience = Duration::from_secs_f64(settings.start_seconds);
        let late = Trouble::StartFailed(format!("it did not become a member of the cluster within {patience:?}"));
        let started = timeout(patience, start_client(settings)).await.unwrap_or(Err(late));
        let delivery: Delivery = Box::new(move |py| {
            let built = match started {
                Ok((client, shared)) => {
                    let links = Links::new(client.clone(), own_id, secret, tls);
                    handle.spawn(Arc::clone(&links).watch());
                    PyNode { client, links, shared, handle, runtime: Mutex::new(Some(runtime)) }
                }
                Err(trouble) => {
                    runtime.shutdown_background();
                    return Err(trouble.into());
                }
            };
            Ok(Py::new(py, built)?.into_any())
        });
        delivery
    })
}

fn build_runtime() -> std::io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(THREADS).thread_name("blixard-hiqlite").enable_all().build()
}

async fn start_client(settings: Settings) -> Result<(Client, Arc<Shared>), Trouble> {
    let config = settings.into_config()?;
    let shared = Shared::new();
    let path =
        database_path(&config.data_dir).map_err(|error| Trouble::StartFailed(format!("the directory {}: {error}", config.data_dir)))?;
    shared::register(path, &shared);
    // In a task of its own: the engine panics where it cannot start, and the message is what the caller must hear.
    match tokio::spawn(blixard_raft::start(config)).await {
        Ok(Ok(client)) => Ok((client, shared)),
        Ok(Err(error)) => Err(Trouble::StartFailed(error.to_string())),
        Err(error) => Err(Trouble::StartFailed(panic_message(error))),
    }
}

fn database_path(data_dir: &str) -> std::io::Result<String> {
    let directory = Path::new(data_dir).join("state_machine").join("db");
    std::fs::create_dir_all(&directory)?;
    Ok(directory.canonicalize()?.join("hiqlite.db").to_string_lossy().into_owned())
}

fn panic_message(error: tokio::task::JoinError) -> String {
    if !error.is_panic() {
        return error.to_string();
    }
    let payload = error.into_panic();
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "the engine panicked".into())
}

#[pymethods]
impl PyNode {
    /// Carry out operations in one log entry: `(commit, [rows | counts | Failure, …])`.
    ///
    /// `origin` and `number` name the request: repeating it with the same ones gives the same answer and does nothing twice.
    fn write<'py>(
        &self,
        py: Python<'py>,
        operations: Vec<Bound<'py, PyOperation>>,
        origin: &[u8],
        number: u64,
        base: u64,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.check_open()?;
        let operations = operations.iter().map(|operation| operation.get().inner.clone()).collect();
        let request = WriteRequest { origin: origin.to_vec(), number, base, operations };
        let (links, patience) = (Arc::clone(&self.links), Duration::from_secs_f64(timeout));
        spawn(py, &self.handle, async move { deliver_answer(send_write(&links, request, patience).await) })
    }

    /// Read several statements from one state: `(commit, [rows | Failure, …])`.
    ///
    /// `consistent`: from the leader, who first makes sure that it still is the leader. Else from this node, once it has `least_commit`.
    fn read<'py>(
        &self,
        py: Python<'py>,
        operations: Vec<Bound<'py, PyOperation>>,
        consistent: bool,
        least_commit: u64,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.check_open()?;
        let statements = operations.iter().flat_map(|operation| operation.get().inner.statements.clone()).collect();
        let request = ReadRequest { least_commit, statements };
        let (client, patience) = (self.client.clone(), Duration::from_secs_f64(timeout));
        let (links, shared) = (Arc::clone(&self.links), Arc::clone(&self.shared));
        spawn(py, &self.handle, async move {
            let read = if consistent {
                read_at_leader(&links, request, patience).await
            } else {
                read_here(client, request, shared, patience).await
            };
            deliver_answer(read)
        })
    }

    /// Wait for a change behind commit `seen` on this node, whoever made it; the awaitable is its commit.
    fn next_change<'py>(&self, py: Python<'py>, seen: u64) -> PyResult<Bound<'py, PyAny>> {
        self.check_open()?;
        let mut progress = self.shared.subscribe();
        spawn(py, &self.handle, async move {
            let changed = progress.wait_for(|progress| progress.changed > seen).await.map(|progress| progress.changed);
            let delivery: Delivery = Box::new(move |py| {
                let changed = changed.map_err(|_| PyErr::from(Trouble::Closed))?;
                Ok(changed.into_pyobject(py)?.into_any().unbind())
            });
            delivery
        })
    }

    /// The last commit that this node has applied, and the last one that changed something.
    fn progress(&self) -> (u64, u64) {
        let progress = self.shared.progress();
        (progress.commit, progress.changed)
    }

    /// Why this node stands still, if it does: its disk refuses what the cluster has decided.
    fn trouble(&self) -> Option<String> {
        self.shared.trouble()
    }

    /// What this node knows about the cluster.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.check_open()?;
        let client = self.client.clone();
        spawn(py, &self.handle, async move {
            let status = blixard_raft::status(&client).await.map_err(Trouble::from);
            let delivery: Delivery = Box::new(move |py| Ok(from_status(py, status?)?.into_any().unbind()));
            delivery
        })
    }

    /// Leave the cluster's work in good order and end. The node cannot be used any more, whatever comes of it.
    fn close<'py>(&self, py: Python<'py>, timeout: f64) -> PyResult<Bound<'py, PyAny>> {
        self.check_open()?;
        self.shared.close();
        let (client, patience) = (self.client.clone(), Duration::from_secs_f64(timeout));
        spawn(py, &self.handle, async move {
            let closed = tokio::time::timeout(patience, blixard_raft::shutdown(&client)).await;
            let delivery: Delivery = Box::new(move |py| match closed {
                Ok(Ok(())) => Ok(py.None()),
                Ok(Err(error)) => Err(Trouble::NodeFailed(format!("the node did not end in good order: {error}")).into()),
                Err(_) => Err(Trouble::NodeFailed("the node did not end in time".into()).into()),
            });
            delivery
        })
    }

    /// End the node's threads at once and wait until its ports and files are free. After `close` nothing is lost by it; without, it is
    /// like a crash: the database is built anew from the log at the next start. Blocks; calling it twice is harmless.
    fn end(&self, py: Python<'_>, timeout: f64) {
        self.shared.close();
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Without the interpreter's lock: tasks that are dropped tell those who wait for them.
        py.detach(|| {
            if let Some(runtime) = runtime {
                runtime.shutdown_timeout(Duration::from_secs_f64(timeout));
            }
        });
    }
}

fn from_status(py: Python<'_>, status: Status) -> PyResult<Bound<'_, PyDict>> {
    let entries = PyDict::new(py);
    entries.set_item("node_id", status.node_id)?;
    entries.set_item("state", status.state)?;
    entries.set_item("leader", status.leader)?;
    entries.set_item("term", status.term)?;
    entries.set_item("last_log", status.last_log)?;
    entries.set_item("last_applied", status.last_applied)?;
    entries.set_item("snapshot", status.snapshot)?;
    entries.set_item("purged", status.purged)?;
    entries.set_item("quorum_ms", status.quorum_ms)?;
    entries.set_item("failure", status.failure)?;
    entries.set_item("members", status.members)?;
    entries.set_item("replicated", status.replicated)?;
    Ok(entries)
}

/// Send the entries of a request one after the other; the last one brings the answer. `patience` is for each.
async fn send_write(links: &Links, request: WriteRequest, patience: Duration) -> Result<Answer, Trouble> {
    let client = links.for_write().await?;
    let mut answer = Err(Trouble::Refused("a request without entries".into()));
    for entry in request.entries() {
        let sent = blixard_raft::write(&client, APPLY, entry);
        answer = decode(&timeout(patience, sent).await.map_err(|_| Trouble::OutcomeUnknown("no answer in time".into()))??);
        if let Ok(Answer::Done { commit: 1.., .. }) = answer {
            break; // a repetition: carried out before, whatever part asked
        }
        if answer.is_err() {
            break;
        }
    }
    answer
}

fn decode(answer: &[u8]) -> Result<Answer, Trouble> {
    match Answer::decode(answer).map_err(Trouble::Refused)? {
        Answer::Stale => Err(Trouble::Stale),
        answer => Ok(answer),
    }
}

async fn read_at_leader(links: &Links, request: ReadRequest, patience: Duration) -> Result<Answer, Trouble> {
    let client = links.for_read().await?;
    let sent = blixard_raft::read_at_leader(&client, READ, request.encode());
    decode(&timeout(patience, sent).await.map_err(|_| Trouble::NoLeader("no answer in time".into()))??)
}

async fn read_here(client: Client, request: ReadRequest, shared: Arc<Shared>, patience: Duration) -> Result<Answer, Trouble> {
    let deadline = Instant::now() + patience;
    let behind = || Trouble::Behind(format!("this node has not got commit {} within {patience:?}", request.least_commit));
    let mut progress = shared.subscribe();
    loop {
        // After a start, and after a snapshot came in, the database knows better than we do: so it is asked first.
        let asked = blixard_raft::read_here(&client, READ, request.encode());
        let answer = decode(&timeout_at(deadline, asked).await.map_err(|_| behind())??)?;
        if !matches!(answer, Answer::Behind { .. }) {
            return Ok(answer);
        }
        let short = (Instant::now() + Duration::from_millis(100)).min(deadline);
        let _ = timeout_at(short, progress.wait_for(|progress| progress.commit >= request.least_commit)).await;
        if Instant::now() >= deadline {
            return Err(behind());
        }
    }
}

fn deliver_answer(answer: Result<Answer, Trouble>) -> Delivery {
    Box::new(move |py| {
        let (commit, outcomes): (u64, Vec<Outcome>) = match answer? {
            Answer::Done { commit, outcomes } => (commit, outcomes),
            _ => return Err(Trouble::Refused("an answer that does not fit the request".into()).into()),
        };
        Ok((commit, from_outcomes(py, outcomes)?).into_pyobject(py)?.into_any().unbind())
    })
}
