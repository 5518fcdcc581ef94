"""Every limit at the door, in one place. Each error that refuses something names the constant here."""

from __future__ import annotations

from typing import Annotated

import msgspec

KIB = 1024
MIB = 1024 * KIB

MAX_ID_LENGTH = 255
MAX_NAME_LENGTH = 255
MAX_ARGUMENTS_BYTES = 1 * MIB
"""Encoded arguments of one job; larger input travels as a blob."""
MAX_INLINE_ARGUMENTS_BYTES = 64 * KIB
"""Above this the submitting client turns the arguments into a blob by itself."""
MAX_INLINE_RESULT_BYTES = 64 * KIB
MAX_RESULT_BYTES = 16 * MIB
MAX_REQUEST_BYTES = 16 * MIB
MAX_BATCH_JOBS = 1_000
MAX_LIST_JOBS = 1_000
MAX_BUNDLE_BYTES = 10 * MIB
MAX_BLOB_BYTES = 1024 * MIB
MAX_SPEC_BYTES = 256 * KIB
"""The JSON of a job's spec: payload, environment, grants, labels together."""
MAX_TAGS = 32
MAX_LABELS = 32
MAX_INPUTS = 256
MAX_ENVIRONMENT = 256
MAX_ERROR_BYTES = 64 * KIB
"""Error message with traceback; the middle is cut out of a longer one."""
MAX_RETRIES = 1_000
MAX_TIMEOUT_SECONDS = 30 * 24 * 3600.0
MAX_PRIORITY = 1_000
MAX_ATTEMPTS = 10_000
"""However a job is given back, it is not claimed more often than this."""
DEFAULT_MAX_LOST = 3
DEFAULT_OUTPUT_BYTES = 10 * MIB
"""Captured stdout and stderr of one attempt together."""
MAX_CLAIM = 1_000
MAX_WAIT_SECONDS = 60.0
WireInt = Annotated[int, msgspec.Meta(ge=-(1 << 53), le=1 << 53)]
"""An integer that came from outside: SQLite stores it, and every JSON reader reads it without loss."""
