//! hiqlite for Python, as thin as it can be: nodes that are started, asked, told and closed. What a write means, how long it is
//! repeated and who may read stale data is decided in Blixard's Python.

mod bridge;
mod codec;
mod executor;
mod failures;
mod links;
mod node;
mod shared;
mod values;

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

#[pymodule]
fn blixard_hiqlite(module: &Bound<'_, PyModule>) -> PyResult<()> {
    executor::install().map_err(PyImportError::new_err)?;
    module.add("ENGINE_VERSION", "0.15.3")?;
    module.add("FORMAT_VERSION", codec::VERSION)?;
    module.add("FAILURE_PARAMETER", codec::FAILURE_PARAMETER)?;
    module.add("FAILURE_FORBIDDEN", codec::FAILURE_FORBIDDEN)?;
    module.add_class::<node::PyNode>()?;
    module.add_class::<values::PyOperation>()?;
    module.add_class::<values::PyFailure>()?;
    module.add_function(wrap_pyfunction!(node::start, module)?)?;
    failures::add_to(module)
}
