// Lists that are kept from call to call: found again by id, checked, searched again where they could miss a neighbour.
#include "lists.h"


#include "pack.h"

namespace carryall {
namespace {

constexpr int64_t CHECKS_PER_THREAD = 50000;  // atoms that pay for a thread of their own
constexpr int64_t SEARCHES_PER_THREAD = 500;

bool lacks_vector(const double* cell) {
  for (int a = 0; a < 3; a++)
    if (cell[3 * a] == 0 && cell[3 * a + 1] == 0 && cell[3 * a + 2] == 0) return true;
  return false;
}

// d with new = old d (rows are vectors); false where it is not finite.
bool deformation_of(const double* old, const double* now, double* d) {
  double normal[9];
  for (int a = 0; a < 3; a++) {
    const double *b = old + 3 * ((a + 1) % 3), *c = old + 3 * ((a + 2) % 3);
    for (int k = 0; k < 3; k++) normal[3 * a + k] = b[(k + 1) % 3] * c[(k + 2) % 3] - b[(k + 2) % 3] * c[(k + 1) % 3];
  }
  const double volume = old[0] * normal[0] + old[1] * normal[1] + old[2] * normal[2];
  bool finite = true;
  for (int i = 0; i < 3; i++)
    for (int k = 0; k < 3; k++) {
      double sum = 0;
      for (int a = 0; a < 3; a++) sum += normal[3 * a + i] * now[3 * a + k];
      d[3 * i + k] = sum / volume;
      finite = finite && std::isfinite(d[3 * i + k]);
    }
  return finite;
}

// Not less than the largest stretch of any vector by d - 1: the smaller of two bounds of the spectral norm.
double strain_of(const double* d) {
  double total = 0, by_row = 0, by_column = 0;
  double columns[3] = {0, 0, 0};
  for (int i = 0; i < 3; i++) {
    double row = 0;
    for (int k = 0; k < 3; k++) {
      const double e = d[3 * i + k] - (i == k);
      total += e * e, row += std::fabs(e), columns[k] += std::fabs(e);
    }
    by_row = std::max(by_row, row);
  }
  for (double one : columns) by_column = std::max(by_column, one);
  return std::min(std::sqrt(total), std::sqrt(by_row * by_column));
}

// Largest squared displacement from where the deformation d (null: none) would have put the atoms; NaN and infinities win.
double farthest(const double* before, const double* now, int64_t n, const double* d) {
  uint64_t most = 0;  // the bits of numbers that are not negative have their order, and NaN is above all
  for (int64_t i = 0; i < n; i++) {
    const double *p = before + 3 * i, *q = now + 3 * i;
    double x = p[0], y = p[1], z = p[2];
    if (d) {
      x = p[0] * d[0] + p[1] * d[3] + p[2] * d[6];
      y = p[0] * d[1] + p[1] * d[4] + p[2] * d[7];
      z = p[0] * d[2] + p[1] * d[5] + p[2] * d[8];
    }
    x = q[0] - x, y = q[1] - y, z = q[2] - z;
    const double squared = x * x + y * y + z * z;
    uint64_t bits;
    std::memcpy(&bits, &squared, 8);
    most = std::max(most, bits);
  }
  double found;
  std::memcpy(&found, &most, 8);
  return found;
}

// An edge vector changes by its ends' displacement plus its length times the strain of the cell.
bool still_valid(const List& list, const double* positions, int64_t n, const double* cell, const uint8_t* pbc, double cutoff,
                 double skin) {
  if (!list.searched || list.n_atoms() != n || std::memcmp(list.pbc, pbc, 3) != 0) return false;
  bool same = true;
  for (int k = 0; k < 9; k++) same = same && list.cell[k] == cell[k];
  double strain = 0, d[9];
  if (!same) {
    if (lacks_vector(list.cell) || !deformation_of(list.cell, cell, d)) return false;
    strain = strain_of(d) * (cutoff + skin);
    if (!(strain <= skin)) return false;
  }
  return 2 * std::sqrt(farthest(list.positions.data(), positions, n, same ? nullptr : d)) + strain <= skin;
}

}  // namespace

void Lists::resolve(const Call& call) {
  const bool by_place = call.ids == nullptr;
  const size_t n = size_t(call.n_systems);
  const bool same_sizes = resolved_ && last_ptr_.size() == n + 1 && std::equal(last_ptr_.begin(), last_ptr_.end(), call.ptr);
  const bool same_names = resolved_ && by_place == last_by_place_ && current_.size() == n &&
                          (by_place || std::equal(last_ids_.begin(), last_ids_.end(), call.ids));
  if (same_sizes && same_names) return;
  resolved_ = false;
  calls_++;
  current_.clear();
  std::unordered_map<int64_t, int64_t> seen;
  for (int64_t s = 0; s < call.n_systems; s++) {
    const int64_t id = by_place ? s : call.ids[s];
    std::unique_ptr<List>& place = lists_[Key{id, by_place ? 0 : seen[id]++}];
    if (!place) place = std::make_unique<List>();
    place->last_used = calls_;
    current_.push_back(place.get());
  }
  last_by_place_ = by_place;
  last_ids_.clear();
  if (!by_place) last_ids_.assign(call.ids, call.ids + n);
  last_ptr_.assign(call.ptr, call.ptr + n + 1);
  forget(call);
  resolved_ = true;
}

// Lists of systems that are not in the call go, those that were not asked for the longest first, while they hold more atoms.
void Lists::forget(const Call& call) {
  struct Stale {
    uint64_t last_used;
    Key key;
    int64_t weight;
  };
  std::vector<Stale> stale;
  int64_t weight = 0;
  for (const auto& one : lists_)
    if (one.second->last_used != calls_) {
      stale.push_back({one.second->last_used, one.first, one.second->n_atoms() + 1});
      weight += stale.back().weight;
    }
  const int64_t allowed = call.ptr[call.n_systems] - call.ptr[0] + call.n_systems;
  if (weight <= allowed) return;
  std::sort(stale.begin(), stale.end(), [](const Stale& a, const Stale& b) { return a.last_used < b.last_used; });
  for (size_t k = 0; k < stale.size() && weight > allowed; k++) {
    weight -= stale[k].weight;
    lists_.erase(stale[k].key);
  }
}

// Systems of the call whose list could miss a neighbour.
std::vector<int64_t> Lists::stale(const Call& call) const {
  std::vector<char> bad(size_t(call.n_systems), 0);
  const int64_t n_atoms = call.ptr[call.n_systems];
  in_threads(call.n_systems, call.ptr, std::min(call.threads, n_atoms / CHECKS_PER_THREAD),
             [&](int64_t begin, int64_t end, int64_t) {
               for (int64_t s = begin; s < end; s++)
                 bad[s] = !still_valid(*current_[s], call.positions + 3 * call.ptr[s], call.ptr[s + 1] - call.ptr[s],
                                       call.cell + 9 * s, call.pbc + 3 * s, cutoff, skin);
             });
  std::vector<int64_t> found;
  for (int64_t s = 0; s < call.n_systems; s++)
    if (bad[s]) found.push_back(s);
  return found;
}

int64_t Lists::update(const Call& call) {
  resolve(call);
  problems.assign(size_t(call.n_systems), Problem());
  const std::vector<int64_t> wanted = stale(call);
  std::vector<int64_t> cost(1, 0);
  for (int64_t s : wanted) cost.push_back(cost.back() + call.ptr[s + 1] - call.ptr[s] + 1);
  const int64_t threads = std::max<int64_t>(1, std::min(call.threads, cost.back() / SEARCHES_PER_THREAD));
  if (int64_t(workspaces_.size()) < threads) workspaces_.resize(size_t(threads));
  for (int64_t s : wanted) current_[s]->searched = false;
  in_threads(int64_t(wanted.size()), cost.data(), threads, [&](int64_t begin, int64_t end, int64_t thread) {
    for (int64_t k = begin; k < end; k++) {
      const int64_t s = wanted[k], start = call.ptr[s];
      problems[s].failure = search(call.positions + 3 * start, call.ptr[s + 1] - start, call.cell + 9 * s, call.pbc + 3 * s,
                                   (cutoff + skin) * WIDER, *current_[s], workspaces_[thread], problems[s].first);
    }
  });
  int64_t failed = 0;
  for (int64_t s : wanted) failed += problems[s].failure != NONE;
  n_searches += int64_t(wanted.size());
  return failed;
}

Problem closest(const List& list, const Images& images, const double* positions) {
  Problem problem;
  double least = 1e300;
  for (int64_t c = 0; c < list.n_atoms(); c++)
    for (int64_t k = list.ptr[c]; k < list.ptr[c + 1]; k++) {
      const double* p = images.at.data() + 4 * int64_t(list.edge[k]);
      const double dx = p[0] - positions[3 * c], dy = p[1] - positions[3 * c + 1], dz = p[2] - positions[3 * c + 2];
      const double squared = dx * dx + dy * dy + dz * dz;
      if (squared >= least) continue;
      least = squared;
      problem = {COINCIDE, c, list.image_atom[list.edge[k]], std::sqrt(squared)};
    }
  return problem;
}

void Images::place(const List& list, const double* positions, const double* cell) {
  const int64_t n_shifts = int64_t(list.shifts.size()) / 3, n = list.n_images();
  vectors.resize(3 * n_shifts);
  at.resize(4 * n);
  for (int64_t s = 0; s < n_shifts; s++) {
    const double a = list.shifts[3 * s], b = list.shifts[3 * s + 1], c = list.shifts[3 * s + 2];
    for (int k = 0; k < 3; k++) vectors[3 * s + k] = (a * cell[k] + b * cell[3 + k]) + c * cell[6 + k];
  }
  for (int64_t m = 0; m < n; m++) {
    const double *p = positions + 3 * int64_t(list.image_atom[m]), *v = vectors.data() + 3 * int64_t(list.image_shift[m]);
    double* out = at.data() + 4 * m;
    out[0] = p[0] + v[0], out[1] = p[1] + v[1], out[2] = p[2] + v[2], out[3] = 0;
  }
}

}  // namespace carryall

