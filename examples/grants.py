"""A sandbox sees nothing of the machine that was not granted.

Prints:
seen with a grant: bread, milk
without: the sandbox hides FILE; grant it with --allow-read FILE (or --allow-write FILE)
"""

import pathlib
import tempfile

import blixard

app = blixard.App("grants")


@app.job
def read(path: str) -> str:
    return pathlib.Path(path).read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        file = pathlib.Path(directory, "list.txt")
        file.write_text("bread, milk")
        print("seen with a grant:", read.options(allow_read=[directory]).submit(str(file)).result())
        try:
            read.submit(str(file)).result()
        except blixard.JobFailed as error:
            print("without:", (error.hint or "").replace(str(file), "FILE"))
