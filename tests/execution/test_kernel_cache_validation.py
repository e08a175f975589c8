"""What the kernel cache refuses, what stays as it was then, and what is done about weights that were tampered with."""

import asyncio
import gc
import weakref

import pytest
import torch

from esper.artifacts import Limits, SigningKey, TrustStore, artifact_message
from esper.artifacts.errors import ArtifactCorruptError, ArtifactLimitError, UntrustedArtifactError
from esper.execution.kernel_cache import KernelCache
from tests.execution.kernel_sources import FolderOfArtifacts, cache_for, counts


def cached(cache, artifacts):
    return [index for index, artifact in enumerate(artifacts) if artifact.id in cache]


@pytest.mark.parametrize("position", [0, 8, 100, -1])
async def test_a_corrupt_artifact_is_refused_evicts_nothing_and_is_not_remembered(source, artifacts, position):
    cache = cache_for(source, 1, artifacts[0])
    cache.fetch(artifacts[0].id)
    good, bad = artifacts[1].data, bytearray(artifacts[1].data)
    bad[position] ^= 1
    source.data[artifacts[1].id] = bytes(bad)
    for _ in range(2):
        with pytest.raises(ArtifactCorruptError):
            await cache.load_kernel(artifacts[1].id)
        with pytest.raises(ArtifactCorruptError):
            cache.fetch(artifacts[1].id)
    assert cache.failure(artifacts[1].id).startswith("ArtifactCorruptError")
    assert cached(cache, artifacts) == [0]
    source.data[artifacts[1].id] = good
    assert (await cache.load_kernel(artifacts[1].id)).artifact_id == artifacts[1].id
    assert cache.failure(artifacts[1].id) is None


async def test_an_artifact_under_another_ones_id_is_refused(source, artifacts):
    cache = KernelCache(source=source)
    source.data[artifacts[0].id] = artifacts[1].data
    with pytest.raises(ArtifactCorruptError):
        await cache.load_kernel(artifacts[0].id)
    assert counts(cache) == (0, 1, 0)


async def test_only_what_a_trusted_key_signed_is_loaded(artifacts):
    key, stranger = SigningKey.generate(), SigningKey.generate()
    source = FolderOfArtifacts(*artifacts[:3], trust=TrustStore([key.public_bytes]))
    for artifact, signer in ((artifacts[0], key), (artifacts[1], stranger)):
        source.signatures[artifact.id] = signer.sign(artifact_message(artifact.id))
    cache = KernelCache(source=source)
    assert await cache.load_kernel(artifacts[0].id) is not None
    for artifact in artifacts[1:3]:  # a stranger's, and an unsigned one
        with pytest.raises(UntrustedArtifactError):
            await cache.load_kernel(artifact.id)
    assert cached(cache, artifacts) == [0]


async def test_limits_are_those_of_the_cache(source, artifacts):
    cache = KernelCache(source=source, limits=Limits(max_parameters=10))
    with pytest.raises(ArtifactLimitError):
        await cache.load_kernel(artifacts[0].id)


async def test_what_the_source_raises_reaches_every_waiter(source, artifacts):
    cache = KernelCache(source=source)

    def fail():
        raise OSError("the disk is gone")

    source.before_fetch = fail
    results = await asyncio.gather(*(cache.load_kernel(artifacts[0].id) for _ in range(5)), return_exceptions=True)
    assert [str(result) for result in results] == ["the disk is gone"] * 5
    assert cache.failure(artifacts[0].id) == "OSError: the disk is gone"


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_failed_artifact_is_freed_with_its_error(source, artifacts, blocking):
    cache = KernelCache(source=source)
    source.data[artifacts[0].id] = artifacts[0].data[:-1]

    async def load():
        return cache.fetch(artifacts[0].id) if blocking else await cache.load_kernel(artifacts[0].id)

    gc.collect()
    gc.disable()  # reference counts alone have to do it
    try:
        with pytest.raises(ArtifactCorruptError) as caught:
            await load()
        error = weakref.ref(caught.value)
        del caught
        for _ in range(200):  # the thread and the event loop let go of it in their next steps
            await asyncio.sleep(0.01)
            if error() is None:
                break
        assert error() is None
    finally:
        gc.enable()


def test_writing_to_the_weights_of_a_cached_kernel_changes_none_that_is_placed_later(source, artifacts):
    cache = KernelCache(source=source)
    kernel = cache.fetch(artifacts[0].id)
    with torch.no_grad():
        for parameter in [*kernel.parameters, *kernel.place().parameters]:
            parameter.add_(1)
    for parameter, spec in zip(
        cache.fetch(artifacts[0].id).place().parameters, artifacts[0].graph.tensors, strict=True
    ):
        assert torch.equal(parameter, artifacts[0].tensors[spec.name])
    assert source.fetches[artifacts[0].id] == 1


@pytest.mark.parametrize("blocking", [True, False])
def test_a_kernel_first_fetched_under_inference_mode_can_be_trained_later(source, artifacts, blocking):
    cache = KernelCache(source=source)
    with torch.inference_mode():
        kernel = cache.fetch(artifacts[0].id) if blocking else asyncio.run(cache.load_kernel(artifacts[0].id))
    trained = kernel.place(trainable=True)
    x = torch.randn(3, 8, requires_grad=True)
    (trained.module(x) + kernel.module(x)).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters)
