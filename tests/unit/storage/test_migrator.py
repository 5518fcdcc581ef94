from __future__ import annotations

import threading
from pathlib import Path

import apsw
import pytest

from blixard.errors import InternalError, StoreUnavailable
from blixard.storage.migrator import Migration, Phase, load_migrations, migrate

FIRST = "-- phase: before\nCREATE TABLE a (id INTEGER) STRICT;\nCREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1; SELECT 2; END;\n"
SECOND = "-- phase: after\nCREATE TABLE b (id INTEGER) STRICT;\nINSERT INTO b VALUES (1);\n"


def write(directory: Path, **files: str) -> tuple[Migration, ...]:
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / f"{name.removeprefix('m')}.sql").write_text(text)
    return load_migrations(directory)


@pytest.fixture
def steps(tmp_path: Path) -> tuple[Migration, ...]:
    return write(tmp_path / "steps", m0001_first=FIRST, m0002_second=SECOND)


@pytest.fixture
def connection(tmp_path: Path) -> apsw.Connection:
    return apsw.Connection(str(tmp_path / "x.db"))


def test_steps_are_applied_once_in_order_and_recorded(
    connection: apsw.Connection, steps: tuple[Migration, ...]
) -> None:
    assert [step.phase for step in steps] == [Phase.BEFORE, Phase.AFTER]
    assert migrate(connection, steps, applied_at=7) == 2
    assert migrate(connection, steps, applied_at=8) == 0
    rows = connection.execute("SELECT number, name, digest, applied_at FROM schema_migrations").fetchall()
    assert rows == [(1, "first", steps[0].digest, 7), (2, "second", steps[1].digest, 7)]
    assert connection.execute("SELECT * FROM b").fetchall() == [(1,)]


def test_only_what_is_missing_is_applied(connection: apsw.Connection, steps: tuple[Migration, ...]) -> None:
    assert migrate(connection, steps[:1], applied_at=1) == 1
    assert migrate(connection, steps, applied_at=2) == 1


def test_a_newer_schema_is_refused_in_clear_words(connection: apsw.Connection, steps: tuple[Migration, ...]) -> None:
    migrate(connection, steps, applied_at=1)
    with pytest.raises(StoreUnavailable, match=r"written by a newer Blixard \(schema 2, this one knows 1\)") as caught:
        migrate(connection, steps[:1], applied_at=1)
    assert caught.value.hint == "upgrade Blixard, or use another data directory"


def test_an_applied_step_that_was_changed_is_our_bug(
    tmp_path: Path, connection: apsw.Connection, steps: tuple[Migration, ...]
) -> None:
    migrate(connection, steps, applied_at=1)
    changed = write(tmp_path / "steps", m0001_first=FIRST + "-- changed\n")
    with pytest.raises(InternalError, match="0001_first was changed"):
        migrate(connection, changed, applied_at=1)


def test_a_step_that_fails_leaves_nothing_of_itself(tmp_path: Path, connection: apsw.Connection) -> None:
    broken = write(tmp_path / "broken", m0001_first=FIRST, m0002_bad=SECOND + "CREATE NONSENSE;")
    with pytest.raises(InternalError, match="0002_bad is wrong"):
        migrate(connection, broken, applied_at=1)
    assert connection.execute("SELECT max(number) FROM schema_migrations").fetchall() == [(1,)]
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'b'").fetchall() == [(0,)]
    assert not connection.in_transaction


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"m0002_x": FIRST}, "stands where 0001"),
        ({"m0001_x": FIRST, "m0003_y": FIRST}, "stands where 0002"),
        ({"m0001_x": FIRST, "m0001_y": FIRST}, "stands where 0002"),
        ({"m1_x": FIRST}, "not a migration's name"),
        ({"m0001_x": "CREATE TABLE a (id INTEGER);"}, "first line"),
        ({"m0001_x": "-- phase: during\n"}, "first line"),
    ],
)
def test_files_that_break_the_rules_are_our_bug(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    with pytest.raises(InternalError, match=complaint):
        write(tmp_path / "files", **files)


def test_many_that_migrate_at_once_apply_each_step_once(tmp_path: Path) -> None:
    steps = write(
        tmp_path / "many",
        **{f"m{n:04}_x": f"-- phase: before\nCREATE TABLE t{n} (id INTEGER) STRICT;" for n in range(1, 21)},
    )
    applied: list[int] = []
    start = threading.Barrier(4)

    def run() -> None:
        connection = apsw.Connection(str(tmp_path / "x.db"))
        connection.set_busy_timeout(60_000)
        start.wait()
        applied.append(migrate(connection, steps, applied_at=1))
        connection.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(applied) == 20
    assert len(applied) == 4
