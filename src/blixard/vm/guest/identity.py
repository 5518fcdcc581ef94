"""Makes a clone differ from its template: randomness, clock, names, network. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import struct
import time
from typing import Any  # decoded JSON

RNDADDENTROPY = 0x40085203  # linux/random.h
RNDRESEEDCRNG = 0x5207
MACHINE_ID = "/run/machine-id"
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFHWADDR = 0x890B, 0x8914, 0x8916, 0x891C, 0x8924
IFF_UP, RTF_UP, RTF_GATEWAY = 1, 1, 2
CARD = "eth0"


def prepare_identity() -> None:
    """Have the machine id lie in memory, where a clone writes it quickest."""
    if not os.path.islink("/etc/machine-id"):
        if os.path.exists("/etc/machine-id"):
            os.unlink("/etc/machine-id")
        os.symlink(MACHINE_ID, "/etc/machine-id")


def take_identity(order: dict[str, Any]) -> None:
    """Take on what the host gives. Raises ``OSError`` when the kernel refuses any of it."""
    seed_kernel(bytes.fromhex(order["seed"]))
    random.seed()
    time.clock_settime_ns(time.CLOCK_REALTIME, int(order["time_ns"]))
    socket.sethostname(order["host_name"])
    with open(MACHINE_ID, "w", encoding="ascii") as file:
        file.write(order["machine_id"] + "\n")
    if order.get("network"):
        set_network(order["network"])


def seed_kernel(seed: bytes) -> None:
    """Credit the seed to the kernel's randomness and have it used from now on."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("=ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def set_network(network: dict[str, str]) -> None:
    """Give the card its addresses and bring it up."""
    address, _, prefix = network["address"].partition("/")
    mask = socket.inet_ntoa(struct.pack("!I", (0xFFFFFFFF << (32 - int(prefix))) & 0xFFFFFFFF))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if network.get("mac"):
            _request(sock, SIOCSIFFLAGS, struct.pack("H", 0))
            _request(sock, SIOCSIFHWADDR, struct.pack("H6s", 1, bytes.fromhex(network["mac"].replace(":", ""))))
        _request(sock, SIOCSIFADDR, _address(address))
        _request(sock, SIOCSIFNETMASK, _address(mask))
        _request(sock, SIOCSIFFLAGS, struct.pack("H", IFF_UP))
        with contextlib.suppress(FileExistsError):
            fcntl.ioctl(sock, SIOCADDRT, _default_route(network["gateway"]))
    with open("/etc/resolv.conf", "w", encoding="ascii") as file:
        file.write(f"nameserver {network['dns']}\n")


def _request(sock: socket.socket, number: int, value: bytes) -> None:
    fcntl.ioctl(sock, number, struct.pack("16s24s", CARD.encode(), value))


def _address(text: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


def _default_route(gateway: str) -> bytes:
    """Return a ``struct rtentry``."""
    anywhere = _address("0.0.0.0")  # noqa: S104 -- the default route
    numbers = (RTF_UP | RTF_GATEWAY, 0, 0, 0, 0, 0, 0, 0, 0)
    return struct.pack("L16s16s16sHh4xLPh6xPLLH6x", 0, anywhere, _address(gateway), anywhere, *numbers)
