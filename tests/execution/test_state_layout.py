"""The state of a model's seeds: tensors on a device, and a mirror that answers without touching it."""

import tracemalloc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esper.errors import EsperError
from esper.execution.lifecycle import LifecycleError
from esper.execution.state_layout import KasminaStateLayout, kernel_number
from tests.execution.seed_states import DTYPES, KERNEL, OTHER, S, activate, assert_mirrored, fields, populated

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


def test_moving_to_where_it_is_keeps_the_tensors():
    root = KasminaStateLayout(4)
    tensor = root.alpha_blend
    root.view(0, 2).to("cpu")
    assert root.alpha_blend is tensor
    root.to("meta")
    assert root.alpha_blend is not tensor


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
