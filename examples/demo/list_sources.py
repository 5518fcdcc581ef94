"""Prints the Python source files of this machine's standard library, one a line, in a fixed order.

Where the library is small (Debian leaves its tests out), the packages that the system installed are listed too.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

ENOUGH = 1_000
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not NOT_THE_LIBRARY & set(path.relative_to(root).parts) and path.is_file() and not path.is_symlink():
            yield path


def main() -> None:
    files = list(sources(Path(sysconfig.get_path("stdlib")).resolve()))
    if len(files) < ENOUGH:
        files += sources(SYSTEM_PACKAGES)
    print("\n".join(str(path) for path in files if "\n" not in str(path)))


if __name__ == "__main__":
    main()
