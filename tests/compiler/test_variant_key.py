"""Keys of compiled variants: nothing that went in is overlooked, and nothing else matters."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.compiler.variant_store import VariantKey

_FACTORS = st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=4), st.binary(max_size=4)), max_size=4)


def test_a_key_does_not_depend_on_the_order_of_its_factors() -> None:
    one = VariantKey.of({"torch": "2.13.0", "graph": b"\x00\x01"})
    other = VariantKey.of({"graph": b"\x00\x01", "torch": "2.13.0"})
    assert one == other
    assert hash(one) == hash(other)
    assert len(one.digest) == 64
    assert one.digest.startswith(one.short)


@given(_FACTORS, _FACTORS)
def test_different_factors_have_different_keys(some: dict[str, str | bytes], others: dict[str, str | bytes]) -> None:
    assert (VariantKey.of(some).digest == VariantKey.of(others).digest) == (some == others)


@pytest.mark.parametrize(
    ("some", "others"),
    [
        ({"a": "bc"}, {"ab": "c"}),
        ({"a": "b", "c": "d"}, {"a": "bcd"}),
        ({"a": "1"}, {"a": b"1"}),
        ({"a": ""}, {}),
        ({"a": "", "b": "a"}, {"a": "a", "b": ""}),
    ],
)
def test_factors_do_not_run_into_each_other(some: dict[str, str | bytes], others: dict[str, str | bytes]) -> None:
    assert VariantKey.of(some).digest != VariantKey.of(others).digest


def test_a_key_is_the_same_in_every_process() -> None:
    program = (
        "from esper.compiler.variant_store import VariantKey\n"
        "print(VariantKey.of({'torch': '2.13.0', 'graph': bytes(range(256)), 'ü': 'ÿ\\udc80'}).digest)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    here = VariantKey.of({"torch": "2.13.0", "graph": bytes(range(256)), "ü": "ÿ\udc80"}).digest
    assert there == here


def test_a_key_travels_to_another_process_and_cannot_be_changed() -> None:
    key = VariantKey.of({"torch": "2.13.0", "graph": b"graph"})
    assert pickle.loads(pickle.dumps(key)) == key
    with pytest.raises(TypeError):
        key.factors["torch"] = "2.12.0"  # type: ignore[index]  # that it is refused is the point
    with pytest.raises(AttributeError):
        key.digest = ""  # type: ignore[misc]  # that it is refused is the point


def test_a_key_keeps_short_texts_for_people_and_digests_of_the_rest() -> None:
    key = VariantKey.of({"torch": "2.13.0", "graph": b"graph" * 1000, "options": "x" * 1001, "lines": "a\nb"})
    assert key.factors["torch"] == "2.13.0"
    for name, size in (("graph", 5000), ("options", 1001), ("lines", 3)):
        assert key.factors[name].startswith("sha256:")
        assert key.factors[name].endswith(f"({size} bytes)")
