"""A pool of the standard library's kind whose calls are durable jobs.

Prints:
1024 [0, 1, 4, 9]
[1, 2, 3]
[0, 2, 4, 6, 8]
"""

import concurrent.futures
import itertools

import blixard

app = blixard.App("executor")


@app.job(isolation="minimal")
def double(number: int) -> int:
    return 2 * number


if __name__ == "__main__":
    with blixard.Executor(app, isolation="minimal") as executor:
        print(executor.submit(pow, 2, 10).result(), list(executor.map(pow, range(4), itertools.repeat(2))))
        futures = [executor.submit(abs, -number) for number in (1, 2, 3)]
        print(sorted(future.result() for future in concurrent.futures.as_completed(futures)))
    results = double.map(itertools.count(), max_in_flight=8)  # inputs without end
    print(list(itertools.islice(results, 5)))
