"""The state of a model's seeds: tensors on a device, and a mirror that answers without touching it."""

import copy
import math
import pickle
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esper.errors import EsperError
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.execution.state_layout import AlphaError, KasminaStateLayout, StateDictError, checked_alpha, kernel_number

S = SeedLifecycleState
DTYPES = {
    "lifecycle_states": torch.uint8,
    "active_kernel_id": torch.int64,
    "alpha_blend": torch.float16,
    "health_accumulator": torch.float32,
    "last_update_epoch": torch.int32,
    "exec_latency_μs": torch.int16,
    "error_count": torch.int16,
    "fallback_active": torch.bool,
}
KERNEL, OTHER = "ab" * 32, "12" * 32


def fields(layout):
    return {name: getattr(layout, name) for name in DTYPES}


def assert_mirrored(layout):
    """Device and mirror hold the same, bit for bit."""
    for name, tensor in fields(layout).items():
        assert np.array_equal(tensor.cpu().numpy(), layout.mirror(name)), name


def activate(layout, seed, kernel=KERNEL):
    layout.set_lifecycle(seed, S.LOADING)
    layout.set_lifecycle(seed, S.ACTIVE, kernel)


def populated():
    layout = KasminaStateLayout(5)
    activate(layout, 1)
    layout.set_alpha(1, 0.3)
    layout.record_error(2)
    layout.record_latency(1, 17)
    layout.record_health(4, 0.5)
    layout.touch_epoch(1, 9)
    layout.set_lifecycle(3, S.LOADING)
    layout.fail_load(3)
    return layout


# ---- tensors -------------------------------------------------------------------------------------------------------


def test_fields_dtypes_and_initial_values():
    layout = KasminaStateLayout(3)
    for name, tensor in fields(layout).items():
        assert tensor.dtype == DTYPES[name]
        assert tensor.tolist() == [1.0 if name == "alpha_blend" else 0] * 3
        assert not tensor.requires_grad
    assert layout.nbytes == sum(tensor.nbytes for tensor in fields(layout).values())


def test_a_view_is_a_window_on_the_same_memory():
    root = KasminaStateLayout(10)
    view = root.view(4, 7)
    for name, tensor in fields(view).items():
        whole = getattr(root, name)
        assert tensor.shape == (3,)
        assert tensor.data_ptr() == whole.data_ptr() + 4 * whole.element_size()
    view.set_alpha(0, 0.5)
    assert root.alpha(4) == 0.5
    assert root.alpha_blend.tolist() == [1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1]
    root.view(2, 8).view(1, 3).record_error(0)
    assert root.errors(3) == 1
    assert root.view(5, 5).active_seeds() == ()


def test_views_of_a_moved_root_are_of_the_new_tensors():
    root = populated()
    view = root.view(1, 3)
    before = root.state_dict()
    assert view.to("meta") is view
    assert root.device == view.device == torch.device("meta")
    assert {tensor.device.type for tensor in fields(view).values()} == {"meta"}
    assert view.alpha(0) == root.alpha(1)
    view.set_alpha(0, 0.25)  # the mirror answers on meta, too
    root.to(torch.device("cpu"))  # and nothing was lost there
    assert view.alpha_blend.tolist() == [0.25, 1.0]
    assert_mirrored(root)
    for name, tensor in root.state_dict().items():
        assert tensor.dtype == DTYPES[name]
        assert name == "alpha_blend" or torch.equal(tensor, before[name])


def test_moving_to_where_it_is_keeps_the_tensors_and_the_generation():
    root = KasminaStateLayout(4)
    tensor, generation = root.alpha_blend, root.generation
    root.view(0, 2).to("cpu")
    assert root.alpha_blend is tensor
    assert root.generation == generation
    root.to("meta")
    assert root.generation == generation + 1


def test_made_under_inference_mode_it_is_still_writable_and_usable_outside():
    with torch.inference_mode():
        layout = KasminaStateLayout(2)
        layout.set_alpha(0, 0.5)
    assert not any(tensor.is_inference() for tensor in fields(layout).values())
    layout.set_alpha(1, 0.25)
    x = torch.ones(2, requires_grad=True)
    (x * layout.alpha_blend).sum().backward()
    assert x.grad.tolist() == [0.5, 0.25]


