"""Whether this code runs as a program, or inside of a job that was only to import it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from blixard.errors import InvalidRequest


def check_not_importing(function: Callable[..., object]) -> None:
    """Refuse to submit while a job imports the function's module: each job would submit the next one, without end.

    Raises ``InvalidRequest``.
    """
    job_id = os.environ.get("BLIXARD_JOB_ID")
    module = sys.modules.get(getattr(function, "__module__", ""))
    # What the import system itself asks to know a module that is not complete yet.
    if job_id and getattr(getattr(module, "__spec__", None), "_initializing", False):
        raise InvalidRequest(
            f'{job_id} only imports this file for its functions: put what submits jobs under `if __name__ == "__main__":`',
            field="function",
        )
