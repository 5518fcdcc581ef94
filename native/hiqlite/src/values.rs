//! Between Python's values and ours.

use crate::codec::{Failure, Kind, Operation, Outcome, Statement, Value};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};
use std::sync::Arc;

fn to_value(given: &Bound<'_, PyAny>, name: &str) -> PyResult<Value> {
    if given.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(text) = given.cast::<PyString>() {
        return Ok(Value::Text(text.to_str()?.to_owned()));
    }
    if given.cast::<PyInt>().is_ok() || given.cast::<PyBool>().is_ok() {
        let integer = given.extract::<i64>();
        return integer.map(Value::Integer).map_err(|_| PyValueError::new_err(format!("the parameter {name} does not fit 64 bits")));
    }
    if given.cast::<PyFloat>().is_ok() {
        return Ok(Value::Real(given.extract()?));
    }
    if let Ok(bytes) = given.cast::<PyBytes>() {
        return Ok(Value::Blob(bytes.as_bytes().to_vec()));
    }
    let kind = given.get_type().name()?.to_string();
    Err(PyTypeError::new_err(format!("the parameter {name} is a {kind}; str, int, float, bytes and None can be stored")))
}

fn to_statement(given: &Bound<'_, PyAny>) -> PyResult<Statement> {
    let (sql, params): (String, Bound<'_, PyAny>) = given.extract()?;
    let copied = PyDict::new(given.py());
    copied.update(params.cast::<PyMapping>()?)?;
    let params = copied
        .iter()
        .map(|(name, value)| {
            let name: String = name.extract()?;
            let value = to_value(&value, &name)?;
            Ok((Arc::from(name), value))
        })
        .collect::<PyResult<Vec<_>>>()?;
    Ok(Statement { sql: sql.into(), params })
}

fn to_statements(given: &Bound<'_, PyAny>) -> PyResult<Vec<Statement>> {
    given.try_iter()?.map(|item| to_statement(&item?)).collect()
}

/// One write as it will stand in the log. Made once, sent as often as needed.
#[pyclass(frozen, name = "Operation", module = "blixard_hiqlite")]
pub struct PyOperation {
    pub inner: Operation,
    #[pyo3(get)]
    pub size: usize,
}

impl PyOperation {
    fn build(kind: Kind, statements: Vec<Statement>) -> Self {
        let inner = Operation { kind, statements };
        let size = inner.size();
        PyOperation { inner, size }
    }
}

#[pymethods]
impl PyOperation {
    #[staticmethod]
    fn rows(sql: &str, params: &Bound<'_, PyAny>) -> PyResult<Self> {
        let statement = to_statement(PyTuple::new(params.py(), [PyString::new(params.py(), sql).as_any(), params])?.as_any())?;
        Ok(Self::build(Kind::Rows, vec![statement]))
    }

    #[staticmethod]
    fn counts(statements: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self::build(Kind::Counts, to_statements(statements)?))
    }

    #[staticmethod]
    fn script(sql: &str) -> Self {
        Self::build(Kind::Script, vec![Statement { sql: sql.into(), params: Vec::new() }])
    }
}

/// How a single statement failed. Returned in the place of its rows: the others of its batch are not touched by it.
#[pyclass(frozen, get_all, name = "Failure", module = "blixard_hiqlite")]
pub struct PyFailure {
    code: i64,
    message: String,
}

impl From<Failure> for PyFailure {
    fn from(failure: Failure) -> Self {
        PyFailure { code: failure.code, message: failure.message }
    }
}

fn from_value(py: Python<'_>, value: Value) -> PyResult<Bound<'_, PyAny>> {
    Ok(match value {
        Value::Null => py.None().into_bound(py),
        Value::Integer(integer) => integer.into_pyobject(py)?.into_any(),
        Value::Real(real) => real.into_pyobject(py)?.into_any(),
        Value::Text(text) => PyString::new(py, &text).into_any(),
        Value::Blob(blob) => PyBytes::new(py, &blob).into_any(),
    })
}

fn from_row(py: Python<'_>, row: Vec<Value>) -> PyResult<Bound<'_, PyTuple>> {
    let values = row.into_iter().map(|value| from_value(py, value)).collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, values)
}

fn from_outcome(py: Python<'_>, outcome: Outcome) -> PyResult<Bound<'_, PyAny>> {
    Ok(match outcome {
        Outcome::Rows(rows) => {
            let rows = rows.into_iter().map(|row| from_row(py, row)).collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, rows)?.into_any()
        }
        Outcome::Counts(counts) => PyList::new(py, counts)?.into_any(),
        Outcome::Failed(failure) => Bound::new(py, PyFailure::from(failure))?.into_any(),
    })
}

pub fn from_outcomes(py: Python<'_>, outcomes: Vec<Outcome>) -> PyResult<Bound<'_, PyList>> {
    let outcomes = outcomes.into_iter().map(|outcome| from_outcome(py, outcome)).collect::<PyResult<Vec<_>>>()?;
    PyList::new(py, outcomes)
}
