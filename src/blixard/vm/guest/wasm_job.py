"""Runs one compiled Wasm module in a job's process, with the runner that the host uses (backends/wasm/engine.py)."""

from __future__ import annotations

import socket

from blixard.backends.packets import send_packet
from blixard.backends.wasm.engine import Runner, make_engine, make_linker
from blixard.backends.wasm.wire import RunRequest, decode_request, encode
from blixard.vm.guest.orders import ANSWER_TAG, FAILURE_TAG, OUTPUT_TAGS, Failure
from blixard.vm.guest.orders import encode as encode_failure

OUTPUT_CHUNK = 32 * 1024


def run_wasm(channel: socket.socket, data: bytes) -> int:
    """Carry out a ``RunRequest``; its paths are the job's."""
    request = decode_request(data)
    if not isinstance(request, RunRequest):
        send_packet(channel, FAILURE_TAG + encode_failure(Failure("InternalError", "not an order to run a module")))
        return 1

    def write(is_error: bool, output: bytes) -> None:
        tag = OUTPUT_TAGS[int(is_error) : int(is_error) + 1]
        for start in range(0, len(output), OUTPUT_CHUNK):
            channel.send(tag + output[start : start + OUTPUT_CHUNK])

    engine = make_engine(fuel=request.fuel is not None)
    report = Runner(engine, make_linker(engine), write).run(request, lambda: None)
    send_packet(channel, ANSWER_TAG + encode(report))
    return 0
