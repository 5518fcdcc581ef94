"""Which reads a node may answer by itself, by the name of the statement.

What decides is a write and goes through the log; writes carry their guards. Reads of the names below come from this node: they see all that
this node has acknowledged, and of other nodes' writes what has arrived, which is usually less than a heartbeat old. All other reads are the leader's.
"""

from __future__ import annotations

LOCAL_READS = frozenset(
    {
        # Listings and counters: a moment old is what a listing is anyway.
        "count_batch",
        "count_jobs",
        "find_spec_ids",
        "list_attempts",
        "list_batch_ids",
        "list_batch_results",
        "list_events",
        "list_ids_by_spec",
        "list_ids_by_state",
        "list_ids_of_batch",
        "list_sessions",
        "list_tokens",
        "position_in_class",
        # Never changed once written, and read after the write that names them came back through this node.
        "find_class",
        "find_specs",
        # Hints for when to look again: too old means one more look.
        "has_ready_job",
        "list_cancelled",
        "list_classes",
        "next_run_at",
        # Maintenance: what is found is checked again by the write that follows.
        "end_of_spec_stretch",
        "list_closed_submitters",
        "list_watched_sessions",
        # Says whether this node can read.
        "health_read",
    }
)
