//! What the SQL functions, which SQLite calls with nothing but a connection, share with the node that owns the file.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tokio::sync::watch;

/// How far the state of one node has come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// The last commit that can be read here.
    pub commit: u64,
    /// The last commit that changed more than our own bookkeeping.
    pub changed: u64,
}

pub struct Shared {
    progress: watch::Sender<Progress>,
    trouble: Mutex<Option<String>>,
    closing: AtomicBool,
    pub attempts: AtomicU64,
}

impl Shared {
    pub fn new() -> Arc<Self> {
        Arc::new(Shared {
            progress: watch::Sender::new(Progress::default()),
            trouble: Mutex::new(None),
            closing: AtomicBool::new(false),
            attempts: AtomicU64::new(0),
        })
    }

    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }

    pub fn subscribe(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// A commit can be read now. `changed`: it did more than our own bookkeeping.
    pub fn committed(&self, commit: u64, changed: bool) {
        self.progress.send_modify(|progress| {
            progress.commit = commit;
            if changed {
                progress.changed = commit;
            }
        });
    }

    /// A snapshot from another node may have replaced the whole state: whoever waits looks again.
    pub fn jumped(&self, commit: u64) {
        self.progress.send_if_modified(|progress| {
            let later = commit > progress.commit;
            if later {
                *progress = Progress { commit, changed: commit };
            }
            later
        });
    }

    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    pub fn set_trouble(&self, trouble: Option<String>) {
        *lock(&self.trouble) = trouble;
    }

    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The nodes of this process by their database file. A global, because SQLite's auto-extensions are global to the
/// process and get nothing but the connection.
static NODES: Mutex<Option<HashMap<String, Weak<Shared>>>> = Mutex::new(None);

pub fn register(path: String, shared: &Arc<Shared>) {
    let mut nodes = lock(&NODES);
    let nodes = nodes.get_or_insert_with(HashMap::new);
    nodes.retain(|_, node| node.strong_count() > 0);
    nodes.insert(path, Arc::downgrade(shared));
}

pub fn find(path: &str) -> Option<Arc<Shared>> {
    lock(&NODES).as_ref()?.get(path)?.upgrade()
}
