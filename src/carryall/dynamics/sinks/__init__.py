"""Where finished systems go: main memory, one HDF5 file, or extended XYZ."""

from carryall.dynamics.sinks.base import DataSink as DataSink
from carryall.dynamics.sinks.base import SinkFullError as SinkFullError
from carryall.dynamics.sinks.base import write_in_order as write_in_order
from carryall.dynamics.sinks.extxyz import ExtXYZSink as ExtXYZSink
from carryall.dynamics.sinks.hdf5 import HDF5Sink as HDF5Sink
from carryall.dynamics.sinks.hdf5 import read_hdf5 as read_hdf5
from carryall.dynamics.sinks.memory import MemorySink as MemorySink
