from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import apsw
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blixard.errors import InternalError
from blixard.storage.migrator import load_migrations
from blixard.storage.statements import load_statements, parse_statements

TWO = """-- Everything about jobs.

-- name: find_job
-- One job.
-- quick
SELECT id FROM jobs -- by its key; nothing else
WHERE id = :id AND note <> ';';

-- name: count_jobs
-- All jobs.
-- In two lines.
SELECT count(*) FROM jobs
"""


def test_statements_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "jobs.sql").write_text(TWO)
    (tmp_path / "notes.txt").write_text("not SQL")
    statements = load_statements(tmp_path)
    found = statements["find_job"]
    assert found.sql == "SELECT id FROM jobs -- by its key; nothing else\nWHERE id = :id AND note <> ';'"
    assert found.quick
    assert not statements["count_jobs"].quick
    assert [statement.name for statement in statements] == ["find_job", "count_jobs"]
    assert len(statements) == 2


def test_an_unknown_name_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="'absent'"):
        load_statements(tmp_path)["absent"]


def test_a_name_twice_is_our_bug_also_in_two_files(tmp_path: Path) -> None:
    for name in ("a.sql", "b.sql"):
        (tmp_path / name).write_text("-- name: same\n-- Purpose.\nSELECT 1;\n")
    with pytest.raises(InternalError, match=r"b\.sql: the statement 'same' is defined twice"):
        load_statements(tmp_path)["same"]


def test_nothing_is_read_before_it_is_needed_and_then_only_once(tmp_path: Path) -> None:
    statements = load_statements(tmp_path / "later")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "a.sql").write_text("-- name: a\n-- Purpose.\nSELECT 1;\n")
    first = statements["a"]
    (tmp_path / "later" / "a.sql").unlink()
    assert statements["a"] is first


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("SELECT 1;", "before the first"),
        ("-- name: a\nSELECT 1;", "purpose"),
        ("-- name: a\n-- quick\nSELECT 1;", "purpose"),
        ("-- name: a\n-- Purpose.\n", "exactly one"),
        ("-- name: a\n-- Purpose.\nSELECT 1; SELECT 2;", "exactly one"),
        ("-- name: a\n-- Purpose.\n;", "exactly one"),
        ("-- name: A b\n-- Purpose.\nSELECT 1;", "not a name"),
        ("-- name: \n-- Purpose.\nSELECT 1;", "not a name"),
    ],
)
def test_a_file_that_breaks_the_rules_says_how(text: str, complaint: str) -> None:
    with pytest.raises(InternalError, match=complaint):
        parse_statements(text, source="x.sql")


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        statements = parse_statements(text, source="x.sql")
    except InternalError:
        return
    assert all(statement.sql and statement.name for statement in statements)


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
LITERALS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map(
    lambda text: "'" + text.replace("'", "''") + "'"
)


@given(st.dictionaries(NAMES, LITERALS, max_size=5))
def test_what_is_written_is_read_back(literals: dict[str, str]) -> None:
    text = "\n".join(f"-- name: {name}\n-- Purpose.\nSELECT {literal};\n" for name, literal in literals.items())
    parsed = {statement.name: statement.sql for statement in parse_statements(text, source="x.sql")}
    assert parsed == {name: f"SELECT {literal}" for name, literal in literals.items()}


def test_every_statement_of_the_product_fits_its_schema() -> None:
    connection = apsw.Connection(":memory:")
    for migration in load_migrations(files("blixard.storage") / "migrations"):
        connection.execute(migration.sql)
    statements = load_statements(files("blixard.storage") / "sql")
    assert len(statements) > 20
    for statement in statements:
        connection.execute(f"EXPLAIN {statement.sql}", AnyParameter())


class AnyParameter(dict[str, None]):
    def __missing__(self, key: str) -> None:
        return None
