"""DPA-1: attention between the neighbours of an atom, on the neighbour graph."""

from carryall.models.dpa1.config import DescriptorConfig as DescriptorConfig
from carryall.models.dpa1.config import FittingConfig as FittingConfig
from carryall.models.dpa1.model import DPA1 as DPA1
