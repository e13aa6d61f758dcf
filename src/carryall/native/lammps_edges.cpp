// What the LAMMPS driver does in each step: edges from LAMMPS' own neighbour list, and errors of Python as errors of LAMMPS.
// LAMMPS is reached by addresses of its C functions only.
#include <string>

#include "common.h"

namespace LAMMPS_NS {
// The exception that LAMMPS itself throws and catches around each command; found by its name, what() is virtual.
class __attribute__((visibility("default"))) LAMMPSException : public std::exception {
 public:
  explicit LAMMPSException(const char* text) : message(text) {}
  const char* what() const noexcept override { return message.c_str(); }

 protected:
  std::string message;
};
}  // namespace LAMMPS_NS

namespace carryall {
namespace {

constexpr int NEIGHBOR_BITS = 0x1FFFFFFF;  // the others tell 1-2, 1-3 and 1-4 neighbours of molecules
constexpr double COINCIDENT = 1e-6;        // Å

typedef void (*Neighbors)(void* lammps, int list, int element, int* atom, int* count, int** neighbors);

enum Failure : int64_t { NO_MEMORY = -1, NOT_WHOLE = -2, OUT_OF_RANGE = -3, COINCIDE = -4 };

struct Row {
  const int* neighbors;
  int count;
};

// The neighbours of one centre within the cutoff, in LAMMPS' order; OUT_OF_RANGE for an atom that is none. Writes up to LANES
// places more than it returns. `least` becomes the smallest squared distance so far.
inline int64_t keep(const Row& row, const double* x, const double* at, double limit, int32_t n_all, int64_t* out, double& least) {
  int64_t found = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
  const __m512d a = _mm512_set1_pd(at[0]), b = _mm512_set1_pd(at[1]), c = _mm512_set1_pd(at[2]), cut = _mm512_set1_pd(limit);
  const __m256i bits = _mm256_set1_epi32(NEIGHBOR_BITS), all = _mm256_set1_epi32(n_all);
  __m512d smallest = _mm512_set1_pd(least);
  __mmask8 unknown = 0;
  for (int64_t k = 0; k < row.count; k += LANES) {
    const int64_t rest = row.count - k;
    const __mmask8 real = rest >= LANES ? 0xFF : __mmask8((1u << rest) - 1);
    const __m256i j = _mm256_and_si256(_mm256_maskz_loadu_epi32(real, row.neighbors + k), bits);
    // a place beyond the atoms is read as the first atom, and found out below
    const __mmask8 known = _mm256_mask_cmplt_epi32_mask(real, j, all);
    unknown |= known ^ real;
    const __m256i place = _mm256_maskz_add_epi32(known, j, _mm256_add_epi32(j, j));
    const __m512d dx = _mm512_sub_pd(_mm512_i32gather_pd(place, x, 8), a);
    const __m512d dy = _mm512_sub_pd(_mm512_i32gather_pd(place, x + 1, 8), b);
    const __m512d dz = _mm512_sub_pd(_mm512_i32gather_pd(place, x + 2, 8), c);
    const __m512d r2 = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(dx, dx), _mm512_mul_pd(dy, dy)), _mm512_mul_pd(dz, dz));
    const __mmask8 near = _mm512_mask_cmp_pd_mask(known, r2, cut, _CMP_LE_OQ);
    smallest = _mm512_mask_min_pd(smallest, near, smallest, r2);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi64(near, _mm512_cvtepi32_epi64(j)));
    found += __builtin_popcount(near);
  }
  least = _mm512_reduce_min_pd(smallest);
  if (unknown) return OUT_OF_RANGE;
#else
  const double a = at[0], b = at[1], c = at[2];
  for (int k = 0; k < row.count; k++) {
    const int64_t j = row.neighbors[k] & NEIGHBOR_BITS;
    if (j >= n_all) return OUT_OF_RANGE;
    const double dx = x[3 * j] - a, dy = x[3 * j + 1] - b, dz = x[3 * j + 2] - c;
    const double squared = dx * dx + dy * dy + dz * dz;
    out[found] = j;
    found += squared <= limit;
    least = squared < least ? squared : least;
  }
#endif
  return found;
}

// The places of centre i, begin to end - 1, of which those from old_begin to old_end - 1 have it already.
inline void fill_new(int64_t* center, int64_t i, int64_t begin, int64_t end, int64_t old_begin, int64_t old_end) {
  if (begin < old_begin) std::fill(center + begin, center + std::min(end, old_begin), i);
  if (end > old_end) std::fill(center + std::max(begin, old_end), center + end, i);
}

// Which of the neighbours of `at` lies upon it.
inline int64_t upon(const double* x, const double* at, const int64_t* neighbors, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const double* p = x + 3 * neighbors[k];
    const double dx = p[0] - at[0], dy = p[1] - at[1], dz = p[2] - at[2];
    if (dx * dx + dy * dy + dz * dz < COINCIDENT * COINCIDENT) return neighbors[k];
  }
  return -1;
}

inline void add_rows(int64_t n, const double* rows, const int64_t* place, double* to) {
  for (int64_t k = 0; k < n; k++, rows += 3) {
    double* at = to + 3 * place[k];
    at[0] += rows[0], at[1] += rows[1], at[2] += rows[2];
  }
}

}  // namespace
}  // namespace carryall

