"""What every ``Database`` promises."""

from __future__ import annotations

import asyncio
import json

import pytest

from blixard.errors import ConstraintFailed, InternalError, StoreUnavailable
from blixard.storage.database import Database, Params, Statement
from tests.conformance.storage.conftest import ADD, ADD_MANY, COUNT, GROW, GROW_ALL, HISTORY, QUICK_SIZE, SIZE

PATIENCE = 60.0


async def test_a_write_returns_its_rows_and_is_seen_by_the_next_read(database: Database) -> None:
    assert await database.write(ADD, {"name": "a", "size": 1}) == [(1, "a")]
    assert await database.read(SIZE, {"name": "a"}) == [(1,)]
    assert await database.read(QUICK_SIZE, {"name": "a"}) == [(1,)]


async def test_every_acknowledged_write_is_seen_by_every_kind_of_read(database: Database) -> None:
    await database.write(ADD, {"name": "a", "size": 0})
    for size in range(1, 101):
        await database.write(GROW, {"name": "a", "by": 1})
        read = SIZE if size % 2 else QUICK_SIZE
        assert await database.read(read, {"name": "a"}) == [(size,)]


async def test_one_statement_takes_a_json_array(database: Database) -> None:
    rows = [[f"item {number}", number] for number in range(1_000)]
    assert len(await database.write(ADD_MANY, {"items": json.dumps(rows)})) == 1_000
    assert await database.read(COUNT) == [(1_000,)]


async def test_calls_take_effect_in_their_order(database: Database) -> None:
    await database.write(ADD, {"name": "a", "size": 0})
    answers = await asyncio.gather(*(database.write(GROW, {"name": "a", "by": 1}) for _ in range(500)))
    assert [rows[0][0] for rows in answers] == list(range(1, 501))


async def test_a_statement_that_fails_changes_nothing_and_fails_nobody_else(database: Database) -> None:
    calls = [database.write(ADD, {"name": f"n{number // 2}", "size": number}) for number in range(200)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, ConstraintFailed) for answer in answers] == [False, True] * 100
    assert await database.read(COUNT) == [(100,)]


async def test_a_statement_that_fails_half_way_undoes_its_rows_and_what_its_triggers_did(database: Database) -> None:
    """A million rows in one statement would do the same: SQLite keeps a statement journal, so no savepoint is needed."""
    await database.write(ADD_MANY, {"items": json.dumps([["a", 1], ["b", 2], ["c", 990]])})
    before, failed, after = await asyncio.gather(
        database.write(GROW, {"name": "a", "by": 5}),
        database.write(GROW_ALL, {"by": 10}),  # the third row breaks a constraint inside the trigger
        database.write(GROW, {"name": "b", "by": 7}),
        return_exceptions=True,
    )
    assert before == [(6,)]
    assert isinstance(failed, ConstraintFailed)
    assert after == [(9,)]
    assert await database.read(HISTORY) == [(2,)]


async def test_a_statement_with_rows_to_return_that_fails_half_way_undoes_its_rows(database: Database) -> None:
    batch = json.dumps([["x", 1], ["y", 2], ["x", 3]])
    _, failed, _ = await asyncio.gather(
        database.write(ADD, {"name": "before", "size": 0}),
        database.write(ADD_MANY, {"items": batch}),
        database.write(ADD, {"name": "after", "size": 0}),
        return_exceptions=True,
    )
    assert isinstance(failed, ConstraintFailed)
    assert await database.read(COUNT) == [(2,)]


async def test_a_statement_that_rolls_back_the_whole_transaction_still_fails_nobody_else(database: Database) -> None:
    rude = Statement("rude", "INSERT OR ROLLBACK INTO items (name, size) VALUES (:name, :size) RETURNING id")
    first, failed, last = await asyncio.gather(
        database.write(ADD, {"name": "a", "size": 0}),
        database.write(rude, {"name": "a", "size": 0}),
        database.write(ADD, {"name": "b", "size": 0}),
        return_exceptions=True,
    )
    assert not isinstance(first, BaseException)
    assert isinstance(failed, ConstraintFailed)
    assert not isinstance(last, BaseException)
    assert await database.read(COUNT) == [(2,)]


async def test_a_transaction_counts_rows_without_those_of_triggers(database: Database) -> None:
    items = json.dumps([["a", 1], ["b", 2]])
    counts = await database.transaction(
        [(ADD_MANY, {"items": items}), (GROW_ALL, {"by": 1}), (GROW, {"name": "nobody", "by": 1}), (COUNT, {})]
    )
    assert counts == [2, 2, 0, 0]
    assert await database.read(HISTORY) == [(2,)]


async def test_a_transaction_is_all_or_nothing_beside_others(database: Database) -> None:
    good: list[tuple[Statement, Params]] = [(ADD, {"name": "a", "size": 0}), (ADD, {"name": "b", "size": 0})]
    bad: list[tuple[Statement, Params]] = [(ADD, {"name": "c", "size": 0}), (ADD, {"name": "c", "size": 0})]
    answers = await asyncio.gather(
        database.transaction(good),
        database.transaction(bad),
        database.write(ADD, {"name": "d", "size": 0}),
        return_exceptions=True,
    )
    assert answers[0] == [1, 1]
    assert isinstance(answers[1], ConstraintFailed)
    assert answers[2] == [(3, "d")]
    assert await database.read(COUNT) == [(3,)]


