"""Call a function once per number, as durable jobs. Kill it half-way and start it again: it carries on.

Prints:
0 1 4 9 16 25 36 49 64 81
"""

import blixard

app = blixard.App("squares")


@app.job
def square(number: int) -> int:
    return number * number


if __name__ == "__main__":
    print(*square.map(range(10), resume=True))
