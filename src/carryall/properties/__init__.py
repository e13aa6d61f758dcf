"""What people compute with a potential, and how it is shown."""

from carryall.properties.errors_table import ErrorRow as ErrorRow
from carryall.properties.errors_table import error_table as error_table
from carryall.properties.errors_table import predict as predict
from carryall.properties.evaluate import evaluate as evaluate
from carryall.properties.rdf import RadialDistribution as RadialDistribution
from carryall.properties.rdf import radial_distribution as radial_distribution
from carryall.properties.timeseries import Speed as Speed
from carryall.properties.timeseries import energy_drift as energy_drift
from carryall.properties.timeseries import measure_speed as measure_speed
