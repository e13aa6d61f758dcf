// SPDX-License-Identifier: GPL-2.0-only
// One step of the pair style: from LAMMPS' neighbour lists to energies, forces and virials.
#include "pair_carryall.h"

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "neigh_list.h"
#include "update.h"

#include <algorithm>
#include <cmath>
#include <numeric>

using namespace LAMMPS_NS;

static constexpr int CHUNK = 4096;    // centres that are sorted by their number of edges together

void PairCarryall::compute(int eflag, int vflag)
{
  ev_init(eflag, vflag);
  check_lists();
  const size_t n_atoms = atom->nlocal + atom->nghost;
  energy_.assign(atom->nlocal, 0.0);
  forces_.assign(3 * n_atoms, 0.0);
  site_virial_.assign(vflag_atom ? 6 * n_atoms : 0, 0.0);
  site_centroid_.assign(cvflag_atom ? 9 * n_atoms : 0, 0.0);
  std::fill_n(virial_, 6, 0.0);
  types_.resize(n_atoms);
  for (size_t i = 0; i < n_atoms; ++i) types_[i] = std::max<int64_t>(type_of_[atom->type[i]], 0);
  try {
    if (model_->facts().block_edges > 0)
      evaluate_blocks();
    else
      evaluate_whole();
  } catch (const LAMMPSException &) {
    throw;
  } catch (const std::exception &failed) {
    fail(failed.what());
  }
  check_numbers();
  hand_over();
}

// Edges of atom i, which becomes the next centre
void PairCarryall::add_edges(int i)
{
  const double cutoff = model_->facts().cutoff, limit = cutoff * cutoff;
  const double *const *x = atom->x;
  const int *js = list->firstneigh[i];
  const int64_t center = static_cast<int64_t>(edges_.ptr.size()) - 1, before = edges_.size();
  for (int k = 0; k < list->numneigh[i]; ++k) {
    const int j = js[k] & NEIGHMASK;
    const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
    // not <=: a distance that is no number shall be noticed
    if (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] > limit) continue;
    edges_.center.push_back(center);
    edges_.neighbor.push_back(j);
    edges_.vectors.insert(edges_.vectors.end(), d, d + 3);
  }
  edges_.ptr.push_back(edges_.size());
  edges_.max_degree = std::max(edges_.max_degree, edges_.size() - before);
}

void PairCarryall::evaluate_whole()
{
  const int nlocal = atom->nlocal, n_atoms = nlocal + atom->nghost;
  std::vector<char> listed(nlocal, 0);
  for (int k = 0; k < list->inum; ++k) listed[list->ilist[k]] = 1;
  edges_.clear();
  for (int i = 0; i < nlocal; ++i) {
    if (listed[i])
      add_edges(i);
    else
      edges_.ptr.push_back(edges_.size());
  }
  const double cell[9] = {domain->xprd * domain->xperiodic, 0.0, 0.0,
                          domain->xy * domain->yperiodic, domain->yprd * domain->yperiodic, 0.0,
                          domain->xz * domain->zperiodic, domain->yz * domain->zperiodic, domain->zprd * domain->zperiodic};
  std::vector<double> positions(3 * static_cast<size_t>(n_atoms));
  for (int i = 0; i < n_atoms; ++i) std::copy_n(atom->x[i], 3, positions.data() + 3 * i);
  const auto found = model_->whole(nlocal, n_atoms, positions.data(), types_.data(), cell, edges_, *this);
  for (int i = 0; i < nlocal; ++i)
    if (type_of_[atom->type[i]] >= 0) energy_[i] = found.atomic_energy[i];
  std::copy_n(found.forces, forces_.size(), forces_.data());
  const double *v = found.virial;
  const double six[6] = {v[0], v[4], v[8], 0.5 * (v[1] + v[3]), 0.5 * (v[2] + v[6]), 0.5 * (v[5] + v[7])};
  std::copy_n(six, 6, virial_);
  if (vflag_atom || cvflag_atom)
    for (int64_t e = 0; e < edges_.size(); ++e)
      add_site_virials(edges_.center[e], edges_.neighbor[e], &edges_.vectors[3 * e], found.gradient + 3 * e);
}

// Without message passing the energy is a sum over centres: a few at a time, so that what the program allocates stays in cache.
// Centres of a block have nearly the same number of edges, since programs may give each as many slots as the largest has.
void PairCarryall::evaluate_blocks()
{
  const int64_t limit = model_->facts().block_edges;
  std::vector<int> order, degree(atom->nlocal, 0);
  for (int begin = 0; begin < list->inum; begin += CHUNK) {
    order.assign(list->ilist + begin, list->ilist + std::min(begin + CHUNK, list->inum));
    for (const int i : order) {
      edges_.clear();
      add_edges(i);
      degree[i] = static_cast<int>(edges_.size());
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return degree[a] < degree[b]; });
    const int n = static_cast<int>(order.size());
    int first = 0;
    for (int k = 1; k <= n; ++k) {
      if (k < n && static_cast<int64_t>(k + 1 - first) * degree[order[k]] <= limit) continue;
      evaluate_block(order.data() + first, k - first);
      first = k;
    }
  }
}

