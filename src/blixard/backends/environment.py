"""The environment of a job: nothing is inherited, everything in it is named here or in its spec."""

from __future__ import annotations

import os
import sys

from blixard.domain.lease import AttemptRef

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def base_environment(*, home: str, temporary: str) -> dict[str, str]:
    """Return what every job has. The interpreter's own programs come first on PATH."""
    return {
        "PATH": f"{os.path.dirname(sys.executable)}:{SYSTEM_PATH}",
        "HOME": home,
        "TMPDIR": temporary,
        "LANG": "C.UTF-8",
    }


def job_variables(ref: AttemptRef) -> dict[str, str]:
    """Return what tells a job which one it is."""
    return {"BLIXARD_JOB_ID": ref.job_id, "BLIXARD_ATTEMPT": str(ref.attempt), "BLIXARD_NAMESPACE": ref.namespace}
