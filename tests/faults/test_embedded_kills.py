"""`blixard map` without a server, killed with kill -9 again and again: it carries on, and every input is completed once."""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import time
from pathlib import Path

from tests.faults.history import GIVEN_BACK, History, Marks
from tests.faults.plant import PATIENCE, Plant, plant, until

INPUTS = 320
KILLS = 6
LEASE_SECONDS = 600
"""Nothing here lasts as long: whatever is taken back was known to be dead by its lock."""
AT_ONCE_SECONDS = 45.0
"""At once on a loaded machine: starting Python, opening the store, starting a worker and a sandbox."""
FUNCTION = """
import os
import time


def mark(word):
    file = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{word} {os.environ['BLIXARD_JOB_ID']} {os.environ['BLIXARD_ATTEMPT']}\\n".encode())
    os.close(file)


def double(line):
    mark("begin")
    time.sleep(0.05)
    mark("end")
    return int(line) * 2
"""


def test_a_map_killed_again_and_again_completes_every_input_once(tmp_path: Path) -> None:
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with plant(tmp_path, leases__duration=f"{LEASE_SECONDS}s", worker__slots=4) as site:
        marks = Marks(tmp_path / "marks")
        (tmp_path / "doubling.py").write_text(FUNCTION)
        (tmp_path / "list").write_text("".join(f"{number}\n" for number in range(INPUTS)))
        killed_at = [kill_at_random(site, marks, chance) for _ in range(KILLS)]
        last = map_all(site, marks)
        assert last.wait(PATIENCE * 2) == 0, site.said()
        site.check_nothing_left()

        history = History(site.data_dir)
        history.check([])
        marks.check(history)
        check_results(tmp_path, history)
        check_taken_back_at_once(history, killed_at)
        site.check_no_traceback()


def map_all(site: Plant, marks: Marks) -> subprocess.Popen[bytes]:
    grants = ("--allow-write", str(marks.path), "--env", f"MARKS={marks.path}")
    return site.start("map", "--json", *grants, "doubling.py:double", "list", name="map")


def kill_at_random(site: Plant, marks: Marks, chance: random.Random) -> float:
    """Start the map, kill it while its jobs run, and see its worker and their processes vanish; return when it was killed."""
    before = len(marks.read())
    process = map_all(site, marks)
    more = chance.randint(1, 2 * INPUTS // KILLS // 2)
    until(lambda: len(marks.read()) >= before + more or process.poll() is not None, "jobs run")
    time.sleep(chance.uniform(0, 0.1))  # sleep: any moment is as good as any other
    assert process.poll() is None, f"it ended by itself:\n{site.said()}"
    process.kill()
    killed_at = time.time()
    process.wait()
    site.check_nothing_left()
    return killed_at


def check_results(directory: Path, history: History) -> None:
    assert len(history.jobs) == INPUTS
    assert {job.state for job in history.jobs.values()} == {"completed"}
    lines = [json.loads(line) for line in max(directory.glob("*-map.out")).read_text().splitlines()]
    assert {line["input"]: line["result"] for line in lines} == {str(number): 2 * number for number in range(INPUTS)}
    assert {line["id"] for line in lines} == set(history.jobs)
    assert len(lines) == INPUTS


def check_taken_back_at_once(history: History, killed_at: list[float]) -> None:
    taken_back = history.attempts_with(*GIVEN_BACK)
    print(f"{KILLS} kills, {len(taken_back)} attempts taken back")
    assert len(taken_back) >= KILLS // 2, "the kills hardly hit any job"
    for attempt in taken_back:
        next_one = history.attempts[attempt.job_id][attempt.number]
        before = max(moment for moment in killed_at if moment * 1e6 <= attempt.finished_at)
        waited = attempt.finished_at / 1e6 - before
        assert waited < AT_ONCE_SECONDS, f"{attempt} was taken back {waited:.1f} s after the kill"
        assert next_one.claimed_at >= attempt.finished_at