void PairCarryall::evaluate_block(const int *centers, int n)
{
  edges_.clear();
  star_types_.clear();
  for (int k = 0; k < n; ++k) {
    add_edges(centers[k]);
    star_types_.push_back(types_[centers[k]]);
  }
  for (const int64_t j : edges_.neighbor) star_types_.push_back(types_[j]);
  const auto found = model_->star(n, star_types_.data(), edges_);
  for (int k = 0; k < n; ++k) energy_[centers[k]] = found.atomic_energy[k];
  for (int64_t e = 0; e < edges_.size(); ++e)
    add_edge(centers[edges_.center[e]], edges_.neighbor[e], &edges_.vectors[3 * e], found.gradient + 3 * e);
}

// Force on the centre: dE/dr; on the neighbour: -dE/dr; virial: -r dE/dr
void PairCarryall::add_edge(int center, int neighbor, const double *r, const double *g)
{
  for (int k = 0; k < 3; ++k) {
    forces_[3 * center + k] += g[k];
    forces_[3 * neighbor + k] -= g[k];
    virial_[k] -= r[k] * g[k];
  }
  virial_[3] -= 0.5 * (r[0] * g[1] + r[1] * g[0]);
  virial_[4] -= 0.5 * (r[0] * g[2] + r[2] * g[0]);
  virial_[5] -= 0.5 * (r[1] * g[2] + r[2] * g[1]);
  if (vflag_atom || cvflag_atom) add_site_virials(center, neighbor, r, g);
}

// Half of an edge's virial to each end, as LAMMPS' pair styles do. The centroid form, from which the heat flux is right, gives it
// to the neighbour, first index r: Fan et al., Phys. Rev. B 92, 094301 (2015), eq. 15.
void PairCarryall::add_site_virials(int center, int neighbor, const double *r, const double *g)
{
  static constexpr int A[9] = {0, 1, 2, 0, 0, 1, 1, 2, 2}, B[9] = {0, 1, 2, 1, 2, 2, 0, 0, 1};
  if (vflag_atom)
    for (int k = 0; k < 6; ++k) {
      const double half = -0.25 * (r[A[k]] * g[B[k]] + r[B[k]] * g[A[k]]);
      site_virial_[6 * center + k] += half;
      site_virial_[6 * neighbor + k] += half;
    }
  if (cvflag_atom)
    for (int k = 0; k < 9; ++k) site_centroid_[9 * neighbor + k] -= r[A[k]] * g[B[k]];
}

// A simulation must not go on from an energy or a force that is no number
void PairCarryall::check_numbers()
{
  const int n_atoms = atom->nlocal + atom->nghost;
  for (int i = 0; i < n_atoms; ++i) {
    const double *f = &forces_[3 * i];
    const bool fine = std::isfinite(f[0]) && std::isfinite(f[1]) && std::isfinite(f[2]);
    if (fine && (i >= atom->nlocal || std::isfinite(energy_[i]))) continue;
    fail("the energy or force of atom " + (atom->tag_enable ? std::to_string(atom->tag[i]) : "(without id)") + " at step " +
         std::to_string(update->ntimestep) +
         " is no finite number: atoms have come too close or are far outside what the model was trained on; use a smaller time "
         "step, or relax the structure first");
  }
}

// Add to each owner's row what its ghosts got, which become zero
void PairCarryall::fold(std::vector<double> &values, int width)
{
  to_owners(values.data(), width, [](void *into, const void *from, size_t bytes) {
    for (size_t k = 0; k < bytes / sizeof(double); ++k) static_cast<double *>(into)[k] += static_cast<const double *>(from)[k];
  });
  values.resize(static_cast<size_t>(width) * atom->nlocal);
}

void PairCarryall::hand_over()
{
  const double scale = unit();
  // with newton on LAMMPS sends ghosts' rows to their owners itself
  if (!force->newton_pair) {
    fold(forces_, 3);
    if (vflag_atom) fold(site_virial_, 6);
    if (cvflag_atom) fold(site_centroid_, 9);
  }
  const int n = atom->nlocal + (force->newton_pair ? atom->nghost : 0);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 3; ++k) atom->f[i][k] += scale * forces_[3 * i + k];
  if (eflag_global) eng_vdwl += scale * std::accumulate(energy_.begin(), energy_.end(), 0.0);
  if (eflag_atom)
    for (int i = 0; i < atom->nlocal; ++i) eatom[i] += scale * energy_[i];
  if (vflag_global)
    for (int k = 0; k < 6; ++k) virial[k] += scale * virial_[k];
  if (vflag_atom)
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < 6; ++k) vatom[i][k] += scale * site_virial_[6 * i + k];
  if (cvflag_atom)
    for (int i = 0; i < n; ++i)
      for (int k = 0; k < 9; ++k) cvatom[i][k] += scale * site_centroid_[9 * i + k];
}
