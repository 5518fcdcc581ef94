//! What travels in the log and back: requests and answers as bytes, and the values in them.
//!
//! The first byte of each is `VERSION`. Nodes of different releases read each other's log entries, so a change of
//! this format is a new version that the previous release can already read.

use std::collections::HashMap;
use std::sync::Arc;

pub const VERSION: u8 = 1;

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Integer(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

/// One statement with its named parameters (names without the colon).
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    pub sql: Arc<str>,
    pub params: Vec<(Arc<str>, Value)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One statement; the answer is its rows.
    Rows,
    /// Several statements, all or nothing; the answer is how many rows each changed.
    Counts,
    /// One text of several statements without parameters, all or nothing; the answer is empty.
    Script,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    pub kind: Kind,
    pub statements: Vec<Statement>,
}

impl Operation {
    /// About how many bytes it takes in a request.
    pub fn size(&self) -> usize {
        self.statements.iter().map(statement_size).sum::<usize>() + 16
    }
}

fn statement_size(statement: &Statement) -> usize {
    let params: usize = statement.params.iter().map(|(name, value)| name.len() + value_size(value) + 8).sum();
    statement.sql.len() + params + 8
}

fn value_size(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len(),
        Value::Blob(bytes) => bytes.len(),
        _ => 8,
    }
}

/// Writes of one origin. `number` grows by one with each new request and stays in a repetition.
#[derive(Clone, Debug, PartialEq)]
pub struct WriteRequest {
    pub origin: Vec<u8>,
    pub number: u64,
    /// The commit that the sender's node had applied when it first sent this.
    pub base: u64,
    pub operations: Vec<Operation>,
}

/// A piece of an encoded `WriteRequest`. Replication sends an entry again from its start when it takes longer than a heartbeat, so a large entry
/// would stop the cluster for good: what is larger than `PART_BYTES` travels in parts, and is carried out with the last one.
#[derive(Clone, Debug, PartialEq)]
pub struct Part<'a> {
    pub origin: &'a [u8],
    pub number: u64,
    pub base: u64,
    pub index: u32,
    pub is_last: bool,
    pub data: &'a [u8],
}

pub const PART_BYTES: usize = 256 * 1024;

/// What one log entry holds.
#[derive(Debug, PartialEq)]
pub enum Entry<'a> {
    Whole(WriteRequest),
    Part(Part<'a>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct ReadRequest {
    /// Answered only from a state that has this commit; else `Answer::Behind`.
    pub least_commit: u64,
    pub statements: Vec<Statement>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// SQLite's extended result code, or one of `FAILURE_…`.
    pub code: i64,
    pub message: String,
}

/// A parameter of the statement was not given.
pub const FAILURE_PARAMETER: i64 = -1;
/// A function that is not deterministic was asked for.
pub const FAILURE_FORBIDDEN: i64 = -2;

#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Rows(Vec<Vec<Value>>),
    Counts(Vec<i64>),
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Done {
        commit: u64,
        outcomes: Vec<Outcome>,
    },
    /// The request was overtaken: it is older than the origin's last one, or than what origins are remembered for.
    Stale,
    /// The state has not got `least_commit` yet.
    Behind {
        commit: u64,
    },
}

pub type Decoded<T> = Result<T, String>;

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn number(&mut self, number: u64) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
    }

    fn length(&mut self, length: usize) {
        // Nothing here can reach 4 GiB: the log takes no entry above its file size.
        self.bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    }

    fn data(&mut self, data: &[u8]) {
        self.length(data.len());
        self.bytes.extend_from_slice(data);
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.bytes.push(0),
            Value::Integer(integer) => {
                self.bytes.push(1);
                self.bytes.extend_from_slice(&integer.to_le_bytes());
            }
            Value::Real(real) => {
                self.bytes.push(2);
                self.bytes.extend_from_slice(&real.to_bits().to_le_bytes());
            }
            Value::Text(text) => {
                self.bytes.push(3);
                self.data(text.as_bytes());
            }
            Value::Blob(blob) => {
                self.bytes.push(4);
                self.data(blob);
            }
        }
    }

    fn statements<'a>(&mut self, statements: impl Iterator<Item = &'a Statement>, texts: &Texts<'a>) {
        for statement in statements {
            self.length(texts.index[&*statement.sql]);
            self.length(statement.params.len());
            for (name, value) in &statement.params {
                self.length(texts.index[&**name]);
                self.value(value);
            }
        }
    }
}

/// SQL texts and parameter names of a request, each written once.
struct Texts<'a> {
    index: HashMap<&'a str, usize>,
    ordered: Vec<&'a str>,
}

