"""The plan: which kernel sits in which seed, with its flags. An immutable value.

A commit replaces one plan by another. Everything that executes a model (eager regions, site modules, the dispatchers
of compiled graphs) is specialised for a plan and told of a new one; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from esper.execution.kernels.loaded_kernel import LoadedKernel

__all__ = ["DORMANT", "Plan", "SeedPlan"]


@dataclass(frozen=True, slots=True)
class SeedPlan:
    """One active seed: `seed` is its index at the site, `alpha_index` its index in the model's state tensors;
    `uses_host` says whether the kernel reads what the site has computed so far, beside its input."""

    seed: int
    kernel: LoadedKernel
    isolate: bool
    uses_host: bool
    alpha_index: int
    constant_alpha: float | None = None
    """The alpha of a fossil, which a compiled variant has as a constant; None while the seed is active."""

    @property
    def specialization_key(self) -> Hashable:
        """What a compiled variant is specialised for; kernels of equal structure differ only in their tensors."""
        requires_grad = tuple(parameter.requires_grad for parameter in self.kernel.parameters)
        return self.kernel.graph.digest, self.isolate, requires_grad, self.constant_alpha


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Plan:
    """Active seeds by site id, each site's in ascending seed order; a site without active seeds has no entry."""

    sites: Mapping[int, tuple[SeedPlan, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def with_seed(self, site: int, seed: SeedPlan) -> Plan:
        """This plan with `seed` at `site`, in the place of what the seed held before."""
        others = [other for other in self.sites.get(site, ()) if other.seed != seed.seed]
        return self._with_site(site, sorted((*others, seed), key=lambda each: each.seed))

    def without_seed(self, site: int, index: int) -> Plan:
        """This plan with seed `index` of `site` dormant."""
        return self._with_site(site, [other for other in self.sites.get(site, ()) if other.seed != index])

    def _with_site(self, site: int, seeds: Iterable[SeedPlan]) -> Plan:
        sites = {**self.sites, site: tuple(seeds)}
        return Plan(MappingProxyType({key: sites[key] for key in sorted(sites) if sites[key]}))

    def seed(self, site: int, index: int) -> SeedPlan | None:
        """The active seed `index` of `site`, or None."""
        return next((seed for seed in self.sites.get(site, ()) if seed.seed == index), None)

    def restricted(self, sites: Iterable[int]) -> Plan:
        """The part of this plan that concerns `sites`."""
        wanted = set(sites)
        return Plan(MappingProxyType({site: seeds for site, seeds in self.sites.items() if site in wanted}))

    def seeds(self) -> Iterator[SeedPlan]:
        """Every active seed: sites ascending, seeds ascending. Kernel inputs and alphas of variants have this order."""
        for seeds in self.sites.values():
            yield from seeds

    @property
    def specialization_key(self) -> Hashable:
        """Equal for plans that the same compiled variant can execute with other tensors."""
        return tuple((site, tuple(seed.specialization_key for seed in seeds)) for site, seeds in self.sites.items())

    @property
    def is_dormant(self) -> bool:
        """Whether no seed is active."""
        return not self.sites


DORMANT = Plan()
