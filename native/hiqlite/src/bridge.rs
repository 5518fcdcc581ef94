//! From Rust futures to awaitables of the running asyncio loop.

use crate::failures::Trouble;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCFunction, PyDict, PyTuple};
use std::future::Future;
use tokio::runtime::Handle;

/// What a finished future hands to Python, made under the interpreter's lock.
pub type Delivery = Box<dyn for<'py> FnOnce(Python<'py>) -> PyResult<Py<PyAny>> + Send>;

/// Run `work` on the runtime; return an `asyncio.Future` of the running loop that gets what it delivers.
///
/// A caller that was cancelled, and a loop that was closed meanwhile, are left in peace. If the runtime ends before the work does, the future
/// fails with `Closed`: nobody waits for ever.
pub fn spawn<'py, F>(py: Python<'py>, runtime: &Handle, work: F) -> PyResult<Bound<'py, PyAny>>
where
    F: Future<Output = Delivery> + Send + 'static,
{
    let event_loop = py.import("asyncio")?.call_method0("get_running_loop")?;
    let future = event_loop.call_method0("create_future")?;
    let mut promise = Promise { event_loop: event_loop.unbind(), future: Some(future.clone().unbind()) };
    runtime.spawn(async move {
        let delivery = work.await;
        promise.keep(delivery);
    });
    Ok(future)
}

struct Promise {
    event_loop: Py<PyAny>,
    future: Option<Py<PyAny>>,
}

impl Promise {
    fn keep(&mut self, delivery: Delivery) {
        let Some(future) = self.future.take() else { return };
        // Not attach: an interpreter that is ending takes nobody in.
        Python::try_attach(|py| deliver(py, &self.event_loop, future, delivery));
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.keep(Box::new(|_| Err(Trouble::Closed.into())));
    }
}

fn deliver(py: Python<'_>, event_loop: &Py<PyAny>, future: Py<PyAny>, delivery: Delivery) {
    let (value, error) = match delivery(py) {
        Ok(value) => (value, py.None()),
        Err(error) => (py.None(), error.into_value(py).into_any()),
    };
    let Ok(settle) = settle_function(py) else { return };
    // It fails only for a loop that is closed: nobody is left who could be answered.
    let _ = event_loop.call_method1(py, "call_soon_threadsafe", (settle, future, value, error));
}

fn settle_function(py: Python<'_>) -> PyResult<&Py<PyCFunction>> {
    static SETTLE: PyOnceLock<Py<PyCFunction>> = PyOnceLock::new();
    SETTLE.get_or_try_init(py, || Ok(PyCFunction::new_closure(py, None, None, settle)?.unbind()))
}

fn settle(arguments: &Bound<'_, PyTuple>, _: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
    let future = arguments.get_item(0)?;
    if future.call_method0("done")?.extract()? {
        return Ok(());
    }
    let error = arguments.get_item(2)?;
    if error.is_none() {
        future.call_method1("set_result", (arguments.get_item(1)?,))?;
    } else {
        future.call_method1("set_exception", (error,))?;
    }
    Ok(())
}
