"""Start the agent as the guest's first process; in the image it is /opt/blixard/lib/start_agent.py.

Python runs without ``site`` (a third of its start), so the directories of packages are named here.
"""

import sys

sys.path[1:1] = ["/opt/blixard/site-packages"]

import importlib.util  # noqa: E402  the path comes first
import runpy  # noqa: E402

if importlib.util.find_spec("blixard.vm.guest.agent"):
    runpy.run_module("blixard.vm.guest.agent", run_name="__main__", alter_sys=True)
else:  # until the agent stands: say that the guest is up, run what is sent line by line
    port = open("/dev/vport1p1" if __import__("os").path.exists("/dev/vport1p1") else "/dev/vport0p1", "r+b", buffering=0)  # noqa: PTH123, SIM115
    port.write(b"ready\n")
    while True:
        line = port.readline()
        if line:
            try:
                port.write(repr(eval(line)).encode() + b"\n")
            except Exception as error:
                port.write(repr(error).encode() + b"\n")
        else:
            __import__("time").sleep(0.05)
