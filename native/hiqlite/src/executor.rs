//! Two SQL functions that every connection of this process gets, and through which everything goes.
//!
//! `SELECT blixard_apply(?)` is the only statement in the replicated log. Its argument is a `WriteRequest`: any number of
//! operations, carried out in one SQLite transaction; its value is the `Answer` with the rows or the error of each. So
//! one log entry carries many writes, each with its RETURNING rows, and no typed row of the engine is ever mapped.
//! Every node computes the same: the request names all values, and functions that are not deterministic are refused.
//!
//! It also makes repetition harmless. A request is known by its origin and number; the answer to an origin's last request is
//! kept in the database, so whoever repeats it gets the same answer and nothing happens twice. `SELECT blixard_read(?)` answers a
//! `ReadRequest` in one read transaction.

use crate::codec::{
    Answer, Entry, FAILURE_FORBIDDEN, FAILURE_PARAMETER, Failure, Kind, Operation, Outcome, Part, ReadRequest, Statement, Value,
    WriteRequest,
};
use crate::shared::{self, Shared};
use blixard_raft::rusqlite::functions::{Context, FunctionFlags};
use blixard_raft::rusqlite::types::{ToSql, ToSqlOutput, ValueRef};
use blixard_raft::rusqlite::{self, CachedStatement, Connection, OptionalExtension, ffi};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Origins that have written nothing for so many commits are forgotten; requests from before are refused as stale.
pub const MEMORY_COMMITS: u64 = 1_000_000;
const SWEEP_COMMITS: u64 = 10_000;
/// A node whose disk fails must not go on: it would answer "failed" where the others answer "done". It stands still
/// and tries again, so often.
const STANDSTILL: Duration = Duration::from_millis(250);
const FORBIDDEN: &[&[u8]] = &[
    b"random",
    b"randomblob",
    b"date",
    b"time",
    b"datetime",
    b"julianday",
    b"unixepoch",
    b"strftime",
    b"timediff",
    b"now",
    b"current_date",
    b"current_time",
    b"current_timestamp",
    b"load_extension",
];
const BOOKS: &str = "
CREATE TABLE IF NOT EXISTS _blixard_commits (id INTEGER PRIMARY KEY CHECK (id = 0), commit_number INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS _blixard_origins (
    origin BLOB NOT NULL PRIMARY KEY, number INTEGER NOT NULL, commit_number INTEGER NOT NULL, answer BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS _blixard_parts (
    origin BLOB NOT NULL, number INTEGER NOT NULL, part INTEGER NOT NULL, base INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (origin, number, part)
) STRICT, WITHOUT ROWID;
";

/// Give every connection that this process opens from now on the two functions and our rules.
pub fn install() -> Result<(), String> {
    // SAFETY: the callback has the signature that SQLite documents, lives as long as the process, and takes no panic out.
    unsafe { rusqlite::auto_extension::register_auto_extension(prepare_connection) }.map_err(|error| error.to_string())
}

unsafe extern "C" fn prepare_connection(
    handle: *mut ffi::sqlite3,
    _message: *mut *mut c_char,
    _api: *const ffi::sqlite3_api_routines,
) -> c_int {
    // SAFETY: SQLite calls this with a connection that it has just opened. The authorizer keeps no pointer.
    let code = unsafe { ffi::sqlite3_set_authorizer(handle, Some(authorize), std::ptr::null_mut()) };
    if code != ffi::SQLITE_OK {
        return code;
    }
    // SAFETY: as above; the wrapper does not own the connection and ends before SQLite goes on.
    let added = unsafe { Connection::from_handle(handle) }.and_then(|connection| add_functions(&connection));
    match added {
        Ok(()) => ffi::SQLITE_OK,
        Err(_) => ffi::SQLITE_ERROR,
    }
}

/// Refuse functions that would make nodes differ, and leave out ANALYZE: the engine runs it on each node by itself, and nodes with different
/// statistics would choose different plans, so that rows of one statement would be changed in different orders.
unsafe extern "C" fn authorize(
    _context: *mut c_void,
    action: c_int,
    _first: *const c_char,
    second: *const c_char,
    _database: *const c_char,
    _trigger: *const c_char,
) -> c_int {
    if action == ffi::SQLITE_ANALYZE {
        return ffi::SQLITE_IGNORE;
    }
    if action != ffi::SQLITE_FUNCTION || second.is_null() {
        return ffi::SQLITE_OK;
    }
    // SAFETY: for SQLITE_FUNCTION the second text is the function's name, zero-terminated.
    let name = unsafe { CStr::from_ptr(second) }.to_bytes();
    if FORBIDDEN.iter().any(|forbidden| name.eq_ignore_ascii_case(forbidden)) {
        return ffi::SQLITE_DENY;
    }
    ffi::SQLITE_OK
}

fn add_functions(connection: &Connection) -> rusqlite::Result<()> {
    use rusqlite::config::DbConfig;
    for option in [DbConfig::SQLITE_DBCONFIG_DQS_DML, DbConfig::SQLITE_DBCONFIG_DQS_DDL, DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA] {
        connection.set_db_config(option, false)?;
    }
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DIRECTONLY;
    connection.create_scalar_function("blixard_apply", 1, flags, |context| answer(context, apply))?;
    connection.create_scalar_function("blixard_read", 1, flags, |context| answer(context, read))
}

type Carry = fn(&Connection, &[u8], Option<&Shared>) -> Result<Vec<u8>, String>;

fn answer(context: &Context<'_>, carry: Carry) -> rusqlite::Result<Vec<u8>> {
    let request = context.get_raw(0).as_blob().map_err(rusqlite::Error::from)?;
    // SAFETY: the connection is used only within this call, on SQLite's own thread for it.
    let connection = unsafe { context.get_connection() }?;
    let shared = connection.path().and_then(shared::find);
    carry(&connection, request, shared.as_deref()).map_err(|message| rusqlite::Error::UserFunctionError(message.into()))
}

/// What stops a transaction: the statement's own mistake, or the disk's.
enum Stop {
    Failure(Failure),
    Storage(String),
}

impl From<rusqlite::Error> for Stop {
    fn from(error: rusqlite::Error) -> Self {
        let (code, extended) = match &error {
            rusqlite::Error::SqliteFailure(inner, _) => (inner.extended_code & 0xff, inner.extended_code),
            rusqlite::Error::SqlInputError { error: inner, .. } => (inner.extended_code & 0xff, inner.extended_code),
            _ => (ffi::SQLITE_ERROR, ffi::SQLITE_ERROR),
        };
        let message = error.to_string();
        match code {
            ffi::SQLITE_FULL
            | ffi::SQLITE_IOERR
            | ffi::SQLITE_CORRUPT
            | ffi::SQLITE_NOTADB
            | ffi::SQLITE_CANTOPEN
            | ffi::SQLITE_READONLY
            | ffi::SQLITE_PERM
            | ffi::SQLITE_BUSY
            | ffi::SQLITE_LOCKED
            | ffi::SQLITE_PROTOCOL
            | ffi::SQLITE_NOMEM
            | ffi::SQLITE_NOLFS
            | ffi::SQLITE_INTERRUPT => Stop::Storage(message),
            _ if message.contains("not authorized to use function") => Stop::Failure(Failure {
                code: FAILURE_FORBIDDEN,
                message: message.replace("not authorized to use", "it is forbidden to use"),
            }),
            _ => Stop::Failure(Failure { code: i64::from(extended), message }),
        }
    }
}

type Step<T> = Result<T, Stop>;

fn apply(connection: &Connection, bytes: &[u8], shared: Option<&Shared>) -> Result<Vec<u8>, String> {
    let entry = Entry::decode(bytes)?;
    loop {
        let trouble = match Transaction::run(connection, &entry) {
            Ok(applied) => {
                if let Some(shared) = shared {
                    shared.set_trouble(None);
                    if let Some((commit, changed)) = applied.commit {
                        shared.committed(commit, changed);
                    }
                }
                return Ok(applied.answer);
            }
            Err(trouble) => trouble,
        };
        let Some(shared) = shared else { return Err(trouble) };
        shared.attempts.fetch_add(1, Ordering::Relaxed);
        shared.set_trouble(Some(trouble));
        // For ever, if need be: an answer would count as "applied" here, and this node would differ from the others from then on.
        std::thread::sleep(STANDSTILL);
        while shared.is_closing() {
            // The node was ended without good order, and this thread has nobody left to answer.
            std::thread::park();
        }
    }
}

struct Applied {
    answer: Vec<u8>,
    commit: Option<(u64, bool)>,
}

struct Transaction<'a> {
    connection: &'a Connection,
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if !self.connection.is_autocommit() {
            // It fails only where SQLite has rolled back by itself.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
    }
}

impl<'a> Transaction<'a> {
    /// Carry out the entry, or find that it was carried out before. The error is the storage's.
    fn run(connection: &'a Connection, entry: &Entry<'_>) -> Result<Applied, String> {
        let transaction = Transaction { connection };
        let applied = match entry {
            Entry::Whole(request) => transaction.attempt(request),
            Entry::Part(part) => transaction.take_part(part),
        };
        match applied {
            Ok(applied) => Ok(applied),
            Err(Stop::Storage(message)) => Err(message),
            // Our own bookkeeping, or COMMIT, refused: a state that no good request leads to.
            Err(Stop::Failure(failure)) => {
                let answer = Answer::Done { commit: 0, outcomes: vec![Outcome::Failed(failure)] }.encode();
                Ok(Applied { answer, commit: None })
            }
        }
    }

    /// Keep a part; with the last one carry out what the parts make up.
    fn take_part(&self, part: &Part<'_>) -> Step<Applied> {
        self.begin()?;
        if let Some(known) = self.recall(part.origin, part.number, part.base)? {
            return Ok(Applied { answer: known, commit: None });
        }
        let (number, index) = (signed(part.number), i64::from(part.index));
        self.connection.execute(
            "INSERT OR REPLACE INTO _blixard_parts (origin, number, part, base, data) VALUES (?1, ?2, ?3, ?4, ?5)",
            (part.origin, number, index, signed(part.base), part.data),
        )?;
        let joined = if part.is_last { Some(self.join_parts(part)?) } else { None };
        self.connection.execute_batch("COMMIT")?;
        let Some(joined) = joined else {
            return Ok(Applied { answer: Answer::Done { commit: 0, outcomes: Vec::new() }.encode(), commit: None });
        };
        match WriteRequest::decode(&joined) {
            Ok(request) => self.attempt(&request),
            // The sender sends the last part only after all others were applied, so this is a bug of ours; the same one on every node.
            Err(message) => Err(Stop::Failure(Failure { code: i64::from(ffi::SQLITE_ERROR), message })),
        }
    }

    fn join_parts(&self, part: &Part<'_>) -> Step<Vec<u8>> {
        let mut find = self.connection.prepare("SELECT data FROM _blixard_parts WHERE origin = ?1 AND number = ?2 ORDER BY part")?;
        let mut rows = find.query((part.origin, signed(part.number)))?;
        let mut joined = Vec::new();
        while let Some(row) = rows.next()? {
            joined.extend_from_slice(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?);
        }
        Ok(joined)
    }

    fn attempt(&self, request: &WriteRequest) -> Step<Applied> {
        let mut refused: HashMap<usize, Failure> = HashMap::new();
        loop {
            self.begin()?;
            if let Some(known) = self.recall(&request.origin, request.number, request.base)? {
                return Ok(Applied { answer: known, commit: None });
            }
            let before = self.connection.total_changes();
            let Some(outcomes) = self.carry_out(&request.operations, &mut refused)? else { continue };
            let changed = self.connection.total_changes() != before;
            let commit = self.last_commit()? + 1;
            let answer = Answer::Done { commit, outcomes }.encode();
            self.remember(request, commit, &answer)?;
            self.connection.execute_batch("COMMIT")?;
            return Ok(Applied { answer, commit: Some((commit, changed)) });
        }
    }

    fn begin(&self) -> Step<()> {
        if !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK")?;
        }
        self.connection.execute_batch("BEGIN IMMEDIATE")?;
        self.connection.execute_batch(BOOKS)?;
        Ok(())
    }

    fn last_commit(&self) -> Step<u64> {
        Ok(read_commit(self.connection)?.unwrap_or(0))
    }

    /// The answer to a request that needs, or allows, no carrying out.
    fn recall(&self, origin: &[u8], number: u64, base: u64) -> Step<Option<Vec<u8>>> {
        let mut find = self.connection.prepare("SELECT number, answer FROM _blixard_origins WHERE origin = ?1")?;
        let row = find.query_row([origin], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?))).optional()?;
        match row {
            Some((last, answer)) if last == signed(number) => Ok(Some(answer)),
            Some((last, _)) if last > signed(number) => Ok(Some(Answer::Stale.encode())),
            _ if base.saturating_add(MEMORY_COMMITS) < self.last_commit()? => Ok(Some(Answer::Stale.encode())),
            _ => Ok(None),
        }
    }

    fn remember(&self, request: &WriteRequest, commit: u64, answer: &[u8]) -> Step<()> {
        let connection = self.connection;
        connection.execute("INSERT OR REPLACE INTO _blixard_commits (id, commit_number) VALUES (0, ?1)", [signed(commit)])?;
        connection.execute(
            "INSERT OR REPLACE INTO _blixard_origins (origin, number, commit_number, answer) VALUES (?1, ?2, ?3, ?4)",
            (&request.origin, signed(request.number), signed(commit), answer),
        )?;
        connection.execute("DELETE FROM _blixard_parts WHERE origin = ?1 AND number <= ?2", (&request.origin, signed(request.number)))?;
        if commit.is_multiple_of(SWEEP_COMMITS) {
            let oldest = signed(commit.saturating_sub(MEMORY_COMMITS));
            connection.execute("DELETE FROM _blixard_origins WHERE commit_number < ?1", [oldest])?;
            connection.execute("DELETE FROM _blixard_parts WHERE base < ?1", [oldest])?;
        }
        Ok(())
    }

    /// Carry out all operations. None: one of them has rolled back everything; it is in `refused` now, and the others run again.
    fn carry_out(&self, operations: &[Operation], refused: &mut HashMap<usize, Failure>) -> Step<Option<Vec<Outcome>>> {
        let mut outcomes = Vec::with_capacity(operations.len());
        for (index, operation) in operations.iter().enumerate() {
            if let Some(failure) = refused.get(&index) {
                outcomes.push(Outcome::Failed(failure.clone()));
                continue;
            }
            match self.carry_out_one(operation) {
                Ok(_) if self.connection.is_autocommit() => {
                    let message = "a statement must not end the transaction".into();
                    refused.insert(index, Failure { code: i64::from(ffi::SQLITE_ERROR), message });
                    return Ok(None);
                }
                Ok(outcome) => outcomes.push(outcome),
                Err(Stop::Failure(failure)) if self.connection.is_autocommit() => {
                    refused.insert(index, failure);
                    return Ok(None);
                }
                Err(Stop::Failure(failure)) => outcomes.push(Outcome::Failed(failure)),
                Err(storage) => return Err(storage),
            }
        }
        Ok(Some(outcomes))
    }

    fn carry_out_one(&self, operation: &Operation) -> Step<Outcome> {
        match operation.kind {
            // A single statement needs no savepoint: SQLite undoes a failed one with all that its triggers did.
            Kind::Rows => {
                let mut rows = Vec::new();
                for statement in &operation.statements {
                    rows = run_statement(self.connection, statement)?;
                }
                Ok(Outcome::Rows(rows))
            }
            Kind::Counts => self.all_or_nothing(|| {
                operation
                    .statements
                    .iter()
                    .map(|statement| count_rows(self.connection, statement))
                    .collect::<Step<Vec<_>>>()
                    .map(Outcome::Counts)
            }),
            Kind::Script => self.all_or_nothing(|| {
                for statement in &operation.statements {
                    self.connection.execute_batch(&statement.sql)?;
                }
                Ok(Outcome::Counts(Vec::new()))
            }),
        }
    }

    fn all_or_nothing(&self, body: impl FnOnce() -> Step<Outcome>) -> Step<Outcome> {
        self.connection.execute_batch("SAVEPOINT operation")?;
        let outcome = body();
        if outcome.is_err() && !self.connection.is_autocommit() {
            self.connection.execute_batch("ROLLBACK TO operation")?;
        }
        if !self.connection.is_autocommit() {
            self.connection.execute_batch("RELEASE operation")?;
        }
        outcome
    }
}

