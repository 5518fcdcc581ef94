"""Started by path, so that the interpreter finds this package whether or not it is installed: ``-I`` leaves out PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

from blixard.backends.zygote.server import main

main()
