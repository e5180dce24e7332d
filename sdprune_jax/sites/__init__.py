"""What can be removed from Stable Diffusion 2: the table of sites, and slicing by it."""

from sdprune_jax.sites.site_table import SCOPES as SCOPES
from sdprune_jax.sites.site_table import Architecture as Architecture
from sdprune_jax.sites.site_table import Site as Site
from sdprune_jax.sites.site_table import operators as operators
from sdprune_jax.sites.site_table import prunable as prunable
from sdprune_jax.sites.site_table import table as table
from sdprune_jax.sites.slicing import slice_params as slice_params
