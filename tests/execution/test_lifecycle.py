"""The states of a seed and the changes between them."""

import dataclasses
import itertools

import pytest

from esper.errors import EsperError
from esper.execution.lifecycle import (
    TRANSITIONS,
    LifecycleError,
    SeedLifecycleState,
    Transition,
    after_cancelled_load,
    after_failed_load,
    check_transition,
)

S = SeedLifecycleState

LEGAL = {
    (S.DORMANT, S.LOADING),
    (S.LOADING, S.ACTIVE),
    (S.LOADING, S.DORMANT),
    (S.LOADING, S.ERROR_RECOVERY),
    (S.ACTIVE, S.DORMANT),
    (S.ACTIVE, S.LOADING),
    (S.ACTIVE, S.FOSSILIZED),
    (S.ACTIVE, S.ERROR_RECOVERY),
    (S.ERROR_RECOVERY, S.LOADING),
    (S.ERROR_RECOVERY, S.DORMANT),
}


def test_states_have_the_numbers_that_the_device_tensor_holds():
    assert {state.name: int(state) for state in S} == {
        "DORMANT": 0,
        "LOADING": 1,
        "ACTIVE": 2,
        "ERROR_RECOVERY": 3,
        "FOSSILIZED": 4,
    }


@pytest.mark.parametrize(("old", "new"), list(itertools.product(S, S)))
def test_exactly_the_legal_changes_pass(old, new):
    if (old, new) in LEGAL:
        check_transition(old, new)
    else:
        with pytest.raises(LifecycleError):
            check_transition(old, new)


def test_an_illegal_change_names_the_seed_both_states_and_the_way_out():
    with pytest.raises(LifecycleError) as caught:
        check_transition(S.DORMANT, S.ACTIVE, "seed 2 of layer 'fc1'")
    assert str(caught.value) == (
        "seed 2 of layer 'fc1' cannot go from DORMANT to ACTIVE; from DORMANT it may go to LOADING."
    )
    assert isinstance(caught.value, EsperError)
    assert isinstance(caught.value, RuntimeError)


def test_fossilized_is_final_and_says_so():
    with pytest.raises(LifecycleError, match=r"seed 3 .* nothing: this state is final"):
        check_transition(S.FOSSILIZED, S.DORMANT, 3)


@pytest.mark.parametrize("in_force", [True, False])
def test_where_a_load_ends_is_a_legal_change(in_force):
    for end in (after_failed_load(in_force), after_cancelled_load(in_force)):
        check_transition(S.LOADING, end)
        assert (end is S.ACTIVE) == in_force


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        TRANSITIONS[S.FOSSILIZED] = frozenset({S.DORMANT})


def test_a_transition_is_a_value_that_reads_as_a_log_line():
    transition = Transition("fc1", 2, S.LOADING, S.ACTIVE, 1.5, "committed", "ab" * 32, layer_id=0)
    assert str(transition) == "fc1[2] LOADING -> ACTIVE (abababababab): committed"
    assert str(Transition("fc1", 0, S.DORMANT, S.LOADING, 0.0, layer_id=0)) == "fc1[0] DORMANT -> LOADING"
    with pytest.raises(dataclasses.FrozenInstanceError):
        transition.seed = 3
    assert dataclasses.replace(transition, seed=3) != transition