impl<'a> Texts<'a> {
    fn of(statements: impl Iterator<Item = &'a Statement>) -> Self {
        let mut texts = Texts { index: HashMap::new(), ordered: Vec::new() };
        for statement in statements {
            texts.add(&statement.sql);
            for (name, _) in &statement.params {
                texts.add(name);
            }
        }
        texts
    }

    fn add(&mut self, text: &'a str) {
        if !self.index.contains_key(text) {
            self.index.insert(text, self.ordered.len());
            self.ordered.push(text);
        }
    }

    fn write(&self, writer: &mut Writer) {
        writer.length(self.ordered.len());
        for text in &self.ordered {
            writer.data(text.as_bytes());
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn open(bytes: &'a [u8]) -> Decoded<Self> {
        let mut reader = Reader { bytes };
        match reader.byte()? {
            VERSION => Ok(reader),
            other => Err(format!("unknown version {other} of a log entry; this release knows {VERSION}: upgrade this node")),
        }
    }

    fn take(&mut self, count: usize) -> Decoded<&'a [u8]> {
        if count > self.bytes.len() {
            return Err("a log entry ends too early".into());
        }
        let (taken, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Decoded<u8> {
        Ok(self.take(1)?[0])
    }

    fn eight(&mut self) -> Decoded<[u8; 8]> {
        self.take(8)?.try_into().map_err(|_| "eight bytes".into())
    }

    fn number(&mut self) -> Decoded<u64> {
        Ok(u64::from_le_bytes(self.eight()?))
    }

    fn length(&mut self) -> Decoded<usize> {
        let four: [u8; 4] = self.take(4)?.try_into().map_err(|_| "four bytes")?;
        Ok(u32::from_le_bytes(four) as usize)
    }

    fn data(&mut self) -> Decoded<&'a [u8]> {
        let length = self.length()?;
        self.take(length)
    }

    fn text(&mut self) -> Decoded<String> {
        String::from_utf8(self.data()?.to_vec()).map_err(|error| error.to_string())
    }

    /// A number of things that follow, each at least one byte: a wrong one cannot make us reserve memory without end.
    fn count(&mut self) -> Decoded<usize> {
        let count = self.length()?;
        if count > self.bytes.len() {
            return Err("a log entry counts more than it holds".into());
        }
        Ok(count)
    }

    fn value(&mut self) -> Decoded<Value> {
        Ok(match self.byte()? {
            0 => Value::Null,
            1 => Value::Integer(i64::from_le_bytes(self.eight()?)),
            2 => Value::Real(f64::from_bits(u64::from_le_bytes(self.eight()?))),
            3 => Value::Text(self.text()?),
            4 => Value::Blob(self.data()?.to_vec()),
            other => return Err(format!("unknown kind {other} of a value")),
        })
    }

    fn texts(&mut self) -> Decoded<Vec<Arc<str>>> {
        let count = self.count()?;
        (0..count).map(|_| Ok(Arc::from(self.text()?))).collect()
    }

    fn indexed(&mut self, texts: &[Arc<str>]) -> Decoded<Arc<str>> {
        let index = self.length()?;
        texts.get(index).cloned().ok_or_else(|| "a log entry names a text that it does not hold".into())
    }

    fn statements(&mut self, texts: &[Arc<str>]) -> Decoded<Vec<Statement>> {
        let count = self.count()?;
        (0..count).map(|_| self.statement(texts)).collect()
    }

    fn statement(&mut self, texts: &[Arc<str>]) -> Decoded<Statement> {
        let sql = self.indexed(texts)?;
        // No check of the count against the rest: a statement without parameters may be the last thing.
        let count = self.length()?;
        let mut params = Vec::new();
        for _ in 0..count {
            params.push((self.indexed(texts)?, self.value()?));
        }
        Ok(Statement { sql, params })
    }
}

const WHOLE: u8 = 0;
const PART: u8 = 1;

impl<'a> Entry<'a> {
    pub fn decode(bytes: &'a [u8]) -> Decoded<Self> {
        let mut reader = Reader::open(bytes)?;
        match reader.byte()? {
            WHOLE => WriteRequest::decode(bytes).map(Entry::Whole),
            PART => Ok(Entry::Part(Part {
                origin: reader.data()?,
                number: reader.number()?,
                base: reader.number()?,
                index: u32::try_from(reader.length()?).map_err(|error| error.to_string())?,
                is_last: reader.byte()? == 1,
                data: reader.data()?,
            })),
            other => Err(format!("unknown kind {other} of a log entry")),
        }
    }
}

impl Part<'_> {
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.bytes.extend_from_slice(&[VERSION, PART]);
        writer.data(self.origin);
        writer.number(self.number);
        writer.number(self.base);
        writer.length(self.index as usize);
        writer.bytes.push(u8::from(self.is_last));
        writer.data(self.data);
        writer.bytes
    }
}

