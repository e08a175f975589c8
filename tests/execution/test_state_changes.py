"""What changes in the state of seeds: alphas and counters, saving, and several threads at once."""

import copy
import math
import pickle
import threading
import time

import numpy as np
import pytest
import torch

from esper.execution.lifecycle import LifecycleError
from esper.execution.state_layout import AlphaError, KasminaStateLayout, StateDictError, checked_alpha
from tests.execution.seed_states import S, assert_mirrored, populated

# ---- alpha and counters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1e-9, 1.0000001, 2, "0.5", None, True, 0.5j, torch.tensor(0.5)]
)
def test_what_is_no_number_from_0_to_1_is_refused(value):
    layout = KasminaStateLayout(1)
    with pytest.raises(AlphaError) as caught:
        layout.set_alpha(0, value)
    assert isinstance(caught.value, ValueError)
    assert "[0, 1]" in str(caught.value) or "from 0" in str(caught.value)
    assert layout.alpha(0) == 1.0
    assert_mirrored(layout)


@pytest.mark.parametrize("value", [0, 1, 0.1, 1 / 3, 1e-9, np.float32(0.7), np.float64(0.9999)])
def test_alpha_reads_back_as_the_device_holds_it(value):
    layout = KasminaStateLayout(1)
    assert layout.set_alpha(0, value) == layout.alpha(0) == layout.alpha_blend.item() == checked_alpha(value)
    assert layout.alpha(0) == pytest.approx(float(value), abs=5e-4)


def test_counters_stay_at_their_largest_value():
    layout = KasminaStateLayout(1)
    assert layout.record_latency(0, 1e12) == 32767
    assert layout.record_latency(0, math.inf) == 32767
    state = layout.state_dict()
    state["error_count"].fill_(32766)
    layout.load_state_dict(state)
    assert [layout.record_error(0) for _ in range(3)] == [32767] * 3
    assert_mirrored(layout)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("record_latency", -1.0),
        ("record_latency", math.nan),
        ("record_health", math.nan),
        ("record_health", math.inf),
        ("touch_epoch", -1),
        ("touch_epoch", 2**31),
    ],
)
def test_impossible_measurements_are_refused(change, value):
    layout = KasminaStateLayout(1)
    with pytest.raises(ValueError, match=str(value)):
        getattr(layout, change)(0, value)
    assert_mirrored(layout)


def test_health_is_a_moving_average():
    layout = KasminaStateLayout(1)
    for _ in range(200):
        layout.record_health(0, 2.0)
    assert layout.health(0) == pytest.approx(2.0, rel=1e-4)
    assert layout.record_health(0, 0.0) == pytest.approx(1.8, rel=1e-4)


@pytest.mark.parametrize("seed", [-1, 3, 10**9])
def test_a_seed_that_does_not_exist_is_an_index_error_that_says_which_do(seed):
    view = KasminaStateLayout(9).view(3, 6, label="layer 'fc1'")
    for method in (view.lifecycle, view.alpha, view.record_error, view.in_force):
        with pytest.raises(IndexError, match=rf"no seed {seed} of layer 'fc1'; seeds 0 to 2 exist"):
            method(seed)
    with pytest.raises(IndexError, match="within the 3 seeds"):
        view.view(1, 4)


def test_a_negative_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="-1"):
        KasminaStateLayout(-1)
    assert KasminaStateLayout(0).active_seeds() == ()


# ---- saving --------------------------------------------------------------------------------------------------------


def test_a_saved_view_loads_into_another_model(tmp_path):
    source = populated().view(1, 5)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    root = KasminaStateLayout(10)
    target = root.view(6, 10)
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert_mirrored(root)
    assert root.view(0, 6).error_seeds() == root.view(0, 6).active_seeds() == ()


def test_a_saved_state_is_a_copy():
    layout = KasminaStateLayout(1)
    saved = layout.state_dict()
    layout.record_error(0)
    assert saved["error_count"].tolist() == [0]
    layout.load_state_dict(saved)
    saved["error_count"].fill_(5)
    assert layout.errors(0) == 0


def _without(state):
    del state["error_count"]


def _with_unknown(state):
    state["colour"] = torch.zeros(5)


def _with_dtype(state):
    state["alpha_blend"] = state["alpha_blend"].float()


def _with_length(state):
    state["alpha_blend"] = state["alpha_blend"][:4]


def _with(name, value):
    def spoil(state):
        state[name][1] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, r"missing \['error_count'\]"),
        (_with_unknown, r"unknown \['colour'\]"),
        (_with_dtype, r"alpha_blend is torch.float32 \[5\].*torch.float16"),
        (_with_length, r"alpha_blend is torch.float16 \[4\]"),
        (_with("lifecycle_states", 5), "lifecycle_states of seed 1 is 5"),
        (_with("alpha_blend", math.nan), "alpha_blend of seed 1 is nan"),
        (_with("alpha_blend", 1.5), "alpha_blend of seed 1 is 1.5"),
        (_with("health_accumulator", math.inf), "health_accumulator of seed 1"),
        (_with("error_count", -1), "error_count of seed 1 is -1"),
        (_with("active_kernel_id", 0), "active_kernel_id of seed 1 is 0"),
    ],
)
def test_a_saved_state_that_does_not_fit_changes_nothing(spoil, message):
    state = populated().state_dict()
    spoil(state)
    layout = KasminaStateLayout(5)
    layout.record_error(0)
    before = layout.state_dict()
    with pytest.raises(StateDictError, match=message):
        layout.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layout.state_dict().items())
    assert_mirrored(layout)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_are_separate_and_keep_views_on_one_storage(duplicate):
    root = populated()
    root_copy, view_copy = duplicate((root, root.view(1, 3)))
    root_copy.set_alpha(1, 0.125)
    assert view_copy.alpha(0) == 0.125
    assert view_copy.alpha_blend.data_ptr() == root_copy.alpha_blend[1:].data_ptr()
    assert root.alpha(1) != 0.125
    assert_mirrored(root_copy)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_no_count_is_lost_between_threads():
    layout = KasminaStateLayout(4)

    def work():
        for _ in range(500):
            layout.record_error(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layout.errors(1) == layout.error_count[1].item() == 2000


def test_readers_do_not_wait_for_a_writer():
    layout = KasminaStateLayout(2)
    storage = layout._storage  # the lock is what this test is about, and it has no public face
    answered = threading.Event()

    def read():
        layout.lifecycle(0)
        layout.alpha(1)
        layout.active_seeds()
        layout.mirror("error_count")
        _ = layout.alpha_blend
        answered.set()

    with storage.lock:
        thread = threading.Thread(target=read)
        thread.start()
        assert answered.wait(10)
    thread.join()


def test_only_one_of_many_threads_makes_a_change():
    layout = KasminaStateLayout(1)
    barrier, outcomes = threading.Barrier(8), []

    def work():
        barrier.wait()
        try:
            outcomes.append(layout.set_lifecycle(0, S.LOADING))
        except LifecycleError:
            outcomes.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(S.DORMANT) == 1
    assert outcomes.count(None) == 7


def test_moving_while_others_write_loses_nothing():
    layout = KasminaStateLayout(64)
    stop = threading.Event()

    def move():
        while not stop.is_set():
            layout.to("meta")
            layout.to("cpu")
            time.sleep(0)

    mover = threading.Thread(target=move)
    mover.start()
    for round_ in range(20):
        for seed in range(64):
            layout.set_alpha(seed, seed / 64)
            layout.touch_epoch(seed, round_)
    stop.set()
    mover.join()
    assert_mirrored(layout)
    assert layout.alpha_blend.tolist() == [seed / 64 for seed in range(64)]
