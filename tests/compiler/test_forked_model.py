"""A process that is forked while other threads work on a compiled model."""

from __future__ import annotations

import os

import pytest

from tests.execution.test_forked_layer import output_of


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_is_forked_while_a_kernel_is_staged_runs_the_model_and_loads_another() -> None:
    assert output_of("tests.compiler.forked_model") == ["child: 0", "loaded: True", "runs: True"]
