"""Submit and wait in an event loop, which stays free for other work.

Prints:
[2, 4, 6]
"""

import asyncio

import blixard

app = blixard.App("loop")


@app.job(isolation="minimal")
async def double(number: int) -> int:
    await asyncio.sleep(0.1)
    return number * 2


async def main() -> None:
    handles = [await double.submit_async(number) for number in (1, 2, 3)]
    print(await asyncio.gather(*(handle.result_async() for handle in handles)))


if __name__ == "__main__":
    asyncio.run(main())