using carryall::Call;
using carryall::Lists;

CARRYALL_API int64_t carryall_abi() { return 1; }

CARRYALL_API Lists* carryall_lists_new(double cutoff, double skin, double limit) { return new Lists(cutoff, skin, limit); }

CARRYALL_API void carryall_lists_free(Lists* lists) { delete lists; }

CARRYALL_API int64_t carryall_lists_searches(const Lists* lists) { return lists->n_searches; }

CARRYALL_API int64_t carryall_lists_kept(const Lists* lists) { return lists->kept(); }

// Brings the lists up to date. Returns the number of systems without a list, -1 where memory is short; `wide` is the number
// of edges that all lists have.
CARRYALL_API int64_t carryall_lists_update(Lists* lists, int64_t n_systems, const int64_t* ptr, const int64_t* ids,
                                           const double* positions, const double* cell, const uint8_t* pbc, int64_t threads,
                                           int64_t* wide) {
  try {
    const int64_t failed = lists->update(Call{n_systems, ptr, ids, positions, cell, pbc, threads});
    *wide = 0;
    for (int64_t s = 0; s < n_systems; s++)
      if (lists->problems[s].failure == carryall::NONE) *wide += int64_t(lists->list(s).edge.size());
    return failed;
  } catch (const std::exception&) {
    return -1;
  }
}