fn read(connection: &Connection, bytes: &[u8], shared: Option<&Shared>) -> Result<Vec<u8>, String> {
    let request = ReadRequest::decode(bytes)?;
    let _transaction = Transaction { connection };
    let answer = read_all(connection, &request);
    match answer {
        Ok(answer) => {
            if let (Some(shared), Answer::Done { commit, .. } | Answer::Behind { commit }) = (shared, &answer) {
                shared.jumped(*commit);
            }
            Ok(answer.encode())
        }
        Err(Stop::Storage(message)) => Err(message),
        Err(Stop::Failure(failure)) => Err(failure.message),
    }
}

fn read_all(connection: &Connection, request: &ReadRequest) -> Step<Answer> {
    connection.execute_batch("BEGIN")?;
    let commit = read_commit(connection)?.unwrap_or(0);
    if commit < request.least_commit {
        return Ok(Answer::Behind { commit });
    }
    let mut outcomes = Vec::with_capacity(request.statements.len());
    for statement in &request.statements {
        outcomes.push(match refuse_writing(connection, statement).and_then(|()| run_statement(connection, statement)) {
            Ok(rows) => Outcome::Rows(rows),
            Err(Stop::Failure(failure)) => Outcome::Failed(failure),
            Err(storage) => return Err(storage),
        });
    }
    Ok(Answer::Done { commit, outcomes })
}

