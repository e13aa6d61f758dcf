"""Machine code for what torch does slowly on a CPU: random numbers, neighbour lists, a pair potential.

C++ behind a plain C interface, compiled on first use by the machine's own compiler and kept in the user's cache. Nothing
depends on it: without a compiler, or with `CARRYALL_NATIVE=0`, torch and numpy compute the same.
"""

from carryall.native.build import library as library
