"""The kernel cache under concurrency: one fetch for many requests, and nobody waits who need not."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.execution.kernel_cache import KernelCache, KernelCacheError, KernelCacheFullError
from tests.execution.kernel_sources import MB, cache_for, counts, wait_until


def test_requests_from_threads_and_event_loops_share_one_fetch(source, artifacts):
    cache = KernelCache(source=source)
    source.open.clear()
    identity = artifacts[0].id

    def in_a_loop():
        async def several():
            return await asyncio.gather(*(cache.load_kernel(identity) for _ in range(3)))

        return asyncio.run(several())

    with ThreadPoolExecutor(8) as pool:
        loops = [pool.submit(in_a_loop) for _ in range(3)]
        threads = [pool.submit(cache.fetch, identity) for _ in range(3)]
        wait_until(lambda: cache.get_cache_stats()["cache_misses"] == 12)
        source.open.set()
        kernels = [kernel for loop in loops for kernel in loop.result(30)] + [each.result(30) for each in threads]
    assert len(kernels) == 12
    assert all(kernel is kernels[0] for kernel in kernels)
    assert source.fetches == {identity: 1}


def test_hits_do_not_wait_for_a_fetch(source, artifacts):
    cache = KernelCache(source=source)
    kernel = cache.fetch(artifacts[0].id)
    source.asked.clear()
    source.open.clear()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.fetch, artifacts[1].id)
        assert source.asked.wait(30)
        assert cache.fetch(artifacts[0].id) is kernel
        assert asyncio.run(cache.load_kernel(artifacts[0].id)) is kernel
        cache.pin(artifacts[0].id)
        assert cache.get_cache_stats()["cache_entries"] == 1
        assert cache.clear_cache() == (0, 1)
        assert not slow.done()
        source.open.set()
        assert slow.result(30).artifact_id == artifacts[1].id


async def test_a_hit_does_not_even_yield_to_the_event_loop(source, artifacts):
    cache = KernelCache(source=source)
    kernel = cache.fetch(artifacts[0].id)
    with pytest.raises(StopIteration) as finished:
        cache.load_kernel(artifacts[0].id).send(None)
    assert finished.value.value is kernel


async def test_a_miss_leaves_the_event_loop_free(source, artifacts):
    cache = KernelCache(source=source)
    source.open.clear()
    source.names["best"] = artifacts[0].id
    waiting = asyncio.ensure_future(cache.load_kernel("best"))
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert not waiting.done()
    source.open.set()
    assert (await waiting).artifact_id == artifacts[0].id


async def test_cancelling_one_waiter_leaves_the_others(source, artifacts):
    cache = KernelCache(source=source)
    source.open.clear()
    leader = asyncio.ensure_future(cache.load_kernel(artifacts[0].id, pin=True))
    follower = asyncio.ensure_future(cache.load_kernel(artifacts[0].id))
    while not source.asked.is_set():
        await asyncio.sleep(0.001)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    source.open.set()
    assert (await follower).artifact_id == artifacts[0].id
    assert source.fetches == {artifacts[0].id: 1}
    assert cache.clear_cache() == (1, 0)  # the one who was cancelled left no pin


async def test_a_kernel_evicted_before_its_waiter_could_pin_it_is_put_back(source, artifacts):
    cache = KernelCache(512, 1, source=source)
    waiting = asyncio.ensure_future(cache.load_kernel(artifacts[0].id, pin=True))
    await asyncio.sleep(0)
    wait_until(lambda: artifacts[0].id in cache)  # without giving the waiter a turn
    cache.fetch(artifacts[1].id)
    assert artifacts[0].id not in cache
    assert (await waiting).artifact_id == artifacts[0].id
    assert cache.clear_cache() == (0, 1)
    assert source.fetches[artifacts[0].id] == 1


@pytest.mark.slow
async def test_without_a_thread_for_it_a_fetch_fails_and_the_next_one_works(source, artifacts, monkeypatch):
    cache = KernelCache(source=source)

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    wait_until(lambda: all(thread.name != "esper-fetching" for thread in threading.enumerate()), 60)  # idle ones end
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await cache.load_kernel(artifacts[0].id)
    assert (await cache.load_kernel(artifacts[0].id)).artifact_id == artifacts[0].id


def test_an_event_loop_that_ends_in_the_middle_leaves_the_fetch_to_others(source, artifacts):
    cache = KernelCache(source=source)
    source.open.clear()

    async def impatient():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cache.load_kernel(artifacts[0].id), 0.05)

    asyncio.run(impatient())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.fetch, artifacts[0].id)
        wait_until(lambda: cache.get_cache_stats()["cache_misses"] == 2)
        source.open.set()
        assert waiting.result(30).artifact_id == artifacts[0].id
    assert source.fetches == {artifacts[0].id: 1}


def test_an_interrupt_of_one_fetch_is_not_everybodys(source, artifacts):
    cache = KernelCache(source=source)
    entered, go_on = threading.Event(), threading.Event()

    def interrupt():
        entered.set()
        assert go_on.wait(30)
        raise KeyboardInterrupt

    source.before_fetch = interrupt
    with ThreadPoolExecutor(1) as pool:

        def follow():
            assert entered.wait(30)
            waiting = cache.view("follower")
            threading.Thread(
                target=lambda: (wait_until(lambda: counts(waiting)[1] == 1), go_on.set()), daemon=True
            ).start()
            with pytest.raises(KernelCacheError, match="was interrupted; ask again"):
                waiting.fetch(artifacts[0].id)

        following = pool.submit(follow)
        with pytest.raises(KeyboardInterrupt):
            cache.fetch(artifacts[0].id)
        following.result(30)
    source.before_fetch = lambda: None
    assert cache.fetch(artifacts[0].id).artifact_id == artifacts[0].id


def test_only_a_few_artifacts_are_fetched_at_a_time(source, artifacts):
    cache = KernelCache(source=source)
    source.open.clear()

    async def all_of_them():
        waiting = [asyncio.ensure_future(cache.load_kernel(artifact.id)) for artifact in artifacts]
        while source.fetches.total() < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        most = source.fetches.total()
        source.open.set()
        return most, await asyncio.gather(*waiting)

    most, kernels = asyncio.run(all_of_them())
    assert most == 4
    assert [kernel.artifact_id for kernel in kernels] == [artifact.id for artifact in artifacts]


def test_a_crowd_of_threads_leaves_the_books_in_order(source, artifacts):
    cache = cache_for(source, 3, artifacts[0])

    def work(number):
        for step in range(60):
            artifact, pin = artifacts[(number * 7 + step * step) % len(artifacts)], step % 5 == 0
            try:
                if number % 3:
                    kernel = cache.fetch(artifact.id, pin=pin)
                else:
                    kernel = asyncio.run(cache.load_kernel(artifact.id, pin=pin))
            except KernelCacheFullError:
                continue
            assert kernel.artifact_id == artifact.id
            if pin:
                cache.unpin(artifact.id)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    size = len(artifacts[0].data)
    assert len(cache) <= 3
    assert cache.get_cache_stats()["cache_size_mb"] == pytest.approx(len(cache) * size / MB)
    removed, pinned = cache.clear_cache()
    assert pinned == 0
    assert 0 < removed <= 3
    assert (len(cache), cache.get_cache_stats()["cache_size_mb"]) == (0, 0)