impl WriteRequest {
    /// Return the entries that carry this request, in the order in which they must be sent.
    pub fn entries(&self) -> Vec<Vec<u8>> {
        let whole = self.encode();
        if whole.len() <= PART_BYTES {
            return vec![whole];
        }
        let count = whole.len().div_ceil(PART_BYTES);
        let part = |(index, data): (usize, &[u8])| {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let is_last = index as usize == count - 1;
            Part { origin: &self.origin, number: self.number, base: self.base, index, is_last, data }.encode()
        };
        whole.chunks(PART_BYTES).enumerate().map(part).collect()
    }

    pub fn encode(&self) -> Vec<u8> {
        let all = || self.operations.iter().flat_map(|operation| operation.statements.iter());
        let texts = Texts::of(all());
        let mut writer = Writer::default();
        writer.bytes.extend_from_slice(&[VERSION, WHOLE]);
        writer.data(&self.origin);
        writer.number(self.number);
        writer.number(self.base);
        texts.write(&mut writer);
        writer.length(self.operations.len());
        for operation in &self.operations {
            writer.bytes.push(operation.kind as u8);
            writer.length(operation.statements.len());
            writer.statements(operation.statements.iter(), &texts);
        }
        writer.bytes
    }

    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::open(bytes)?;
        if reader.byte()? != WHOLE {
            return Err("a part of a request stands where a whole one is expected".into());
        }
        let origin = reader.data()?.to_vec();
        let (number, base) = (reader.number()?, reader.number()?);
        let texts = reader.texts()?;
        let count = reader.count()?;
        let operations = (0..count).map(|_| read_operation(&mut reader, &texts)).collect::<Decoded<Vec<_>>>()?;
        Ok(WriteRequest { origin, number, base, operations })
    }
}

fn read_operation(reader: &mut Reader<'_>, texts: &[Arc<str>]) -> Decoded<Operation> {
    let kind = match reader.byte()? {
        0 => Kind::Rows,
        1 => Kind::Counts,
        2 => Kind::Script,
        other => return Err(format!("unknown kind {other} of an operation")),
    };
    // An empty transaction may be the last thing of a request.
    let count = reader.length()?;
    let mut statements = Vec::new();
    for _ in 0..count {
        statements.push(reader.statement(texts)?);
    }
    Ok(Operation { kind, statements })
}

impl ReadRequest {
    pub fn encode(&self) -> Vec<u8> {
        let texts = Texts::of(self.statements.iter());
        let mut writer = Writer::default();
        writer.bytes.push(VERSION);
        writer.number(self.least_commit);
        texts.write(&mut writer);
        writer.length(self.statements.len());
        writer.statements(self.statements.iter(), &texts);
        writer.bytes
    }

    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::open(bytes)?;
        let least_commit = reader.number()?;
        let texts = reader.texts()?;
        let statements = if reader.bytes.len() >= 4 { reader.statements(&texts)? } else { Vec::new() };
        Ok(ReadRequest { least_commit, statements })
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.bytes.push(VERSION);
        match self {
            Answer::Done { commit, outcomes } => {
                writer.bytes.push(0);
                writer.number(*commit);
                writer.length(outcomes.len());
                for outcome in outcomes {
                    write_outcome(&mut writer, outcome);
                }
            }
            Answer::Stale => writer.bytes.push(1),
            Answer::Behind { commit } => {
                writer.bytes.push(2);
                writer.number(*commit);
            }
        }
        writer.bytes
    }

    pub fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut reader = Reader::open(bytes)?;
        Ok(match reader.byte()? {
            0 => {
                let commit = reader.number()?;
                let count = reader.count()?;
                let outcomes = (0..count).map(|_| read_outcome(&mut reader)).collect::<Decoded<Vec<_>>>()?;
                Answer::Done { commit, outcomes }
            }
            1 => Answer::Stale,
            2 => Answer::Behind { commit: reader.number()? },
            other => return Err(format!("unknown kind {other} of an answer")),
        })
    }
}

fn write_outcome(writer: &mut Writer, outcome: &Outcome) {
    match outcome {
        Outcome::Rows(rows) => {
            writer.bytes.push(0);
            writer.length(rows.len());
            writer.length(rows.first().map_or(0, Vec::len));
            for value in rows.iter().flatten() {
                writer.value(value);
            }
        }
        Outcome::Counts(counts) => {
            writer.bytes.push(1);
            writer.length(counts.len());
            for count in counts {
                writer.bytes.extend_from_slice(&count.to_le_bytes());
            }
        }
        Outcome::Failed(failure) => {
            writer.bytes.push(2);
            writer.bytes.extend_from_slice(&failure.code.to_le_bytes());
            writer.data(failure.message.as_bytes());
        }
    }
}

