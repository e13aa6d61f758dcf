"""Neighbour graphs: the type, the search, reductions over segments, pairs of edges, and what a potential is."""

from carryall.graph.neighbor_graph import NeighborGraph as NeighborGraph
from carryall.graph.neighbor_graph import concatenate as concatenate
from carryall.graph.neighbor_graph import edge_vectors as edge_vectors
from carryall.graph.neighbor_graph import pointer as pointer
from carryall.graph.neighbor_graph import validate as validate
from carryall.graph.neighbor_search import SkinNeighborList as SkinNeighborList
from carryall.graph.neighbor_search import build_graph as build_graph
from carryall.graph.neighbor_search import graph_from_batch as graph_from_batch
from carryall.graph.neighbor_search import graph_from_structures as graph_from_structures
from carryall.graph.pairs import center_edge_pairs as center_edge_pairs
from carryall.graph.potential import Potential as Potential
from carryall.graph.potential import PotentialSpec as PotentialSpec
from carryall.graph.segments import segment_max as segment_max
from carryall.graph.segments import segment_softmax as segment_softmax
from carryall.graph.segments import segment_sum as segment_sum