@pytest.mark.parametrize("sql", ["SELECT nothing FROM nowhere", "SELEC 1", 'SELECT "not a column"', "SELECT :missing"])
async def test_a_wrong_statement_is_our_bug_and_says_its_name(database: Database, sql: str) -> None:
    for call in (database.read, database.write):
        with pytest.raises(InternalError, match="wrong_one"):
            await call(Statement("wrong_one", sql), {})


@pytest.mark.parametrize("value", [1 << 70, object()])
async def test_a_value_that_no_column_can_hold_is_our_bug(database: Database, value: int) -> None:
    with pytest.raises(InternalError, match="size"):
        await database.read(SIZE, {"name": value})


@pytest.mark.parametrize(
    "expression",
    ["random()", "randomblob(4)", "datetime('now')", "date()", "julianday('now')", "unixepoch()", "CURRENT_TIMESTAMP"],
)
async def test_what_is_not_deterministic_is_refused(database: Database, expression: str) -> None:
    statement = Statement("clock", f"SELECT {expression}")
    for call in (database.read, database.write):
        with pytest.raises(InternalError, match=r"is forbidden|unsafe"):
            await call(statement)
    quick = Statement("clock", f"SELECT {expression}", quick=True)
    with pytest.raises(InternalError, match=r"is forbidden|unsafe"):
        await database.read(quick)


async def test_foreign_keys_are_enforced(database: Database) -> None:
    with pytest.raises(ConstraintFailed):
        await database.write(Statement("orphan", "INSERT INTO history (item, size) VALUES (99, 1)"))


async def test_a_cancelled_caller_disturbs_nobody(database: Database) -> None:
    calls = [asyncio.ensure_future(database.write(ADD, {"name": f"n{number}", "size": 0})) for number in range(300)]
    await asyncio.wait(calls[:1])
    for call in calls[::3]:
        call.cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    kept = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert len(kept) >= 200
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers if isinstance(answer, BaseException))
    stored = (await database.read(COUNT))[0][0]
    assert isinstance(stored, int)
    assert stored >= len(kept)


async def test_values_come_back_as_they_went_in(database: Database) -> None:
    statement = Statement("echo", "SELECT :a, :b, :c, :d, :e")
    values = {"a": None, "b": -(2**63), "c": 0.1, "d": "snow ☃ \0 tail", "e": b"\x00\xff"}
    assert await database.read(statement, values) == [tuple(values.values())]


async def test_watch_wakes_after_a_change_and_joins_several(database: Database) -> None:
    changes = database.watch()
    for number in range(20):
        await database.write(ADD, {"name": f"n{number}", "size": 0})
    await asyncio.wait_for(anext(changes), PATIENCE)
    later = asyncio.ensure_future(anext(changes))
    await database.write(GROW, {"name": "n1", "by": 1})
    await asyncio.wait_for(later, PATIENCE)


async def test_two_watchers_both_wake(database: Database) -> None:
    first, second = database.watch(), database.watch()
    await database.write(ADD, {"name": "a", "size": 0})
    await asyncio.wait_for(asyncio.gather(anext(first), anext(second)), PATIENCE)


async def test_a_write_that_changes_nothing_wakes_nobody(database: Database) -> None:
    changes = database.watch()
    woken = asyncio.ensure_future(anext(changes))
    await database.write(ADD, {"name": "a", "size": 0})
    await asyncio.wait_for(woken, PATIENCE)
    woken = asyncio.ensure_future(anext(changes))
    for _ in range(20):
        await database.write(GROW, {"name": "nobody", "by": 1})
    assert not woken.done()
    woken.cancel()


async def test_a_watcher_hears_of_the_end(database: Database) -> None:
    waiting = asyncio.ensure_future(anext(database.watch()))
    await asyncio.sleep(0)  # sleep: lets the watcher start to wait
    await database.close()
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(waiting, PATIENCE)


async def test_closing_finishes_what_was_accepted_and_refuses_the_rest(database: Database) -> None:
    calls = [asyncio.ensure_future(database.write(ADD, {"name": f"n{number}", "size": 0})) for number in range(500)]
    await asyncio.wait(calls[:1])
    await database.close()
    answers = await asyncio.gather(*calls)
    assert len({row[0] for rows in answers for row in rows}) == 500
    for call in (database.read(COUNT), database.write(GROW, {"name": "a", "by": 1}), database.transaction([])):
        with pytest.raises(StoreUnavailable, match="not open"):
            await call
    with pytest.raises(StoreUnavailable, match="not open"):
        database.watch()


async def test_open_and_close_may_be_repeated_in_any_order(database: Database) -> None:
    await asyncio.gather(database.open(), database.open())
    await asyncio.gather(database.close(), database.close())
    await database.close()
    await asyncio.gather(database.open(), database.close(), database.open())
    assert await database.read(COUNT) == [(0,)]
