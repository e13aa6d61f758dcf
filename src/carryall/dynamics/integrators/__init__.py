"""Equations of motion."""

from carryall.dynamics.integrators.cell_rescaling import NPTStochasticCellRescaling as NPTStochasticCellRescaling
from carryall.dynamics.integrators.langevin import NVTLangevin as NVTLangevin
from carryall.dynamics.integrators.mtk import NPH as NPH
from carryall.dynamics.integrators.mtk import NPT as NPT
from carryall.dynamics.integrators.nose_hoover import NVTNoseHoover as NVTNoseHoover
from carryall.dynamics.integrators.nve import NVE as NVE
from carryall.dynamics.integrators.velocity_rescaling import NVTVelocityRescaling as NVTVelocityRescaling
