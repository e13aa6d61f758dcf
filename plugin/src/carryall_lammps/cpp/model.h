// SPDX-License-Identifier: GPL-2.0-only
// A packed potential, loaded: numbers in, numbers out. The only header that the pair style needs; it knows neither torch nor LAMMPS.
#pragma once

#include "exchange.h"
#include "packed.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace carryall {

// Edges of centres, centre by centre: those of the k-th are ptr[k] to ptr[k + 1]
struct Edges {
  std::vector<int64_t> ptr{0}, center, neighbor;
  std::vector<double> vectors;    // three for each edge, from centre to neighbour, Å
  int64_t max_degree = 0;

  int64_t size() const { return static_cast<int64_t>(neighbor.size()); }
  void clear();
};

// What a program gives; valid until the next call
struct Found {
  const double *atomic_energy = nullptr;    // of each centre, eV
  const double *gradient = nullptr;         // dE/d(edge vector), three for each edge, eV/Å
  const double *forces = nullptr;           // of all atoms, eV/Å; of a whole call only
  const double *virial = nullptr;           // nine, -dE/dstrain, eV; of a whole call only
};

class Model {
 public:
  // std::runtime_error says what is wrong with the file, and what to do
  explicit Model(const std::string &path);
  ~Model();

  const Facts &facts() const;

  // All atoms of a rank at once: local ones, which are the centres, then ghosts at their images. Edges have to be ascending.
  Found whole(int64_t n_local, int64_t n_atoms, const double *positions, const int64_t *types, const double *cell,
              const Edges &edges, Swap &swap);

  // A block of centres, each edge with a neighbour of its own: `types` of the centres, then of the edges' ends. `edges.center` is
  // the place of the centre in the block; `edges.neighbor` is not looked at.
  Found star(int64_t n_centers, const int64_t *types, const Edges &edges);

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}    // namespace carryall
