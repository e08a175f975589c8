"""The kernel cache: budgets, pins, one fetch for many requests, and what it never does."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from esper.artifacts import Blueprint, build_artifact
from esper.errors import EsperError
from esper.execution.kernel_cache import KernelCache, KernelCacheError, KernelCacheFullError, KernelTooLargeError
from esper.execution.sources import AmbiguousKernelError, KernelSource, UnknownKernelError
from tests.execution.kernel_sources import MB, FolderOfArtifacts, cache_for, counts


def cached(cache, artifacts):
    return [index for index, artifact in enumerate(artifacts) if artifact.id in cache]


# ---- loading -------------------------------------------------------------------------------------------------------


async def test_a_kernel_is_fetched_once_and_then_found(source, artifacts):
    cache = KernelCache(source=source)
    kernel = await cache.load_kernel(artifacts[0].id)
    assert kernel.artifact_id == artifacts[0].id
    assert (kernel.trainable, kernel.device) == (False, torch.device("cpu"))
    for parameter, spec in zip(kernel.parameters, artifacts[0].graph.tensors, strict=True):
        assert torch.equal(parameter, artifacts[0].tensors[spec.name])
    assert await cache.load_kernel(artifacts[0].id) is kernel
    assert cache.fetch(artifacts[0].id) is kernel
    assert source.fetches == {artifacts[0].id: 1}
    assert cache.get_cache_stats() == {
        "cache_hit_rate": 2 / 3,
        "cache_hits": 2,
        "cache_misses": 1,
        "cache_size_mb": len(artifacts[0].data) / MB,
        "cache_entries": 1,
    }


def test_the_source_of_these_tests_is_one(source):
    assert isinstance(source, KernelSource)


async def test_an_empty_cache_has_a_hit_rate_of_zero():
    assert KernelCache().get_cache_stats() == {
        "cache_hit_rate": 0.0,
        "cache_hits": 0,
        "cache_misses": 0,
        "cache_size_mb": 0.0,
        "cache_entries": 0,
    }


async def test_prefixes_and_names_are_resolved_each_time(source, artifacts):
    cache = KernelCache(source=source)
    source.names["best"] = artifacts[0].id
    assert (await cache.load_kernel("best")).artifact_id == artifacts[0].id
    assert cache.fetch(artifacts[0].id[:12]).artifact_id == artifacts[0].id
    assert counts(cache) == (1, 1, 1)
    source.names["best"] = artifacts[1].id  # the name moves on, and so does what it loads
    assert cache.fetch("best").artifact_id == artifacts[1].id
    assert (await cache.load_kernel("best")).artifact_id == artifacts[1].id


async def test_a_reason_is_forgotten_once_the_reference_loads(source, artifacts):
    cache = KernelCache(source=source)
    cache.fetch(artifacts[0].id)
    assert await cache.load_kernel("later") is None
    assert cache.failure("later") is not None
    source.names["later"] = artifacts[0].id
    assert await cache.load_kernel("later") is not None
    assert cache.failure("later") is None
    assert counts(cache) == (1, 2, 1)


@pytest.mark.parametrize("reference", ["0" * 64, "0" * 12, "no-such-name", ""])
async def test_an_unknown_kernel_is_none_with_a_reason_and_is_not_remembered(source, artifacts, reference):
    cache = KernelCache(source=source)
    assert await cache.load_kernel(reference) is None
    assert cache.failure(reference).startswith("UnknownKernelError: no kernel")
    with pytest.raises(UnknownKernelError, match="no kernel"):
        cache.fetch(reference)
    assert counts(cache) == (0, 2, 0)
    source.names[reference] = artifacts[0].id
    source.data.setdefault("0" * 64, artifacts[0].data)
    if len(reference) < 64:  # the content of a full id cannot come to exist, everything else can
        source.data.pop("0" * 64)
        assert (await cache.load_kernel(reference)).artifact_id == artifacts[0].id
        assert cache.failure(reference) is None


async def test_a_cache_without_a_source_knows_no_kernel():
    cache = KernelCache(max_cache_size_mb=1, max_entries=1, source=None)
    assert await cache.load_kernel("ab" * 32) is None
    assert "without a kernel source" in cache.failure("ab" * 32)
    assert await cache.load_kernel("a-name") is None


async def test_an_ambiguous_prefix_is_an_error_of_its_own(source, artifacts):
    cache = KernelCache(source=source)
    source.data["a" * 20 + "0" * 44] = source.data["a" * 20 + "1" * 44] = artifacts[0].data
    with pytest.raises(AmbiguousKernelError):
        await cache.load_kernel("a" * 20)
    assert cache.failure("a" * 20).startswith("AmbiguousKernelError")


def test_nonsensical_budgets_are_refused():
    for size in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_cache_size_mb"):
            KernelCache(size)
    with pytest.raises(ValueError, match="max_entries is 0"):
        KernelCache(1, 0)
    cache = KernelCache(0.5, 3, source=None)
    assert (cache.max_cache_size_mb, cache.max_entries, cache.source) == (0.5, 3, None)


# ---- budgets -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(source, artifacts):
    cache = cache_for(source, 3, artifacts[0])
    for index in (0, 1, 2, 0, 3):
        cache.fetch(artifacts[index].id)
    assert cached(cache, artifacts) == [0, 2, 3]
    cache.fetch(artifacts[4].id)
    assert cached(cache, artifacts) == [0, 3, 4]
    assert cache.evictions == 2
    assert source.fetches[artifacts[0].id] == 1
    assert cache.get_cache_stats()["cache_size_mb"] == pytest.approx(3 * len(artifacts[0].data) / MB)


def test_the_number_of_entries_is_bounded_too(source, artifacts):
    cache = KernelCache(512, 2, source=source)
    for artifact in artifacts:
        cache.fetch(artifact.id)
    assert cached(cache, artifacts) == [4, 5]
    assert len(cache) == 2


def test_a_large_kernel_takes_the_place_of_as_many_as_it_needs(source, artifacts, large):
    source.data[large.id] = large.data
    cache = KernelCache((len(large.data) + len(artifacts[0].data) + 0.5) / MB, source=source)
    for artifact in artifacts:
        cache.fetch(artifact.id)
    cache.fetch(large.id)
    assert large.id in cache
    assert cached(cache, artifacts) == [5]


async def test_a_kernel_larger_than_the_cache_is_refused_and_nothing_evicted(source, artifacts, large):
    source.data[large.id] = large.data
    cache = cache_for(source, 3, artifacts[0])
    assert 3 * len(artifacts[0].data) < len(large.data)
    for index in range(3):
        cache.fetch(artifacts[index].id)
    with pytest.raises(KernelTooLargeError, match=rf"{large.id[:12]} has .* MB, more than the whole cache") as caught:
        await cache.load_kernel(large.id)
    assert isinstance(caught.value, EsperError)
    with pytest.raises(KernelTooLargeError):
        cache.fetch(large.id)
    assert cached(cache, artifacts) == [0, 1, 2]
    assert cache.evictions == 0


def test_a_kernel_as_large_as_the_cache_fits(source, large):
    source.data[large.id] = large.data
    cache = KernelCache(len(large.data) / MB, 1, source=source)
    assert cache.fetch(large.id).size_bytes == len(large.data)


# ---- pins ----------------------------------------------------------------------------------------------------------


async def test_a_pinned_kernel_stays_until_it_was_unpinned_as_often(source, artifacts):
    cache = cache_for(source, 2, artifacts[0])
    await cache.load_kernel(artifacts[0].id, pin=True)
    cache.fetch(artifacts[0].id, pin=True)
    cache.pin(artifacts[0].id)
    for index in (1, 2, 3):
        cache.fetch(artifacts[index].id)
        assert cached(cache, artifacts) == [0, index]
    for _ in range(2):
        cache.unpin(artifacts[0].id)
    cache.fetch(artifacts[4].id)
    assert 0 in cached(cache, artifacts)
    cache.unpin(artifacts[0].id)
    cache.fetch(artifacts[5].id)
    assert cached(cache, artifacts) == [4, 5]
    with pytest.raises(KernelCacheError, match="is not pinned"):
        cache.unpin(artifacts[0].id)
    with pytest.raises(KernelCacheError, match="is not cached; load it with pin=True"):
        cache.pin(artifacts[0].id)


@pytest.mark.parametrize("kind", ["bytes", "entries"])
async def test_with_everything_in_use_another_kernel_is_refused(source, artifacts, kind):
    cache = cache_for(source, 2, artifacts[0]) if kind == "bytes" else KernelCache(512, 2, source=source)
    cache.fetch(artifacts[0].id, pin=True)
    cache.fetch(artifacts[1].id, pin=True)
    with pytest.raises(KernelCacheFullError, match="2 kernels in use"):
        await cache.load_kernel(artifacts[2].id)
    assert cached(cache, artifacts) == [0, 1]
    cache.unpin(artifacts[1].id)
    assert await cache.load_kernel(artifacts[2].id) is not None
    assert cached(cache, artifacts) == [0, 2]


def test_no_more_is_evicted_than_helps(source, artifacts, large):
    """One pinned kernel too many: the others would not make enough room, so they stay."""
    source.data[large.id] = large.data
    cache = KernelCache((len(large.data) + 0.5) / MB, source=source)
    cache.fetch(artifacts[0].id)
    cache.fetch(artifacts[1].id, pin=True)
    with pytest.raises(KernelCacheFullError):
        cache.fetch(large.id)
    assert cached(cache, artifacts) == [0, 1]


def test_clearing_keeps_what_is_in_use_and_says_how_much(source, artifacts):
    cache = KernelCache(source=source)
    for artifact in artifacts[:4]:
        cache.fetch(artifact.id)
    cache.pin(artifacts[1].id)
    assert cache.clear_cache() == (3, 1)
    assert cached(cache, artifacts) == [1]
    assert cache.get_cache_stats()["cache_size_mb"] == pytest.approx(len(artifacts[1].data) / MB)
    cache.unpin(artifacts[1].id)
    cleared = cache.clear_cache()
    assert (cleared.removed, cleared.pinned) == (1, 0)
    assert cache.get_cache_stats()["cache_size_mb"] == 0
    cache.fetch(artifacts[0].id)
    assert source.fetches[artifacts[0].id] == 2


def test_a_pin_asked_for_with_the_load_survives_an_eviction_in_between(source, artifacts):
    """Many threads load and pin more kernels than fit unpinned; each pinned one is there afterwards."""
    cache = KernelCache(512, 3, source=source)
    barrier = threading.Barrier(6)

    def work(index):
        barrier.wait()
        if index < 3:
            cache.fetch(artifacts[index].id, pin=True)
        else:
            for _ in range(20):
                try:
                    cache.fetch(artifacts[index].id)
                except KernelCacheFullError:
                    break

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert {0, 1, 2} <= set(cached(cache, artifacts))


# ---- views ---------------------------------------------------------------------------------------------------------


async def test_views_count_for_themselves_and_share_everything_else(source, artifacts):
    cache = KernelCache(source=source)
    first, second = cache.view("fc1"), cache.view("fc2")
    assert isinstance(first, KernelCache)
    assert (first.layer_name, second.layer_name) == ("fc1", "fc2")
    kernel = first.fetch(artifacts[0].id)
    assert await second.load_kernel(artifacts[0].id) is kernel
    assert await second.load_kernel("nothing") is None
    assert counts(first) == (0, 1, 1)
    assert counts(second) == (1, 1, 1)
    assert counts(cache) == (1, 2, 1)
    first.pin(artifacts[0].id)
    assert second.clear_cache() == (0, 1)
    assert second.failure("nothing") == cache.failure("nothing") is not None


def test_a_copied_model_uses_the_same_cache(source):
    cache = KernelCache(source=source)
    assert copy.deepcopy({"cache": cache})["cache"] is cache


def test_the_reasons_kept_are_bounded(source):
    cache = KernelCache(source=source)
    for number in range(300):
        asyncio.run(cache.load_kernel(f"name-{number}")) if number % 50 == 0 else _refused(cache, f"name-{number}")
    assert cache.failure("name-299") is not None
    assert cache.failure("name-0") is None


def _refused(cache, reference):
    with pytest.raises(UnknownKernelError):
        cache.fetch(reference)


def test_a_blueprint_of_another_family_is_just_as_well_cached():
    artifact = build_artifact(Blueprint.low_rank(8, 8, 2))
    cache = KernelCache(source=FolderOfArtifacts(artifact))
    assert cache.fetch(artifact.id).graph.digest == artifact.graph.digest
