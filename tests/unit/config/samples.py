"""For every setting a value that is not its default: as TOML, as a variable, and as it must arrive."""

from __future__ import annotations

from pathlib import Path

SAMPLES: dict[str, tuple[str, str, object]] = {
    "server.host": ('"::1"', "::1", "::1"),
    "server.port": ("8080", "8080", 8080),
    "server.tls_certificate": ('"/t/c.pem"', "/t/c.pem", Path("/t/c.pem")),
    "server.tls_key": ('"/t/k.pem"', "/t/k.pem", Path("/t/k.pem")),
    "server.url": ('"https://blixard.example:1"', "https://blixard.example:1", "https://blixard.example:1"),
    "server.token": ('"blx_secret"', "blx_secret", "blx_secret"),
    "server.shutdown_grace": ('"1m"', "1m", 60.0),
    "server.request_limit": ('"32MiB"', "32MiB", 32 * 2**20),
    "storage.data_dir": ('"/t/data"', "/t/data", Path("/t/data")),
    "storage.blob_url": ('"s3://bucket/blixard"', "s3://bucket/blixard", "s3://bucket/blixard"),
    "storage.completed_retention": ('"1h"', "1h", 3600.0),
    "storage.failed_retention": ('"2h"', "2h", 7200.0),
    "storage.events_retention": ('"3h"', "3h", 10800.0),
    "worker.slots": ("3", "3", 3),
    "worker.types": ('["wasm"]', "wasm", ("wasm",)),
    "worker.queues": ('["a", "b"]', "a, b", ("a", "b")),
    "worker.labels": ('{ zone = "a", disk = "fast" }', "zone=a,disk=fast", {"zone": "a", "disk": "fast"}),
    "worker.name": ('"w1"', "w1", "w1"),
    "worker.cpus": ("1.5", "1.5", 1.5),
    "worker.memory": ('"8GiB"', "8GiB", 8 * 2**30),
    "worker.prefetch": ("0", "0", 0),
    "worker.grace": ("0.5", "500ms", 0.5),
    "leases.duration": ("3", "3s", 3.0),
    "maintenance.interval": ('"100ms"', "0.1", 0.1),
    "maintenance.prune_interval": ('"10m"', "10m", 600.0),
    "maintenance.batch": ("50", "50", 50),
    "sandbox.memory": ('"64MiB"', "64MiB", 64 * 2**20),
    "sandbox.processes": ("2", "2", 2),
    "sandbox.disk": ('"2MiB"', "2MiB", 2 * 2**20),
    "sandbox.open_files": ("64", "64", 64),
    "wasm.fuel": ("1000000", "1000000", 1_000_000),
    "wasm.cache_size": ('"10MiB"', "10MiB", 10 * 2**20),
    "log.level": ('"debug"', "DEBUG", "debug"),
    "log.format": ('"json"', "json", "json"),
}
TOGETHER = {"server.tls_certificate": "server.tls_key", "server.tls_key": "server.tls_certificate"}
"""Keys that are refused without the other."""