// Edges from the list `list` (full, n_elements rows) of a LAMMPS object: center and neighbor, and ptr (n_local + 1), sorted by
// centre. x (n_all, 3) in Å, limit the square of the cutoff. center and neighbor hold `room`. Returns the number of edges, or
// what room is needed when that is more than `room` (nothing is written then), or a Failure; COINCIDE has the atoms in ptr[0:2],
// which has room for two numbers at least. `ptr` comes with what the last call left there, zeros at first: most of `center`
// stays as it is then, and is not written again.
CARRYALL_API int64_t carryall_lammps_edges(void* function, void* lammps, int64_t list, int64_t n_elements, int64_t n_local,
                                           int64_t n_all, const double* x, double limit, int64_t room, int64_t* center,
                                           int64_t* neighbor, int64_t* ptr) {
  using namespace carryall;
  try {
    static thread_local std::vector<Row> rows;
    rows.assign(n_local, Row{nullptr, -1});
    if (n_elements != n_local) return NOT_WHOLE;
    if (n_all > INT32_MAX / 3) return OUT_OF_RANGE;  // places of coordinates are counted in 32 bits
    int64_t wide = 0;
    for (int64_t k = 0; k < n_elements; k++) {
      int atom = -1, count = 0;
      int* neighbors = nullptr;
      reinterpret_cast<Neighbors>(function)(lammps, int(list), int(k), &atom, &count, &neighbors);
      if (atom < 0 || atom >= n_local || rows[atom].count >= 0 || count < 0) return NOT_WHOLE;
      rows[atom] = Row{neighbors, count};
      wide += count;
    }
    if (wide + LANES > room) return wide + LANES;
    int64_t filled = 0, old_begin = 0;
    double least = 1e300;
    ptr[0] = 0;
    for (int64_t i = 0; i < n_local; i++) {
      const int64_t found = keep(rows[i], x, x + 3 * i, limit, int32_t(n_all), neighbor + filled, least);
      if (found < 0) return found;
      if (least < COINCIDENT * COINCIDENT) {
        ptr[1] = upon(x, x + 3 * i, neighbor + filled, found), ptr[0] = i;
        return COINCIDE;
      }
      const int64_t old_end = ptr[i + 1];
      fill_new(center, i, filled, filled + found, old_begin, old_end);
      filled += found, old_begin = old_end;
      ptr[i + 1] = filled;
    }
    return filled;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
}

// Positions, ids and types of n atoms (ids of `width` bytes) into memory of one's own, positions in Å, `length` of which are one
// of LAMMPS' unit. Returns the sum of 1: a position is not finite, 2: ids are others than were there, 4: types are.
CARRYALL_API int64_t carryall_lammps_atoms(int64_t n, const double* x, const void* ids, const int32_t* types, int64_t width,
                                           double length, double* positions, void* own_ids, int32_t* own_types) {
  int64_t said = 0;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < 3 * n; k++) {
    positions[k] = x[k] * length;
    sum += positions[k] * 0;
  }
  if (!(sum == 0)) said |= 1;
  if (n && std::memcmp(own_ids, ids, size_t(n * width))) std::memcpy(own_ids, ids, size_t(n * width)), said |= 2;
  if (n && std::memcmp(own_types, types, size_t(n) * sizeof *types))
    std::memcpy(own_types, types, size_t(n) * sizeof *types), said |= 4;
  return said;
}

// Forces (n_local + n_ghost, 3) to the sums (n_rows, 3): those of ghosts are added to rows `source` (n_ghost), of which the first
// n_local are the own atoms and the others go to other ranks.
CARRYALL_API void carryall_lammps_sums(int64_t n_local, int64_t n_ghost, int64_t n_rows, const double* forces,
                                       const int64_t* source, double* sums) {
  std::copy(forces, forces + 3 * n_local, sums);
  std::fill(sums + 3 * n_local, sums + 3 * n_rows, 0.0);
  carryall::add_rows(n_ghost, forces + 3 * n_local, source, sums);
}

// Sums (n_local, 3) eV/Å, and n_found rows from other ranks for the atoms `row` (n_found), in LAMMPS' unit, of which one is
// `unit`. Returns 1 when all are finite, else 0.
CARRYALL_API int64_t carryall_lammps_forces(int64_t n_local, int64_t n_found, double* sums, const double* found,
                                            const int64_t* row, double unit, double* out) {
  carryall::add_rows(n_found, found, row, sums);
  double bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t k = 0; k < 3 * n_local; k++) {
    out[k] = sums[k] / unit;
    bad += out[k] * 0;
  }
  return bad == 0;
}

// What fix external calls: `call` returns 0, or else `message` says why the run has to end.
struct CarryallCaller {
  int (*call)(int64_t step, int n_local, void* ids, double** x, double** forces);
  const char* message;
};

CARRYALL_API void carryall_lammps_callback(void* caller, int64_t step, int n_local, void* ids, double** x, double** forces) {
  const CarryallCaller* own = static_cast<const CarryallCaller*>(caller);
  if (own->call(step, n_local, ids, x, forces)) throw LAMMPS_NS::LAMMPSException(own->message);
}
