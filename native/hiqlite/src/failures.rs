//! What the engine's errors mean to the one who called.

use blixard_raft::Error;
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(blixard_hiqlite, HiqliteError, PyException, "Base of what this module raises.");
create_exception!(blixard_hiqlite, NoLeader, HiqliteError, "No leader just now. Nothing was done: try again.");
create_exception!(blixard_hiqlite, OutcomeUnknown, HiqliteError, "Sent, and not answered: repeat the same request.");
create_exception!(
    blixard_hiqlite,
    Stale,
    HiqliteError,
    "A later request of the same origin has overtaken this one; it was not carried out now."
);
create_exception!(blixard_hiqlite, Behind, HiqliteError, "This node has not got the commit asked for within the time.");
create_exception!(
    blixard_hiqlite,
    Refused,
    HiqliteError,
    "The engine refused the request as wrong: a bug of ours, or nodes of unlike versions."
);
create_exception!(blixard_hiqlite, NodeFailed, HiqliteError, "The node cannot go on: its storage failed. It must be started again.");
create_exception!(blixard_hiqlite, Closed, HiqliteError, "The node was closed.");
create_exception!(blixard_hiqlite, StartFailed, HiqliteError, "The node could not be started.");

#[derive(Debug)]
pub enum Trouble {
    NoLeader(String),
    OutcomeUnknown(String),
    Stale,
    Behind(String),
    Refused(String),
    NodeFailed(String),
    Closed,
    StartFailed(String),
}

impl From<Trouble> for PyErr {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::NoLeader(message) => NoLeader::new_err(message),
            Trouble::OutcomeUnknown(message) => OutcomeUnknown::new_err(message),
            Trouble::Stale => Stale::new_err("a later request of the same origin was carried out already"),
            Trouble::Behind(message) => Behind::new_err(message),
            Trouble::Refused(message) => Refused::new_err(message),
            Trouble::NodeFailed(message) => NodeFailed::new_err(message),
            Trouble::Closed => Closed::new_err("the node is closed"),
            Trouble::StartFailed(message) => StartFailed::new_err(message),
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        if error.is_forward_to_leader().is_some() {
            return Trouble::NoLeader(message);
        }
        match error {
            Error::LeaderChange(_) | Error::CheckIsLeaderError(_) => Trouble::NoLeader(message),
            Error::RaftErrorFatal(_) | Error::WAL(_) => Trouble::NodeFailed(message),
            Error::Sqlite(_) | Error::PrepareStatement(_) | Error::QueryParams(_) | Error::ConstraintViolation(_) | Error::Bincode(_) => {
                Trouble::Refused(message)
            }
            // Lost connections, timeouts, closed channels: it may have got through.
            _ => Trouble::OutcomeUnknown(message),
        }
    }
}

pub fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("HiqliteError", py.get_type::<HiqliteError>())?;
    module.add("NoLeader", py.get_type::<NoLeader>())?;
    module.add("OutcomeUnknown", py.get_type::<OutcomeUnknown>())?;
    module.add("Stale", py.get_type::<Stale>())?;
    module.add("Behind", py.get_type::<Behind>())?;
    module.add("Refused", py.get_type::<Refused>())?;
    module.add("NodeFailed", py.get_type::<NodeFailed>())?;
    module.add("Closed", py.get_type::<Closed>())?;
    module.add("StartFailed", py.get_type::<StartFailed>())
}