fn refuse_writing(connection: &Connection, statement: &Statement) -> Step<()> {
    if connection.prepare_cached(&statement.sql)?.readonly() {
        return Ok(());
    }
    Err(Stop::Failure(Failure { code: i64::from(ffi::SQLITE_READONLY), message: "a read must not write".into() }))
}

/// The number of the last commit; None before the first.
fn read_commit(connection: &Connection) -> Step<Option<u64>> {
    let mut find = match connection.prepare("SELECT commit_number FROM _blixard_commits WHERE id = 0") {
        Ok(find) => find,
        Err(error) if error.to_string().contains("no such table") => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let number = find.query_row((), |row| row.get::<_, i64>(0)).optional()?;
    Ok(number.map(i64::cast_unsigned))
}

fn signed(number: u64) -> i64 {
    number.cast_signed()
}

fn run_statement(connection: &Connection, statement: &Statement) -> Step<Vec<Vec<Value>>> {
    let mut prepared = bind(connection, statement)?;
    let columns = prepared.column_count();
    let mut rows = prepared.raw_query();
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let mut values = Vec::with_capacity(columns);
        for column in 0..columns {
            values.push(own(row.get_ref(column)?));
        }
        found.push(values);
    }
    Ok(found)
}

fn count_rows(connection: &Connection, statement: &Statement) -> Step<i64> {
    let before = connection.total_changes();
    run_statement(connection, statement)?;
    if connection.total_changes() == before {
        return Ok(0);
    }
    Ok(i64::try_from(connection.changes()).unwrap_or(i64::MAX))
}