// The edges within the cutoff, after an update for the same call, into arrays that hold as many as the lists have: center,
// neighbor, shift (3 each), and ptr (n_atoms + 1). Returns the number of systems with coincident atoms, -1 as above.
CARRYALL_API int64_t carryall_lists_edges(Lists* lists, int64_t n_systems, const int64_t* ptr, const double* positions,
                                          const double* cell, int64_t* center, int64_t* neighbor, int32_t* shift,
                                          int64_t* edge_ptr) {
  using namespace carryall;
  try {
    Scratch& scratch = lists->scratch(1)[0];
    Packed& packed = scratch.packed;
    int64_t filled = 0, failed = 0;
    edge_ptr[0] = 0;
    for (int64_t s = 0; s < n_systems; s++) {
      const List& list = lists->list(s);
      const int64_t start = ptr[s], n = ptr[s + 1] - start;
      if (lists->problems[s].failure != NONE) {
        std::fill(edge_ptr + start + 1, edge_ptr + start + n + 1, filled);
        continue;
      }
      scratch.images.place(list, positions + 3 * start, cell + 9 * s);
      packed.reserve(list.widest);
      packed.least = 1e300;
      for (int64_t c = 0; c < n; c++) {
        const int32_t* edge = list.edge.data() + list.ptr[c];
        const int64_t found = pack<true>(scratch.images.at.data(), edge, list.ptr[c + 1] - list.ptr[c],
                                         positions + 3 * (start + c), lists->limit, packed);
        for (int64_t k = 0; k < found; k++) {
          const int32_t image = packed.image[k];
          const int32_t* whole = list.shifts.data() + 3 * int64_t(list.image_shift[image]);
          center[filled + k] = start + c;
          neighbor[filled + k] = start + list.image_atom[image];
          for (int a = 0; a < 3; a++) shift[3 * (filled + k) + a] = whole[a];
        }
        filled += found;
        edge_ptr[start + c + 1] = filled;
      }
      if (packed.least < COINCIDENT * COINCIDENT) {
        lists->problems[s] = closest(list, scratch.images, positions + 3 * start);
        failed++;
      }
    }
    return failed;
  } catch (const std::exception&) {
    return -1;
  }
}

// What is wrong with each system of the last call: code and two atoms (n_systems, 3), distance (n_systems,).
CARRYALL_API void carryall_lists_failures(const Lists* lists, int64_t* codes, double* distances) {
  for (size_t s = 0; s < lists->problems.size(); s++) {
    const carryall::Problem& one = lists->problems[s];
    codes[3 * s] = one.failure, codes[3 * s + 1] = one.first, codes[3 * s + 2] = one.second;
    distances[s] = one.distance;
  }
}