def test_the_device_is_the_one_given_whatever_the_default_is():
    with torch.device("meta"):
        layout = KasminaStateLayout(2, "cpu")
        layout.set_alpha(0, 0.5)
        layout.to("cpu")
    assert layout.device.type == "cpu"
    assert layout.alpha_blend.tolist() == [0.5, 1.0]
    assert KasminaStateLayout(2, "meta").alpha_blend.is_meta


def test_under_a_fake_mode_it_is_as_fake_as_the_model_around_it():
    with FakeTensorMode():
        layout = KasminaStateLayout(3, "cpu")
        layout.set_alpha(1, 0.5)
        for name, tensor in fields(layout).items():
            assert (tensor.dtype, tensor.shape, tensor.device.type) == (DTYPES[name], (3,), "cpu")
    assert layout.alpha(1) == 0.5


def test_a_write_that_the_device_refuses_leaves_the_mirror_as_it_was():
    layout = KasminaStateLayout(2)
    with FakeTensorMode(), pytest.raises(Exception, match="FakeTensor"):
        layout.set_alpha(0, 0.5)
    assert layout.alpha(0) == 1.0
    assert_mirrored(layout)


def test_a_hundred_thousand_seeds_cost_their_bytes_and_views_cost_nothing():
    tracemalloc.start()
    root = KasminaStateLayout(100_000)
    views = [root.view(i, i + 4) for i in range(0, 100_000, 4)]
    mirror = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert mirror < 100_000 * 24 + len(views) * 600
    assert len(views) == 25_000
    views[-1].set_alpha(3, 0.0)
    assert root.alpha(99_999) == 0.0


# ---- the mirror ----------------------------------------------------------------------------------------------------


def test_no_question_and_no_change_reads_the_device():
    """On meta there is nothing to read: any read would raise."""
    layout = KasminaStateLayout(4, "meta")
    activate(layout, 0)
    layout.set_alpha(0, 0.5)
    assert layout.record_error(1) == 1
    assert layout.record_latency(1, 12.4) == 12
    assert layout.record_health(2, 1.0) == pytest.approx(0.1)
    layout.touch_epoch(3, 7)
    assert (layout.lifecycle(0), layout.kernel_id(0), layout.alpha(0)) == (S.ACTIVE, kernel_number(KERNEL), 0.5)
    assert (layout.errors(1), layout.latency_μs(1), layout.last_epoch(3)) == (1, 12, 7)
    assert (layout.health(2), layout.fallback(0), layout.in_force(0)) == (pytest.approx(0.1), False, True)
    assert (layout.active_seeds(), layout.error_seeds()) == ((0,), ())
    assert "4 seeds on meta, 1 active" in repr(layout)
    layout.state_dict()


def test_device_and_mirror_agree_after_every_kind_of_change():
    layout = populated()
    assert_mirrored(layout)
    assert layout.alpha_blend[1].item() == layout.alpha(1)


def test_the_mirror_cannot_be_written():
    layout = KasminaStateLayout(2)
    with pytest.raises(ValueError, match="read-only"):
        layout.mirror("error_count")[0] = 3
    layout.record_error(0)
    assert layout.mirror("error_count").tolist() == [1, 0]


# ---- lifecycle -----------------------------------------------------------------------------------------------------


def test_a_kernel_comes_into_force_and_goes():
    layout = KasminaStateLayout(2)
    assert layout.set_lifecycle(1, S.LOADING) is S.DORMANT
    assert layout.active_seeds() == ()
    assert layout.set_lifecycle(1, S.ACTIVE, KERNEL) is S.LOADING
    assert layout.active_seeds() == (1,)
    assert layout.active_kernel_id.tolist() == [0, int.from_bytes(bytes.fromhex(KERNEL)[:8], "big", signed=True)]
    layout.set_lifecycle(1, S.DORMANT)
    assert (layout.kernel_id(1), layout.active_seeds()) == (0, ())
    assert_mirrored(layout)


