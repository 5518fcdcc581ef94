"""Start the agent as the guest's first process; in the image it is /opt/blixard/lib/start_agent.py.

Python runs without ``site`` (a third of its start), so directories of packages are named here: those of our own code first, then what
the image was built with, which jobs import.
"""

import glob
import sys

sys.path[1:1] = ["/opt/blixard/site-packages"]

import runpy  # noqa: E402  the path comes first
import site  # noqa: E402  the path comes first

for directory in (*glob.glob("/usr/local/lib/python3.*/dist-packages"), "/usr/lib/python3/dist-packages"):
    site.addsitedir(directory)

runpy.run_module("blixard.vm.guest.agent", run_name="__main__", alter_sys=True)
