"""Those of one key go in order, whoever leaves early; a key whose turns are over costs nothing."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from gateway.turns import Turns


@given(st.data())
def test_each_key_keeps_its_order_whatever_fails(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
    delays = data.draw(st.lists(st.integers(0, 5), min_size=len(keys), max_size=len(keys)))
    fails = data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    entered: list[int] = []

    async def go() -> None:
        turns = Turns()

        async def one(number: int) -> None:
            with taken[number] as turn:
                for _ in range(delays[number]):
                    await asyncio.sleep(0)
                if fails[number]:
                    return  # leaves before its turn came
                await turn.come()
                entered.append(number)
                turn.leave()
                turn.leave()

        taken = [turns.take(key) for key in keys]
        async with asyncio.timeout(5):
            await asyncio.gather(*(one(number) for number in range(len(keys))))
        assert len(turns) == 0

    asyncio.run(go())
    for key in "abc":
        mine = [number for number in entered if keys[number] == key]
        assert mine == [n for n, k in enumerate(keys) if k == key and not fails[n]]
