"""What a hot statement touches does not grow with the number of jobs: plans, and pages counted by SQLite itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import apsw
import msgspec
import pytest

from blixard.storage.sqlite import configure_connection
from blixard.storage.statements import Statements, load_statements

MAY_SCAN = {
    # statement: the small tables that it may walk, and why
    "list_classes": {"placement_classes"},  # new ones only: by primary key
    "list_closed_submitters": {"placement_classes"},  # the index of closed classes
    "list_watched_sessions": {"sessions"},  # as many as there are workers
    "list_ids_by_state": {"sessions"},
    "delete_unused_classes": {"c", "s"},  # once a minute, as many as there are kinds of jobs
    "delete_empty_batches": {"b"},  # once a minute
    "end_of_spec_stretch": {"specs"},
}
VIRTUAL = {"json_each", "wanted", "c", "head", "r", "d", "spec", "picked"}


@pytest.fixture
def statements() -> Statements:
    return load_statements(files("blixard.storage") / "sql")


def connect(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    configure_connection(connection)
    connection.execute("PRAGMA journal_mode = WAL")
    for migration in sorted((Path(str(files("blixard.storage"))) / "migrations").glob("*.sql")):
        connection.execute(migration.read_text())
    return connection


def plan_of(connection: apsw.Connection, sql: str) -> list[str]:
    params = dict.fromkeys(re.findall(r":(\w+)", sql))
    return [str(row[3]) for row in connection.execute("EXPLAIN QUERY PLAN " + sql, params)]


def test_no_statement_walks_a_table_that_grows_with_the_jobs(tmp_path: Path, statements: Statements) -> None:
    connection = connect(tmp_path / "plans.db")
    wrong = []
    for statement in statements:
        for line in plan_of(connection, statement.sql):
            scanned = re.match(r"SCAN (\w+)( VIRTUAL TABLE| USING)?", line)
            if not scanned or "VIRTUAL TABLE" in line or scanned[1] in {"CONSTANT", "subquery"}:
                continue
            if scanned[1] not in MAY_SCAN.get(statement.name, set()) and scanned[1] in GROWING:
                wrong.append(f"{statement.name}: {line}")
    assert not wrong


GROWING = {
    "jobs",
    "attempts",
    "events",
    "specs",
    "blob_refs",
    "class_counts",
    "batch_counts",
    "spec_tags",
    "batches",
}


def test_reports_start_from_the_array_and_never_from_an_index_on_state(tmp_path: Path, statements: Statements) -> None:
    connection = connect(tmp_path / "plans.db")
    for name in (
        "complete_attempts",
        "finish_attempts",
        "start_attempts",
        "lose_leases",
        "find_results",
        "find_jobs",
        "cancel_jobs",
    ):
        lines = [line for line in plan_of(connection, statements[name].sql) if re.search(r"SEARCH jobs\b", line)]
        by_key = [line for line in lines if re.search(r"\((namespace=\? AND id|rowid)=\?\)", line)]
        leased = [line for line in lines if "jobs_leased (session=?)" in line]
        assert by_key, name
        assert len(by_key) + len(leased) == len(lines), (name, lines)


def test_a_claim_seeks_into_each_class(tmp_path: Path, statements: Statements) -> None:
    lines = plan_of(connect(tmp_path / "plans.db"), statements["claim_jobs"].sql)
    assert any("jobs_ready (class_id=?)" in line for line in lines)


class Store:
    """A database with ``count`` jobs, a tenth of them claimable, that counts the pages which statements touch."""

    def __init__(self, path: Path, statements: Statements, count: int) -> None:
        self.connection = connect(path)
        self.statements = statements
        self.count = count
        self.number = 0
        self.run(
            "add_class",
            queue="q",
            worker_type="process",
            isolation="minimal",
            labels="{}",
            cpus=0,
            memory_mb=0,
            submitter="",
        )
        self.run("add_spec", digest="x", class_id=1, name="n", body='{"tags":[]}')
        self.run("add_session", id="s", name="w", offer="{}", host="", pid=1, interpreter="", token="")
        for first in range(0, count, 1000):
            jobs = [
                [f"job_{n:08d}", 0, 5 if n % 10 == 0 else 10**15, f"[[{n}],{{}}]", None, None]
                for n in range(first, first + 1000)
            ]
            self.run(
                "add_jobs",
                spec_id=1,
                class_id=1,
                max_retries=0,
                max_lost=3,
                batch=None,
                plain="{}",
                special=encode(jobs),
            )
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def run(self, statement_name: str, /, **params: object) -> list[tuple[object, ...]]:
        statement = self.statements[statement_name]
        wanted = {"namespace": "default", "now": 10, "session": "s", "worker": "w", "max_attempts": 100, **params}
        return list(
            self.connection.execute(statement.sql, {k: v for k, v in wanted.items() if f":{k}" in statement.sql})
        )

    def pages(self, statement_name: str, /, **params: object) -> int:
        def touched() -> int:
            return sum(
                self.connection.status(code)[0]
                for code in (apsw.SQLITE_DBSTATUS_CACHE_HIT, apsw.SQLITE_DBSTATUS_CACHE_MISS)
            )

        before = touched()
        assert self.run(statement_name, **params)
        return touched() - before

    def costs(self) -> Mapping[str, int]:
        """Return pages touched by each hot operation on a job in the middle."""
        middle = self.count // 2 + 1
        self.number += 1
        return {
            "find": self.pages("find_job", id=f"job_{middle:08d}"),
            "cancel": self.pages("cancel_jobs", ids=encode([f"job_{middle:08d}"])),
            "retry": self.pages("retry_jobs", ids=encode([f"job_{middle:08d}"])),
            "claim": self.pages("claim_jobs", classes="[1]", want=1, number=self.number),
        }


def encode(value: object) -> str:
    return msgspec.json.encode(value).decode()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    statements = load_statements(files("blixard.storage") / "sql")
    root = tmp_path_factory.mktemp("cost")
    return Store(root / "small.db", statements, 1_000), Store(root / "large.db", statements, 100_000)


def test_find_cancel_retry_and_claim_touch_as_many_pages_among_100_000_jobs_as_among_1_000(
    stores: tuple[Store, Store],
) -> None:
    small, large = stores
    few, many = small.costs(), large.costs()
    for name in few:
        # one more level of a B-tree for each table and index that the statement goes through, and nothing else
        assert many[name] <= few[name] * 1.75, (few, many)


def test_no_hot_statement_is_compiled_anew_for_other_values(tmp_path: Path, statements: Statements) -> None:
    store = Store(tmp_path / "values.db", statements, 1_000)
    compiled: list[str | None] = []

    def note(_action: int, *names: str | None) -> int:
        compiled.append(names[0])
        return apsw.SQLITE_OK

    store.connection.authorizer = note  # asked whenever a statement is compiled
    for number in (11, 12, 13):
        compiled.clear()
        claimed = store.run("claim_jobs", number=number, classes="[1]", want=number)
        refs = [row[:3] for row in claimed]
        assert len(refs) == number
        store.run("start_attempts", reports=encode([[*ref, number] for ref in refs]))
        store.run("list_leases", session=f"s{number}")
        store.run("list_cancelled", session=f"s{number}")
        store.run("find_claimed", number=number)
        store.run("has_ready_job", classes=f"[{number}]")
        store.run("find_job", id=refs[0][1])
        store.run("find_results", ids=encode([ref[1] for ref in refs]))
        reports = [[*ref, "completed", number, number, 0, "1", None, None, True, None] for ref in refs[1:]]
        assert len(store.run("finish_attempts", reports=encode(reports))) == number - 1
        plain = {str(refs[0][1]): [refs[0][2], number, "1"]}
        assert len(store.run("complete_attempts", reports=encode(plain))) == 1
        store.run("find_attempt_outcomes", reports=encode(refs))
        assert bool(compiled) == (number == 11), compiled