def test_the_old_kernel_stays_in_force_while_its_replacement_loads():
    layout = KasminaStateLayout(1)
    activate(layout, 0)
    layout.set_lifecycle(0, S.LOADING)
    assert layout.active_seeds() == (0,)
    assert layout.kernel_id(0) == kernel_number(KERNEL)
    layout.set_lifecycle(0, S.ACTIVE, OTHER)
    assert layout.kernel_id(0) == kernel_number(OTHER)


def test_a_failed_replacement_leaves_the_seed_active_with_its_error_counted():
    layout = KasminaStateLayout(1)
    activate(layout, 0)
    layout.set_lifecycle(0, S.LOADING)
    assert layout.fail_load(0) is S.ACTIVE
    assert (layout.errors(0), layout.kernel_id(0), layout.fallback(0)) == (1, kernel_number(KERNEL), False)


def test_a_failed_first_load_goes_to_error_recovery_until_the_next_one_succeeds():
    layout = KasminaStateLayout(2)
    layout.set_lifecycle(0, S.LOADING)
    assert layout.fail_load(0) is S.ERROR_RECOVERY
    assert (layout.errors(0), layout.fallback(0), layout.error_seeds()) == (1, True, (0,))
    layout.set_lifecycle(0, S.LOADING)
    assert layout.fallback(0)
    layout.set_lifecycle(0, S.ACTIVE, KERNEL)
    assert not layout.fallback(0)
    assert layout.errors(0) == 1
    assert_mirrored(layout)


@pytest.mark.parametrize("active", [False, True])
def test_a_cancelled_load_goes_back_to_what_was_before(active):
    layout = KasminaStateLayout(1)
    if active:
        activate(layout, 0)
    layout.set_lifecycle(0, S.LOADING)
    assert layout.cancel_load(0) is (S.ACTIVE if active else S.DORMANT)
    assert layout.errors(0) == 0


@pytest.mark.parametrize("end", ["fail_load", "cancel_load"])
def test_a_load_cannot_end_where_none_is_under_way(end):
    layout = KasminaStateLayout(1)
    before = layout.state_dict()
    with pytest.raises(LifecycleError, match="seed 0 is DORMANT"):
        getattr(layout, end)(0)
    assert all(torch.equal(layout.state_dict()[name], before[name]) for name in before)


def test_an_illegal_change_names_the_layer_and_changes_nothing():
    layout = KasminaStateLayout(8).view(4, 8, label="layer 'fc1'")
    with pytest.raises(LifecycleError, match=r"seed 2 of layer 'fc1' cannot go from DORMANT to ACTIVE.*LOADING"):
        layout.set_lifecycle(2, S.ACTIVE, KERNEL)
    assert layout.lifecycle(2) is S.DORMANT
    assert layout.kernel_id(2) == 0


def test_active_needs_a_kernel_and_only_active_takes_one():
    layout = KasminaStateLayout(1)
    with pytest.raises(LifecycleError, match="gets its kernel when it becomes ACTIVE"):
        layout.set_lifecycle(0, S.LOADING, KERNEL)
    layout.set_lifecycle(0, S.LOADING)
    with pytest.raises(LifecycleError, match="cannot become ACTIVE without a kernel"):
        layout.set_lifecycle(0, S.ACTIVE)
    with pytest.raises(EsperError, match="64 hexadecimal digits"):
        layout.set_lifecycle(0, S.ACTIVE, "my-kernel")
    assert layout.lifecycle(0) is S.LOADING


def test_a_fossil_stays_in_force_but_is_no_longer_active():
    layout = KasminaStateLayout(2)
    activate(layout, 0)
    activate(layout, 1)
    layout.set_lifecycle(1, S.FOSSILIZED)
    assert (layout.active_seeds(), layout.seeds_in(S.FOSSILIZED), layout.in_force(1)) == ((0,), (1,), True)


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
