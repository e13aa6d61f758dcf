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
#ifdef __AVX512F__
  const __m512d a = _mm512_set1_pd(at[0]), b = _mm512_set1_pd(at[1]), c = _mm512_set1_pd(at[2]), cut = _mm512_set1_pd(limit);
  __m512d smallest = _mm512_set1_pd(least);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < row.count; k += LANES) {
    const int64_t rest = row.count - k;
    const __mmask8 real = rest >= LANES ? 0xFF : __mmask8((1u << rest) - 1);
    int32_t few[LANES] = {};
    std::memcpy(few, row.neighbors + k, sizeof(int32_t) * std::min<int64_t>(LANES, rest));
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(few));
    const __m512i j = _mm512_and_epi64(_mm512_cvtepi32_epi64(bits), _mm512_set1_epi64(NEIGHBOR_BITS));
    largest = _mm512_max_epi64(largest, j);
    // a place beyond the atoms is read as the first atom, and found out below
    const __mmask8 known = _mm512_mask_cmp_epi64_mask(real, j, _mm512_set1_epi64(n_all), _MM_CMPINT_LT);
    const __m512i place = _mm512_maskz_add_epi64(known, j, _mm512_add_epi64(j, j));
    const __m512d dx = _mm512_sub_pd(_mm512_i64gather_pd(place, x, 8), a);
    const __m512d dy = _mm512_sub_pd(_mm512_i64gather_pd(place, x + 1, 8), b);
    const __m512d dz = _mm512_sub_pd(_mm512_i64gather_pd(place, x + 2, 8), c);
    const __m512d r2 = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(dx, dx), _mm512_mul_pd(dy, dy)), _mm512_mul_pd(dz, dz));
    const __mmask8 near = _mm512_mask_cmp_pd_mask(known, r2, cut, _CMP_LE_OQ);
    smallest = _mm512_mask_min_pd(smallest, near, smallest, r2);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi64(near, j));
    found += __builtin_popcount(near);
  }
  least = _mm512_reduce_min_pd(smallest);
  if (_mm512_reduce_max_epi64(largest) >= n_all) return OUT_OF_RANGE;
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

// Which of the neighbours of `at` lies upon it.
inline int64_t upon(const double* x, const double* at, const int64_t* neighbors, int64_t n) {
  for (int64_t k = 0; k < n; k++) {
    const double* p = x + 3 * neighbors[k];
    const double dx = p[0] - at[0], dy = p[1] - at[1], dz = p[2] - at[2];
    if (dx * dx + dy * dy + dz * dz < COINCIDENT * COINCIDENT) return neighbors[k];
  }
  return -1;
}

}  // namespace
}  // namespace carryall

// Edges from the list `list` (full, n_elements rows) of a LAMMPS object: center and neighbor, and ptr (n_local + 1), sorted by
// centre. x (n_all, 3) in Å, limit the square of the cutoff. center and neighbor hold `room`. Returns the number of edges, or
// what room is needed when that is more than `room` (nothing is written then), or a Failure; COINCIDE has the atoms in ptr[0:2],
// which has room for two numbers at least.
CARRYALL_API int64_t carryall_lammps_edges(void* function, void* lammps, int64_t list, int64_t n_elements, int64_t n_local,
                                           int64_t n_all, const double* x, double limit, int64_t room, int64_t* center,
                                           int64_t* neighbor, int64_t* ptr) {
  using namespace carryall;
  try {
    static thread_local std::vector<Row> rows;
    rows.assign(n_local, Row{nullptr, -1});
    if (n_elements != n_local) return NOT_WHOLE;
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
    int64_t filled = 0;
    double least = 1e300;
    ptr[0] = 0;
    for (int64_t i = 0; i < n_local; i++) {
      const int64_t found = keep(rows[i], x, x + 3 * i, limit, int32_t(n_all), neighbor + filled, least);
      if (found < 0) return found;
      if (least < COINCIDENT * COINCIDENT) {
        ptr[1] = upon(x, x + 3 * i, neighbor + filled, found), ptr[0] = i;
        return COINCIDE;
      }
      std::fill(center + filled, center + filled + found, i);
      filled += found;
      ptr[i + 1] = filled;
    }
    return filled;
  } catch (const std::exception&) {
    return NO_MEMORY;
  }
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
