"""Blixard runs jobs in isolated sandboxes from a durable queue."""