fn read_outcome(reader: &mut Reader<'_>) -> Decoded<Outcome> {
    Ok(match reader.byte()? {
        0 => {
            let rows = reader.length()?;
            let columns = reader.length()?;
            if rows.saturating_mul(columns) > reader.bytes.len() {
                return Err("an answer counts more rows than it holds".into());
            }
            let read_row = |_| (0..columns).map(|_| reader.value()).collect::<Decoded<Vec<_>>>();
            Outcome::Rows((0..rows).map(read_row).collect::<Decoded<Vec<_>>>()?)
        }
        1 => {
            let count = reader.length()?;
            Outcome::Counts((0..count).map(|_| Ok(i64::from_le_bytes(reader.eight()?))).collect::<Decoded<Vec<_>>>()?)
        }
        2 => Outcome::Failed(Failure { code: i64::from_le_bytes(reader.eight()?), message: reader.text()? }),
        other => return Err(format!("unknown kind {other} of an outcome")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statement(sql: &str) -> Statement {
        let values = [Value::Null, Value::Integer(i64::MIN), Value::Real(0.1), Value::Text("snow ☃ \0".into()), Value::Blob(vec![0, 255])];
        let params = values.into_iter().enumerate().map(|(n, value)| (Arc::from(format!("p{n}")), value)).collect();
        Statement { sql: sql.into(), params }
    }

    fn request() -> WriteRequest {
        let operations = vec![
            Operation { kind: Kind::Rows, statements: vec![statement("INSERT")] },
            Operation { kind: Kind::Counts, statements: vec![statement("INSERT"), statement("UPDATE")] },
            Operation { kind: Kind::Script, statements: vec![Statement { sql: "CREATE".into(), params: vec![] }] },
            Operation { kind: Kind::Counts, statements: vec![] },
        ];
        WriteRequest { origin: vec![7; 16], number: 3, base: 9, operations }
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let write = request();
        assert_eq!(WriteRequest::decode(&write.encode()).unwrap(), write);
        for statements in [vec![], vec![statement("SELECT"), statement("SELECT 2")]] {
            let read = ReadRequest { least_commit: 5, statements };
            assert_eq!(ReadRequest::decode(&read.encode()).unwrap(), read);
        }
        let failure = Failure { code: 2067, message: "UNIQUE constraint failed".into() };
        let outcomes = vec![
            Outcome::Rows(vec![vec![Value::Integer(1), Value::Null], vec![Value::Text("a".into()), Value::Real(-0.0)]]),
            Outcome::Rows(vec![]),
            Outcome::Counts(vec![1, 0]),
            Outcome::Failed(failure),
        ];
        for answer in [Answer::Done { commit: 8, outcomes }, Answer::Stale, Answer::Behind { commit: 1 }] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
    }

    #[test]
    fn a_large_request_travels_in_parts_that_make_it_up() {
        let text = Value::Text("x".repeat(3 * PART_BYTES));
        let large = Statement { sql: "INSERT".into(), params: vec![("text".into(), text)] };
        let write = WriteRequest { operations: vec![Operation { kind: Kind::Rows, statements: vec![large] }], ..request() };
        let entries = write.entries();
        assert_eq!(entries.len(), 4);
        let mut joined = Vec::new();
        for (position, entry) in entries.iter().enumerate() {
            let Entry::Part(part) = Entry::decode(entry).unwrap() else { panic!("{position} is whole") };
            assert_eq!((part.index as usize, part.is_last), (position, position == 3));
            assert_eq!((part.origin, part.number, part.base), (&*write.origin, write.number, write.base));
            assert!(entry.len() < PART_BYTES + 64);
            joined.extend_from_slice(part.data);
        }
        assert_eq!(Entry::decode(&joined).unwrap(), Entry::Whole(write));
        assert_eq!(request().entries(), [request().encode()]);
    }

    #[test]
    fn a_text_travels_once() {
        let one = WriteRequest { operations: request().operations[..1].to_vec(), ..request() };
        let many = WriteRequest { operations: vec![request().operations[0].clone(); 100], ..request() };
        let per_operation = (many.encode().len() - one.encode().len()) / 99;
        assert!(per_operation < 120, "{per_operation}");
    }

    #[test]
    fn no_cut_of_a_request_is_taken_for_a_whole_one() {
        let bytes = request().encode();
        for end in 0..bytes.len() {
            assert!(WriteRequest::decode(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn no_damage_makes_the_reader_panic() {
        let bytes = request().encode();
        for position in 0..bytes.len() {
            for flip in [1u8, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[position] ^= flip;
                let _ = WriteRequest::decode(&damaged);
            }
        }
        let unknown = WriteRequest::decode(&[9]).unwrap_err();
        assert!(unknown.contains("upgrade"), "{unknown}");
    }
}
