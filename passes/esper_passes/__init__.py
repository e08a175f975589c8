"""Graph passes for sites and kernels: `torch.fx` graphs in, `torch.fx` graphs out. Depends on torch alone."""

from esper_passes._hooks import hooks_of
from esper_passes.add_kernels import AddKernels
from esper_passes.base import GraphPass, PassError, PassResult
from esper_passes.batch_seeds import BatchSeeds
from esper_passes.call_kernels import CallKernels, SeedCall
from esper_passes.elide_dormant import ElideDormant
from esper_passes.expand_modules import ExpandModules
from esper_passes.fold_fossils import FoldFossils
from esper_passes.inline_kernels import InlineKernels, KernelInput, SeedGraph, inputs
from esper_passes.lower_functional import LowerFunctional
from esper_passes.number_sites import NumberSites, tag_inputs
from esper_passes.pipeline import Callback, DumpGraphs, PassEvent, Pipeline, Timings, chain, verify
from esper_passes.record_values import RecordValues
from esper_passes.rewrite_sites import RewriteSites
from esper_passes.site_op import (
    ENTER,
    MODULE_SITE,
    SITE,
    TAGGED_ENTER,
    TAGGED_MODULE_SITE,
    TAGGED_SITE,
    SiteCall,
    host_of,
    is_enter,
    is_module_site,
    is_site,
    markers_in,
    runtimes_in,
    site_call,
    site_calls_in,
    site_id,
    site_input,
    sites_in,
)

__all__ = [
    "ENTER",
    "MODULE_SITE",
    "SITE",
    "TAGGED_ENTER",
    "TAGGED_MODULE_SITE",
    "TAGGED_SITE",
    "AddKernels",
    "BatchSeeds",
    "CallKernels",
    "Callback",
    "DumpGraphs",
    "ElideDormant",
    "ExpandModules",
    "FoldFossils",
    "GraphPass",
    "InlineKernels",
    "KernelInput",
    "LowerFunctional",
    "NumberSites",
    "PassError",
    "PassEvent",
    "PassResult",
    "Pipeline",
    "RecordValues",
    "RewriteSites",
    "SeedCall",
    "SeedGraph",
    "SiteCall",
    "Timings",
    "chain",
    "hooks_of",
    "host_of",
    "inputs",
    "is_enter",
    "is_module_site",
    "is_site",
    "markers_in",
    "runtimes_in",
    "site_call",
    "site_calls_in",
    "site_id",
    "site_input",
    "sites_in",
    "tag_inputs",
    "verify",
]
