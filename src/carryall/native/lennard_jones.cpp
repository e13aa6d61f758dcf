// Lennard-Jones straight from kept lists; formulas and conventions as in carryall/models/pair.py and graph/edge_terms.py.
//
// Each centre sums over its own neighbours, so nothing is scattered. What is within the cutoff is packed first, in the order
// of neighbour and shift: which lane a pair falls into, and so the order of every sum, depends on the system alone.

#include "lists.h"

namespace carryall {
namespace {

enum Truncation { CUT = 0, SHIFT = 1, SWITCH = 2 };

constexpr int64_t BLOCK = 256;             // centres whose sums are one partial sum, whatever the number of threads
constexpr int64_t WORTH_A_THREAD = 20000;  // wide edges

struct Form {
  const int64_t* types;
  int64_t n_types;
  const double* table;  // for each type of a centre: 4 epsilon, sigma^2, energy at the cutoff, each by type of the neighbour
  double cutoff, start;  // start: where the switch begins
};

struct Sums {
  double energy = 0;
  double virial[6] = {0, 0, 0, 0, 0, 0};  // xx, xy, xz, yy, yz, zz
  double least = 1e300;
};

struct Block {
  int64_t system, begin, end;
};

// Energy and slope with the switch s: e s, and (de/dr)/r s + e (ds/dr)/r; s is 1 up to `start`.
inline void switched(Real8 squared, Real8 inverse, double start, double width, Real8& energy, Real8& slope) {
  const Real8 r = root8(squared);
  Real8 u = (r - start) * (1 / width);
  u = select8(u > 0.0, u, all8(0.0));
  u = select8(u < 1.0, u, all8(1.0));
  const Real8 v = 1.0 - u;
  const Real8 factor = 1.0 - u * u * u * (6.0 * u * u - 15.0 * u + 10.0);
  const Real8 bend = (-30.0 / width) * (u * u) * (v * v) * (r * inverse);
  slope = slope * factor + energy * bend;
  energy = energy * factor;
}

template <int TRUNCATION, bool MIXED>
void evaluate_block(const List& list, const Form& form, const int64_t* types, const double* positions, double limit,
                    const Block& block, Scratch& scratch, Sums& sums, double* atomic, double* forces) {
  Packed& packed = scratch.packed;
  packed.reserve(list.widest);
  packed.least = sums.least;
  if (MIXED)
    for (auto& one : scratch.parameters) one.resize(std::max(one.size(), packed.x.size()));
  double *four = scratch.parameters[0].data(), *sigma = scratch.parameters[1].data(), *at_cut = scratch.parameters[2].data();
  Real8 xx = all8(0), xy = all8(0), xz = all8(0), yy = all8(0), yz = all8(0), zz = all8(0);
  const Int8 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Real8 four_epsilon = all8(form.table[0]), sigma_squared = all8(form.table[1]), shift = all8(form.table[2]);
  for (int64_t c = block.begin; c < block.end; c++) {
    const int64_t degree = list.ptr[c + 1] - list.ptr[c];
    const double* center = positions + 3 * c;
    const int64_t n = pack<MIXED>(scratch.images.at.data(), list.edge.data() + list.ptr[c], degree, center, limit, packed);
    store8(packed.x.data() + n, all8(0)), store8(packed.y.data() + n, all8(0)), store8(packed.z.data() + n, all8(0));
    store8(packed.squared.data() + n, all8(1));
    if (MIXED) {
      const double* row = form.table + 3 * form.n_types * types[c];
      for (int64_t k = 0; k < n; k++) {
        const int64_t t = types[list.image_atom[packed.image[k]]];
        four[k] = row[t], sigma[k] = row[form.n_types + t], at_cut[k] = row[2 * form.n_types + t];
      }
      for (double* one : {four, sigma, at_cut}) store8(one + n, all8(0));
    }
    Real8 e = all8(0), fx = all8(0), fy = all8(0), fz = all8(0);
    for (int64_t k = 0; k < n; k += LANES) {
      const Real8 squared = load8(packed.squared.data() + k);
      const Real8 dx = load8(packed.x.data() + k), dy = load8(packed.y.data() + k), dz = load8(packed.z.data() + k);
      if (MIXED) {
        four_epsilon = load8(four + k), sigma_squared = load8(sigma + k);
        if (TRUNCATION == SHIFT) shift = load8(at_cut + k);
      }
      const Real8 inverse = 1.0 / squared;
      const Real8 ratio = sigma_squared * inverse;
      const Real8 sixth = ratio * ratio * ratio;
      const Real8 attraction = four_epsilon * sixth;
      Real8 energy = attraction * (sixth - 1.0);
      Real8 slope = attraction * (6.0 - 12.0 * sixth) * inverse;  // (de/dr) / r
      if (TRUNCATION == SHIFT) energy = energy - shift;
      if (TRUNCATION == SWITCH) switched(squared, inverse, form.start, form.cutoff - form.start, energy, slope);
      const Int8 real = lane < (n - k);
      e += select8(real, energy, all8(0));
      const Real8 gx = slope * dx, gy = slope * dy, gz = slope * dz;  // zero beyond n: so are the distances there
      fx += gx, fy += gy, fz += gz;
      xx += gx * dx, xy += gx * dy, xz += gx * dz, yy += gy * dy, yz += gy * dz, zz += gz * dz;
    }
    atomic[c] = 0.5 * sum8(e);
    forces[3 * c] = sum8(fx), forces[3 * c + 1] = sum8(fy), forces[3 * c + 2] = sum8(fz);
    sums.energy += atomic[c];
  }
  const Real8 parts[6] = {xx, xy, xz, yy, yz, zz};
  for (int k = 0; k < 6; k++) sums.virial[k] = -0.5 * sum8(parts[k]);
  sums.least = packed.least;
}

using Evaluate = decltype(&evaluate_block<CUT, false>);

Evaluate evaluator(int64_t truncation, bool mixed) {
  if (mixed) {
    if (truncation == SHIFT) return evaluate_block<SHIFT, true>;
    return truncation == SWITCH ? evaluate_block<SWITCH, true> : evaluate_block<CUT, true>;
  }
  if (truncation == SHIFT) return evaluate_block<SHIFT, false>;
  return truncation == SWITCH ? evaluate_block<SWITCH, false> : evaluate_block<CUT, false>;
}

int64_t evaluate(Lists& lists, const Call& call, const Form& form, int64_t truncation, double* energy, double* atomic,
                 double* forces, double* virial) {
  int64_t failed = lists.update(call), n_edges = 0;
  std::vector<Block> blocks;
  std::vector<int64_t> cost(1, 0);
  for (int64_t s = 0; s < call.n_systems; s++) {
    const int64_t n = call.ptr[s + 1] - call.ptr[s];
    if (lists.problems[s].failure != NONE) continue;
    const std::vector<int64_t>& ptr = lists.list(s).ptr;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      const int64_t end = std::min(n, begin + BLOCK);
      blocks.push_back({s, begin, end});
      n_edges += ptr[end] - ptr[begin];
      cost.push_back(n_edges);
    }
  }
  const int64_t threads = std::max<int64_t>(1, std::min(call.threads, n_edges / WORTH_A_THREAD));
  std::vector<Scratch>& scratch = lists.scratch(threads);
  std::vector<Sums> sums(blocks.size());
  const Evaluate block = evaluator(truncation, form.n_types > 1);
  in_threads(int64_t(blocks.size()), cost.data(), threads, [&](int64_t begin, int64_t end, int64_t thread) {
    int64_t placed = -1;
    for (int64_t b = begin; b < end; b++) {
      const int64_t s = blocks[b].system, start = call.ptr[s];
      const double* positions = call.positions + 3 * start;
      if (placed != s) scratch[thread].images.place(lists.list(s), positions, call.cell + 9 * s);
      placed = s;
      block(lists.list(s), form, form.types + start, positions, lists.limit, blocks[b], scratch[thread], sums[b],
            atomic + start, forces + 3 * start);
    }
  });
  std::fill(energy, energy + call.n_systems, 0.0);
  std::fill(virial, virial + 9 * call.n_systems, 0.0);
  constexpr int PLACE[9] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
  for (size_t b = 0; b < blocks.size(); b++) {
    const int64_t s = blocks[b].system;
    energy[s] += sums[b].energy;
    for (int k = 0; k < 9; k++) virial[9 * s + k] += sums[b].virial[PLACE[k]];
    if (sums[b].least < COINCIDENT * COINCIDENT && lists.problems[s].failure == NONE) {
      Images& images = scratch[0].images;
      images.place(lists.list(s), call.positions + 3 * call.ptr[s], call.cell + 9 * s);
      lists.problems[s] = closest(lists.list(s), images, call.positions + 3 * call.ptr[s]);
      failed++;
    }
  }
  return failed;
}

}  // namespace
}  // namespace carryall

// Energy (n_systems,), energies and forces of the atoms (n_atoms,), (n_atoms, 3), virial (n_systems, 3, 3) of systems whose
// lists are brought up to date first. Returns the number of systems that have no graph, -1 where memory is short.
CARRYALL_API int64_t carryall_lennard_jones(carryall::Lists* lists, int64_t n_systems, const int64_t* ptr, const int64_t* ids,
                                            const double* positions, const double* cell, const uint8_t* pbc, int64_t threads,
                                            const int64_t* types, int64_t n_types, const double* table, int64_t truncation,
                                            double start, double* energy, double* atomic, double* forces, double* virial) {
  try {
    const carryall::Call call{n_systems, ptr, ids, positions, cell, pbc, threads};
    const carryall::Form form{types, n_types, table, lists->cutoff, start};
    return carryall::evaluate(*lists, call, form, truncation, energy, atomic, forces, virial);
  } catch (const std::exception&) {
    return -1;
  }
}
