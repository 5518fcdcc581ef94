"""Started by path, so that the interpreter finds this package whether or not it is installed: ``-I`` leaves out PYTHONPATH."""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

from blixard.backends.zygote.server import main  # noqa: E402 -- after the path is set

main()
