"""What becomes of jobs that fail: retries, the remote traceback, and errors among the results of a map.

Prints:
third time lucky
JobFailed: no result for -1
in divide
[10, 'JobFailed', 5]
"""

import os

import blixard

app = blixard.App("failures")


@app.job(retry=blixard.RetryPolicy(retries=2, delay=0.1))
def unsteady() -> str:
    if os.environ["BLIXARD_ATTEMPT"] != "3":
        raise ConnectionError("try again")
    return "third time lucky"


@app.job
def divide(number: int) -> int:
    if number < 0:
        raise ValueError(f"no result for {number}")
    return 10 // number


if __name__ == "__main__":
    print(unsteady.submit().result())
    try:
        divide.submit(-1).result()
    except blixard.JobFailed as error:
        print(f"{type(error).__name__}: {error.message.rpartition(': ')[2]}")
        print("in", (error.traceback or "").partition(" in ")[2].splitlines()[0])
    values = divide.map([1, -1, 2], return_exceptions=True)
    print([type(value).__name__ if isinstance(value, Exception) else value for value in values])
