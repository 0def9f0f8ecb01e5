"""The batcher between an event loop and a model's thread: nobody waits for ever, whatever becomes of the model."""

import asyncio
import threading
import time

import numpy as np
import pytest

from brachium.errors import ServerError
from brachium.policies.batching import QUICK_S, Batcher, Job
from brachium.spec import Observation


class Panic(BaseException):
    """What a native package raises when it panics: no Exception."""


def job(value):
    return Job(observation=Observation(state=np.array([value], np.float32)), noise=np.zeros((1, 1), np.float32))


def states(jobs):
    return np.stack([j.observation.state[None] for j in jobs])


async def running(batcher, body):
    work = asyncio.create_task(batcher.work())
    try:
        return await asyncio.wait_for(body(), 10.0)
    finally:
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work


def test_what_waits_is_the_next_batch_in_order_and_no_larger_than_allowed():
    gate, sizes = threading.Event(), []

    def run(jobs):
        gate.wait(5.0)
        sizes.append(len(jobs))
        return states(jobs)

    batcher = Batcher(run, most=4)

    async def body():
        asked = [asyncio.create_task(batcher.ask(job(k))) for k in range(10)]
        await asyncio.sleep(0.05)
        assert batcher.depth == 9
        gate.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(running(batcher, body))
    assert [float(a.actions[0, 0]) for a in answers] == list(range(10))
    assert sizes == [1, 4, 4, 1]
    assert [a.shared for a in answers] == [1, 4, 4, 4, 4, 4, 4, 4, 4, 1]


@pytest.mark.parametrize("error", [ValueError, Panic, SystemExit])
def test_a_model_that_fails_in_any_way_answers_and_goes_on(error):
    def run(jobs):
        if any(j.observation.state[0] == 13 for j in jobs):
            raise error("broken")
        return states(jobs)

    batcher = Batcher(run)

    async def body():
        asked = [asyncio.create_task(batcher.ask(job(k))) for k in (1, 13, 2)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        later = await batcher.ask(job(3))
        return done, later

    done, later = asyncio.run(running(batcher, body))
    assert [float(a.actions[0, 0]) for a in (done[0], done[2], later)] == [1.0, 2.0, 3.0]
    assert isinstance(done[1], Exception)
    assert "broken" in str(done[1])


def test_who_waits_when_it_ends_is_told():
    gate = threading.Event()

    def run(jobs):
        gate.wait(5.0)
        return states(jobs)

    batcher = Batcher(run, most=1)

    async def main():
        work = asyncio.create_task(batcher.work())
        asked = [asyncio.create_task(batcher.ask(job(k))) for k in range(3)]
        await asyncio.sleep(0.05)
        work.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        done = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5.0)
        with pytest.raises(ServerError, match="closing"):
            await batcher.ask(job(9))
        return done

    first, *others = asyncio.run(main())
    assert float(first.actions[0, 0]) == 0.0, "what is with the model is still answered"
    assert all("closing" in str(one) for one in others)


def test_a_batch_that_fails_while_it_ends_is_told():
    gate = threading.Event()

    def run(jobs):
        gate.wait(5.0)
        raise ValueError("broken")

    batcher = Batcher(run)

    async def main():
        asked = [asyncio.create_task(batcher.ask(job(k))) for k in range(3)]
        await asyncio.sleep(0)
        work = asyncio.create_task(batcher.work())  # all three are its first batch
        await asyncio.sleep(0.05)
        work.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5.0)

    assert [type(one) for one in asyncio.run(main())] == [ValueError] * 3


def test_jobs_of_those_who_left_are_not_run():
    gate, seen = threading.Event(), []

    def run(jobs):
        gate.wait(5.0)
        seen.extend(float(j.observation.state[0]) for j in jobs)
        return states(jobs)

    batcher = Batcher(run, most=8)

    async def body():
        asked = [asyncio.create_task(batcher.ask(job(k))) for k in range(4)]
        await asyncio.sleep(0.05)
        asked[2].cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(running(batcher, body))
    assert seen == [0.0, 1.0, 3.0]


def test_a_quick_model_runs_in_the_loop_and_a_slow_one_in_its_thread():
    pause, threads = [0.0], []

    def run(jobs):
        threads.append(threading.current_thread().name)
        until = time.monotonic() + pause[0]
        while time.monotonic() < until:
            pass
        return states(jobs)

    batcher = Batcher(run)

    async def body():
        here = threading.current_thread().name
        for value in range(20):  # a busy machine may make one of them late
            assert (await batcher.ask(job(value))).actions[0, 0] == value
        assert threads[0] != here, "of a model that is not known yet nobody knows how long it takes"
        assert here in threads
        pause[0] = 2 * QUICK_S
        await batcher.ask(job(0))
        threads.clear()
        await asyncio.gather(*(batcher.ask(job(k)) for k in range(3)))
        assert here not in threads

    asyncio.run(running(batcher, body))


def test_a_quick_model_that_fails_says_so():
    fail = [False]

    def run(jobs):
        if fail[0]:
            raise ValueError("broken")
        return states(jobs)

    batcher = Batcher(run)

    async def body():
        for value in range(20):
            await batcher.ask(job(value))
        fail[0] = True
        with pytest.raises(ValueError, match="broken"):
            await batcher.ask(job(0))
        fail[0] = False
        assert (await batcher.ask(job(3))).actions[0, 0] == 3

    asyncio.run(running(batcher, body))
