"""Example bodies by the name of the route. A test decodes each, so they cannot rot."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, object] = {
    "submit": {
        "spec": {
            "name": "greet",
            "payload": {"kind": "command", "argv": ["echo", "hello"]},
            "timeout": 30,
            "retry": {"retries": 3},
        },
        "jobs": [{"arguments": ["world"]}],
    },
    "wait": {"ids": ["job_01jd8k2m3n4p5q6r7s8t9vwxyz"], "wait": 30},
    "open_batch": {"name": "measure", "identity": "5f1c0e6b", "total": 1000},
    "register": {"name": "builder-1", "offer": {"capabilities": {"process": ["minimal", "standard"]}, "slots": 4}},
    "sync": {"session": "worker_01jd8k2m3n4p5q6r7s8t9vwxyz", "number": 1, "want": 4, "wait": 3},
    "worker_logs": [
        {
            "ref": ["default", "job_1", 1],
            "offset": 0,
            "records": [[1700000000000000, "stdout", "aGVsbG8K"]],
            "ended": True,
        }
    ],
    "create_token": {"name": "ci", "scopes": ["submit", "read"], "expires_in": 2592000},
}
