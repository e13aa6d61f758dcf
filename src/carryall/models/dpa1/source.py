"""DPA-1 as a nested dict in DeePMD's own form (its `Model` dict of type `standard`), both ways."""

from carryall.models.dpa1.model import set_weight_dtype as set_weight_dtype
from carryall.models.dpa1.source_reader import from_source as from_source
from carryall.models.dpa1.source_writer import to_source as to_source
