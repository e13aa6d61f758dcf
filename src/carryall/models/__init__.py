"""The potentials that carryall defines, combinations of them, and the derivatives of all in one place."""

from carryall.models.bridging import Bridged as Bridged
from carryall.models.combination import LinearEnergyModel as LinearEnergyModel
from carryall.models.derivatives import EnergyModel as EnergyModel
from carryall.models.derivatives import evaluate_model as evaluate_model
from carryall.models.dpa1 import DPA1 as DPA1
from carryall.models.dpa1 import DescriptorConfig as DescriptorConfig
from carryall.models.dpa1 import FittingConfig as FittingConfig
from carryall.models.eager import EagerPotential as EagerPotential
from carryall.models.ewald import Ewald as Ewald
from carryall.models.ewald_charges import LearnedEwald as LearnedEwald
from carryall.models.pair import LennardJones as LennardJones
from carryall.models.pair_table import PairTable as PairTable
from carryall.models.registry import model_from_source as model_from_source
from carryall.models.registry import model_to_source as model_to_source
from carryall.models.spin import SpinModel as SpinModel
from carryall.models.sutton_chen import SuttonChen as SuttonChen
from carryall.models.zbl import ZBL as ZBL
from carryall.models.zbl import write_zbl_table as write_zbl_table