fn bind<'c>(connection: &'c Connection, statement: &Statement) -> Step<CachedStatement<'c>> {
    let mut prepared = connection.prepare_cached(&statement.sql)?;
    for index in 1..=prepared.parameter_count() {
        let name = prepared.parameter_name(index).map(|name| name[1..].to_owned());
        let given = name.as_ref().and_then(|name| statement.params.iter().find(|(known, _)| **known == **name));
        let Some((_, value)) = given else {
            let name = name.unwrap_or_else(|| format!("number {index}, which has no name"));
            return Err(Stop::Failure(Failure { code: FAILURE_PARAMETER, message: format!("the parameter {name} is missing") }));
        };
        prepared.raw_bind_parameter(index, value)?;
    }
    Ok(prepared)
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Integer(integer) => ValueRef::Integer(*integer),
            Value::Real(real) => ValueRef::Real(*real),
            Value::Text(text) => ValueRef::Text(text.as_bytes()),
            Value::Blob(blob) => ValueRef::Blob(blob),
        }))
    }
}

fn own(value: ValueRef<'_>) -> Value {
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(integer) => Value::Integer(integer),
        ValueRef::Real(real) => Value::Real(real),
        ValueRef::Text(text) => Value::Text(String::from_utf8_lossy(text).into_owned()),
        ValueRef::Blob(blob) => Value::Blob(blob.to_vec()),
    }
}
