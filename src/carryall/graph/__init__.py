"""Neighbour graphs: the type, the search, reductions over segments, pairs of edges, and what a potential is."""

from carryall.graph.neighbor_graph import NeighborGraph as NeighborGraph
from carryall.graph.neighbor_graph import concatenate as concatenate
from carryall.graph.neighbor_graph import edge_vectors as edge_vectors
from carryall.graph.neighbor_graph import pointer as pointer
from carryall.graph.neighbor_graph import validate as validate
from carryall.graph.neighbor_search import build_graph as build_graph
from carryall.graph.neighbor_search import graph_from_batch as graph_from_batch
from carryall.graph.neighbor_search import graph_from_structures as graph_from_structures
from carryall.graph.padded import PaddedNeighbors as PaddedNeighbors
from carryall.graph.padded import graph_from_padded as graph_from_padded
from carryall.graph.padded import padded_from_graph as padded_from_graph
from carryall.graph.pairs import center_edge_pairs as center_edge_pairs
from carryall.graph.pairs import edge_pair_cosines as edge_pair_cosines
from carryall.graph.potential import Potential as Potential
from carryall.graph.potential import PotentialSpec as PotentialSpec
from carryall.graph.segments import segment_max as segment_max
from carryall.graph.segments import segment_softmax as segment_softmax
from carryall.graph.segments import segment_sum as segment_sum
from carryall.graph.selection import exclude_atom_types as exclude_atom_types
from carryall.graph.selection import exclude_type_pairs as exclude_type_pairs
from carryall.graph.selection import limit_neighbors as limit_neighbors
from carryall.graph.skin import SkinNeighborList as SkinNeighborList
from carryall.graph.skin import UnsearchableError as UnsearchableError
from carryall.graph.systems import Systems as Systems
from carryall.graph.triples import graph_from_triples as graph_from_triples
