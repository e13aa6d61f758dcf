"""Structures and batches of them, units, elements, readers and writers."""

from carryall.data.atomic_data import AtomicData as AtomicData
from carryall.data.batch import Batch as Batch
from carryall.data.dataset import check_structures as check_structures
from carryall.data.dataset import split_structures as split_structures
from carryall.data.dataset import summary as summary
from carryall.data.elements import MASSES as MASSES
from carryall.data.elements import SYMBOLS as SYMBOLS
from carryall.data.elements import atomic_number as atomic_number
from carryall.data.elements import symbol_of as symbol_of
from carryall.data.readers import read_structures as read_structures
from carryall.data.readers import write_structures as write_structures
