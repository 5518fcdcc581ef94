"""Runs every attack in sandboxes of an ordinary user's worker and prints what came of each, as JSON. See test_sandbox_unprivileged.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from blixard.backends.contract import BackendSettings
from blixard.backends.sandbox.backend import SandboxBackend
from blixard.backends.sandbox.seccomp import this_machine
from blixard.backends.sandbox.syscalls import NUMBERS
from tests.integration.sandbox_attacks import ATTACKS, program_of
from tests.integration.test_sandbox_escape import Prison

EXTRA = {
    "who": "import os\nprint(os.getuid(), os.getgid())",
    "memory": "data = []\nwhile True: data.append(bytearray(b'x') * 4_000_000)",
    "grant": "open({granted!r} + '/made', 'w').write('x'); print('made')",
}


async def run_all(root: Path, facts: dict[str, object]) -> dict[str, object]:
    backend = SandboxBackend(
        BackendSettings(scratch=root / "scratch", slots=2, memory_mb=512, processes=32, disk_mb=16)
    )
    await backend.start()
    prison = Prison(backend, root, facts)
    said: dict[str, object] = {"notes": list(backend.info().notes), "uid": os.getuid()}
    try:
        for form in ("script", "command"):
            for name in ATTACKS:
                outcome, heard = await prison.run(form, program_of(name, dict(NUMBERS[this_machine()]), facts))
                said[f"{form}: {name}"] = heard.stdout.strip() or f"{heard.stderr} {outcome}"
                for path in (root / "granted").iterdir():
                    path.unlink()
            for name, source in EXTRA.items():
                outcome, heard = await prison.run(form, source.replace("{granted!r}", repr(facts["granted"])))
                kind = outcome.error.type if outcome.error is not None else str(outcome.kind)
                said[f"{form}: {name}"] = [heard.stdout.strip(), kind]
    finally:
        await backend.stop()
    said["left"] = [str(path) for path in (root / "scratch").rglob("*")]
    return said


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run_all(Path(sys.argv[1]), json.loads(sys.argv[2])))))
