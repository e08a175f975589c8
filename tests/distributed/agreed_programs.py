"""Scenarios of agreed commits, without any gradients between the ranks: only the store couples them."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch

import esper
from esper.contracts.commands import KasminaControlCommand
from esper.contracts.messages import TopicNames
from esper.distributed import ranks
from esper.services.oona_client import OonaClient
from tests.core.seeds import GatedPlatform, blueprint, states
from tests.distributed.ranks import Rank
from tests.models import mlp


def _wrapped(here: Rank, platform: Any = None, **options: Any) -> esper.MorphableModel:
    group = torch.distributed.group.WORLD
    return esper.wrap(mlp(8, 6, 4), platform=platform or here.shelf.platform, process_group=group, **options)


def _step(model: esper.MorphableModel) -> None:
    model(torch.ones(3, 8)).sum().backward()


def _await(model: esper.MorphableModel, done: Callable[[], bool], pace: float = 0.001) -> None:
    """Train until it is done."""
    end = time.monotonic() + 40
    while not done():
        assert time.monotonic() < end, "the ranks do not agree"
        _step(model)
        time.sleep(pace)


def _train_until(model: esper.MorphableModel, futures: list[Future[bool]], pace: float = 0.002) -> None:
    """Train until all futures are answered."""
    _await(model, lambda: all(each.done() for each in futures), pace)


def _settle(here: Rank, model: esper.MorphableModel) -> None:
    """Train until all ranks are at one forward, and what was agreed is in force."""
    _settled[0] += 1
    name = f"settled/{_settled[0]}"
    here.store.set(f"{name}/{here.rank}", str(max(model.ranks.forward, model.ranks.agreed or 0)))
    here.meet(name)
    goal = max(int(here.store.get(f"{name}/{rank}")) for rank in range(here.size)) + 50
    while model.ranks.forward < goal:
        _step(model)
        time.sleep(0.001)


_settled = [0]


def _began(model: esper.MorphableModel, layer: str, seed: int) -> int:
    """The forward at which a seed became what it is."""
    return int(model.kasmina_layers[layer].state.last_epoch(seed))


class _Flips:
    """Which forward was the first with another plan; a plan of the same seeds is none."""

    def __init__(self, model: esper.MorphableModel) -> None:
        self.model, self.at = model, {}
        self._plan = model.runtime.plan
        model.register_forward_hook(self._after)

    def _after(self, *_: Any) -> None:
        if self.model.runtime.plan != self._plan:
            self._plan = self.model.runtime.plan
            kernels = [f"{site}:{seed.seed}:{seed.kernel.artifact_id[:6]}" for site, seed in _seeds(self.model)]
            self.at[self.model.ranks.forward] = kernels


def _seeds(model: esper.MorphableModel) -> list[tuple[int, Any]]:
    sites = sorted(model.runtime.sites)
    return [(sites.index(site), seed) for site, seeds in model.runtime.plan.sites.items() for seed in seeds]


def swaps_with_random_delays(here: Rank) -> Any:
    model, rng = _wrapped(here), random.Random(here.rank)
    flips = _Flips(model)
    kernels = [here.shelf.put(blueprint(seed=seed)).id for seed in range(4)]
    for number in range(8):
        end = time.monotonic() + rng.random() * 0.3
        while time.monotonic() < end:
            _step(model)
            time.sleep(rng.random() * 0.004)
        if number % 4 == 3:
            assert model.unload_kernel("0", 0)
        else:
            future = model.request_kernel("0", 0, kernels[number % 4])
            _train_until(model, [future], pace=rng.random() * 0.004)
            assert future.result(), model.kasmina_layers["0"].seed_errors
        if number % 4 == 3:
            while model.runtime.plan.sites:
                _step(model)
                time.sleep(0.001)
        if number % 4 >= 2:
            _settle(here, model)
    return {"flips": flips.at, "states": states(model)}


def schedules_in_step(here: Rank) -> Any:
    model = _wrapped(here)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.request_kernel("0", 0, here.shelf.put(blueprint()).id, alpha=esper.LinearRamp(0.0, 1.0, 20))
    alphas: dict[int, float] = {}
    asked = False
    while model.ranks.forward < 400:
        time.sleep(0.002 if here.rank else 0.001)
        _step(model)
        optimizer.step()
        alphas[model.ranks.forward] = model.kasmina_layers["0"].state.alpha(0)
        if not asked and alphas[model.ranks.forward] == 1.0 and states(model)["0"][0] == "ACTIVE":
            model.set_alpha("0", 0, esper.CosineRamp(1.0, 0.5, 10))
            asked = True
    return {str(forward): alpha for forward, alpha in alphas.items()}


def a_request_of_a_stopped_program(here: Rank) -> Any:
    """Whoever waits for the future gets the kernel with the next forward."""
    model = _wrapped(here)
    _step(model)
    here.meet("stopped")
    assert model.request_kernel("0", 0, here.shelf.put(blueprint()).id).result(30)
    _step(model)
    found, reference = states(model)["0"][0], weakref.ref(model.runtime)
    del model
    gc.collect()
    return found if reference() is None else "the model is kept alive"


def evaluation_on_one_rank(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    future = model.request_kernel("2", 1, here.shelf.put(blueprint(6, 4)).id)
    if here.rank == 0:
        for _ in range(50):
            with torch.no_grad():
                model(torch.ones(2, 8))
    _train_until(model, [future])
    _settle(here, model)
    return flips.at


def one_rank_cannot_stage(here: Rank) -> Any:
    model = _wrapped(here)
    assert model.request_kernel("0", 1, here.shelf.put(blueprint(seed=3)).id).result(30)
    before = here.shelf.put(blueprint(seed=5)).id if here.rank != 1 else None
    wanted = "5d" * 32 if before is None else before
    future = model.request_kernel("0", 0, wanted)
    _train_until(model, [future])
    _settle(here, model)
    layer = model.kasmina_layers["0"]
    return {
        "result": future.result(),
        "states": states(model)["0"][:2],
        "reason": layer.seed_errors[0],
        "errors": layer.state.errors(0),
    }


def different_kernels(here: Rank) -> Any:
    model = _wrapped(here)
    kernel = here.shelf.put(blueprint(seed=10 + here.rank % 2)).id
    future = model.request_kernel("0", 0, kernel)
    _train_until(model, [future])
    _settle(here, model)
    return {"kernel": kernel, "result": future.result(), "reason": model.kasmina_layers["0"].seed_errors[0]}


def another_order(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    kernels = {"0": here.shelf.put(blueprint()).id, "2": here.shelf.put(blueprint(6, 4)).id}
    layers = ["0", "2"] if here.rank else ["2", "0"]
    futures = [model.request_kernel(layer, 0, kernels[layer]) for layer in layers]
    _train_until(model, futures)
    _settle(here, model)
    return {"results": [each.result() for each in futures], "flips": flips.at}


def a_late_rank(here: Rank) -> Any:
    platform = GatedPlatform(here.shelf)
    model = _wrapped(here, platform)
    flips = _Flips(model)
    kernel = here.shelf.put(blueprint()).id
    gate = platform.hold(kernel)
    future = model.request_kernel("0", 0, kernel)
    if here.rank == 0:
        gate.set()
    for _ in range(50):
        _step(model)
        time.sleep(0.005)
    early, stages = future.done(), [future.progress().stage]
    gate.set()
    _train_until(model, [future])
    _settle(here, model)
    return {"early": early, "flips": flips.at, "stages": [*stages, future.progress().stage]}


def what_one_rank_leads_to(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    kernel = here.shelf.put(blueprint()).id
    here.meet("all have it")
    alphas = []
    if here.rank == 0:
        with model.ranks.leading():
            assert model.request_kernel("0", 2, kernel, alpha=esper.LinearRamp(0.25, 0.75, 3)).result(30)
    elif here.rank == 1:
        try:
            with model.ranks.leading():
                raise AssertionError("only rank 0 leads")
        except esper.EsperError as error:
            alphas.append(str(error))
    end = time.monotonic() + 30
    while not model.runtime.plan.sites and time.monotonic() < end:
        _step(model)
        time.sleep(0.001)
    if here.rank == 0:
        bus = OonaClient()
        model.listen(SimpleNamespace(oona=bus), leading=True)
        command = KasminaControlCommand(action="set_alpha", layer_name="0", seed_idx=2, alpha=0.125)
        bus.publish(TopicNames.CONTROL_KASMINA_COMMANDS, command)
    while model.kasmina_layers["0"].state.alpha(2) != 0.125 and time.monotonic() < end:
        _step(model)
        time.sleep(0.001)
    here.meet("alpha")
    if here.rank == 0:
        with model.ranks.leading():
            assert model.unload_kernel("0", 2)
    while model.runtime.plan.sites and time.monotonic() < end:
        _step(model)
        time.sleep(0.001)
    return {"flips": flips.at, "states": states(model)["0"], "refusal": alphas}


def many_layers_in_one_call(here: Rank) -> Any:
    model, rng = _wrapped(here), random.Random(here.rank)
    flips, seen = _Flips(model), set()
    both = {"0": here.shelf.put(blueprint()).id, "2": here.shelf.put(blueprint(6, 4)).id}

    def loaded() -> list[str]:
        seen.add(tuple(name for name, layer in model.kasmina_layers.items() if layer.kernel_in_force(1)))
        return list(max(seen, key=len))

    def wander() -> None:
        for _ in range(rng.randrange(40)):
            _step(model)
            time.sleep(rng.random() * 0.004)

    wander()
    request = model.request_kernels(None, both, seed_idx=1, alpha=0.5)
    _await(model, lambda: bool(loaded()) and request.done())
    wander()
    model.set_alphas(None, 0.25, seed_idx=1)
    _await(model, lambda: all(layer.state.alpha(1) == 0.25 for layer in model.kasmina_layers.values()))
    _settle(here, model)
    unloaded = model.unload_kernels(seed_idx=1)
    _await(model, lambda: not model.runtime.plan.sites)
    _settle(here, model)
    again = model.request_kernels(None, both)
    _await(model, again.done)
    _settle(here, model)
    fossils = model.fossilize_kernels()
    _await(model, lambda: all(layer.state.lifecycle(0).name == "FOSSILIZED" for layer in model.kasmina_layers.values()))
    results = [request.result(), unloaded, again.result(), fossils]
    return {"flips": flips.at, "seen": sorted(seen), "results": results, "states": states(model)}


def many_layers_of_which_one_rank_lacks_one(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    kernels = {"0": here.shelf.put(blueprint()).id, "2": here.shelf.put(blueprint(6, 4)).id}
    wanted = {**kernels, "2": "5d" * 32} if here.rank == 1 else kernels
    request = model.request_kernels(None, wanted)
    _train_until(model, [request])
    _settle(here, model)
    broken = {"flips": list(flips.at), "result": request.result(), "errors": dict(request.errors)}
    again = model.request_kernels(None, kernels)  # as if nothing had been
    _train_until(model, [again])
    _settle(here, model)
    return {**broken, "again": again.result(), "states": [each[0] for each in states(model).values()]}


def different_kernels_for_one_of_many_layers(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    kernels = {"0": here.shelf.put(blueprint()).id, "2": here.shelf.put(blueprint(6, 4, seed=20 + here.rank)).id}
    request = model.request_kernels(None, kernels)
    _train_until(model, [request])
    _settle(here, model)
    return {"kernel": kernels["2"], "result": request.result(), "errors": str(dict(request.errors)), "flips": flips.at}


def many_layers_that_one_rank_leads_to(here: Rank) -> Any:
    model = _wrapped(here)
    flips = _Flips(model)
    kernels = {"0": here.shelf.put(blueprint()).id, "2": here.shelf.put(blueprint(6, 4)).id}
    here.meet("all have both")
    if here.rank == 0:
        with model.ranks.leading():
            request = model.request_kernels(None, kernels, alpha=esper.LinearRamp(0.0, 1.0, 3))
    _await(model, lambda: bool(model.runtime.plan.sites))
    here.meet("all run both")
    if here.rank == 0:
        assert request.result()
        with model.ranks.leading():
            model.set_alphas(None, 0.5)
            model.unload_kernels()
    _await(model, lambda: not model.runtime.plan.sites)
    return {"flips": flips.at, "states": states(model)}


def replaced_and_called_off(here: Rank) -> Any:
    """A burst of requests for one seed, and fossils: every future is answered, and all ranks end alike."""
    model, rng = _wrapped(here), random.Random(here.rank)
    flips = _Flips(model)
    kernels = [here.shelf.put(blueprint(seed=seed)).id for seed in range(3)]
    futures = []
    for number in range(12):
        futures.append(model.request_kernel("0", 0, kernels[number % 3]))
        if number % 4 == 1:
            model.unload_kernel("0", 0)
        for _ in range(rng.randrange(4)):
            _step(model)
            time.sleep(rng.random() * 0.01)
    _train_until(model, futures)
    _settle(here, model)
    fossil = model.fossilize("0", 0)
    end = time.monotonic() + 30
    while states(model)["0"][0] != "FOSSILIZED" and time.monotonic() < end:
        _step(model)
        time.sleep(0.001)
    return {"flips": flips.at, "states": states(model)["0"], "kernels": _kernels(model), "fossil": fossil}


def _kernels(model: esper.MorphableModel) -> list[str]:
    return [seed.kernel.artifact_id for _, seed in _seeds(model)]


def commits_by_hand(here: Rank) -> Any:
    model = _wrapped(here, commit="manual")
    future = model.request_kernel("0", 0, here.shelf.put(blueprint()).id)
    at = None
    for number in range(1, 3000):
        _step(model)
        time.sleep(0.001)
        if model.commit():
            at = number
            break
    return {"at": at, "result": future.result(1)}


def a_checkpoint_brings_all_to_one_plan(here: Rank) -> Any:
    model = _wrapped(here)
    kernel = here.shelf.put(blueprint()).id
    if here.rank:  # this rank alone asks for something, which is called off by what is loaded
        lost = model.request_kernel("0", 1, kernel)
    plain = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    assert plain.request_kernel("0", 0, kernel, trainable=True).result(30)
    plain(torch.ones(1, 8))
    model.load_state_dict(plain.state_dict())
    assert not here.rank or lost.result(30) is False
    _step(model)
    here.meet("loaded")
    flips = _Flips(model)
    future = model.request_kernel("0", 1, kernel)
    _train_until(model, [future])
    _settle(here, model)
    return {"states": states(model)["0"][:2], "result": future.result(), "flips": flips.at}


def a_paused_rank(here: Rank) -> Any:
    """Rank 1 is stopped for a while, just after it has asked."""
    model = _wrapped(here)
    flips = _Flips(model)
    _train_until(model, [])
    here.meet("about to pause")
    future = model.request_kernel("0", 0, here.shelf.put(blueprint()).id)
    if here.rank == 1:
        pid = os.getpid()
        subprocess.Popen(["/bin/sh", "-c", f"kill -STOP {pid}; sleep 5; kill -CONT {pid}"])
    _train_until(model, [future])
    _settle(here, model)
    return {"result": future.result(), "flips": flips.at}


def models_of_other_sites(here: Rank) -> Any:
    """What each rank is told where they wrap different parts, and what comes of it afterwards."""
    group, told = torch.distributed.group.WORLD, {}
    tries: dict[str, Callable[[], Any]] = {
        "layers": lambda: _wrapped(here, target_layers="0" if here.rank else None),
        "more layers": lambda: _wrapped(here, target_layers=None if here.rank else "0"),
        "seeds": lambda: _wrapped(here, seeds_per_layer=2 + here.rank),
        "features": lambda: esper.wrap(
            mlp(8, 6 + here.rank, 4), platform=here.shelf.platform, process_group=group, target_layers="2"
        ),
        "in DDP": lambda: torch.nn.parallel.DistributedDataParallel(
            esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform, target_layers="0" if here.rank else "2")
        ),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except ranks.RanksError as error:
            told[name] = str(error)
    model = _wrapped(here)
    future = model.request_kernel("0", 0, here.shelf.put(blueprint()).id)
    _train_until(model, [future])
    return {"told": told, "afterwards": future.result()}


def a_store_that_is_down_on_one_rank(here: Rank) -> Any:
    """Rank 1 asks a store that nobody serves; what was in force stays, and is what comes next too."""
    kernels = [here.shelf.put(blueprint(seed=seed)).id for seed in range(2)]
    urza = {"url": "http://127.0.0.1:1", "client": {"retries": 1, "cache_folder": here.folder / "downloads"}}
    config = esper.EsperConfig.model_validate({"urza": urza, "platform": {"root": here.folder / "elsewhere"}})
    with esper.Platform.connect(config) as away:
        model = _wrapped(here, away if here.rank == 1 else None)
        model.load_state_dict(_grown(here, kernels[0]).state_dict())
        here.meet("all have grown")
        flips = _Flips(model)
        request = model.request_kernel("0", 0, kernels[1])
        _train_until(model, [request])
        _settle(here, model)
        layer, told = model.kasmina_layers["0"], request.progress()
        return {
            "result": request.result(),
            "kernel": layer.kernel_in_force(0) == kernels[0],
            "flips": flips.at,
            "errors": layer.state.errors(0),
            "reason": told.reason,
        }


def _grown(here: Rank, kernel: str) -> esper.MorphableModel:
    plain = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    assert plain.request_kernel("0", 0, kernel).result(30)
    plain(torch.ones(1, 8))
    return plain


class _Dies:
    """An executor of a model that makes ready `lives` times, and ends the process then."""

    def __init__(self, lives: int) -> None:
        self._lives = lives

    def ready(self, plan: Any, runtime: Any) -> bool:
        return False

    def prepare(self, plan: Any, runtime: Any) -> None:
        self._lives -= 1
        if self._lives < 0:
            os._exit(9)

    def follow(self, plan: Any) -> None: ...

    def install_entry_hook(self) -> None: ...

    def remove_entry_hook(self) -> None: ...


def ranks_that_die(here: Rank) -> Any:
    """Rank 2 dies between its vote and its answer, then rank 0, which keeps the store. Rank 1 tells of it."""
    ranks.PATIENCE = 1.0
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]  # shorter than a class
    logging.getLogger("esper.distributed").addHandler(handler)
    model = _wrapped(here)
    kernel = here.shelf.put(blueprint()).id
    dies = _Dies(1 if here.rank == 2 else 10**6)
    model.runtime.add_executor(dies)
    future = model.request_kernel("0", 0, kernel, alpha=0.5)
    end = time.monotonic() + 6
    while time.monotonic() < end:
        _step(model)
        time.sleep(0.005)
    found = {"before": future.done(), "plan": len(model.runtime.plan.sites), "said": list(said)}
    here.store.set(f"alive/{here.rank}", "1")
    here.lonely = True
    if here.rank == 0:
        here.store.wait(["alive/1"])
        return found
    time.sleep(1)
    here.store.set("goes on", "1")
    answer = future.result(30)  # once the store is gone
    _step(model)
    layer = model.kasmina_layers["0"]
    return {**found, "answer": answer, "reason": layer.seed_errors[0], "state": states(model)["0"][0]}
