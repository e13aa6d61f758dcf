// Counter-based normal numbers: the integers and roundings of carryall/dynamics/noise.py, operation by operation.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, SC'11. Polynomials: fdlibm (Sun Microsystems 1993).

#include "common.h"

namespace carryall {
namespace {

constexpr int WIDTH = 64;  // counters at once, so that loops over them are vector code
constexpr double PI = 3.14159265358979323846;
constexpr double LN2 = 0.693147180559945309417;
constexpr double LOG[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                          2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                          1.479819860511658591e-01};
constexpr double SIN[] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,  -1.98412698298579493134e-04,
                          2.75573137070700676789e-06,  -2.50507602534068634195e-08, 1.58969099521155010221e-10};
constexpr double COS[] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                          -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};

template <int N>
inline double polynomial(double z, const double (&c)[N]) {
  double value = z * c[N - 1];
  for (int k = N - 2; k > 0; k--) value = (value + c[k]) * z;
  return value + c[0];
}

inline double log_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  const int64_t exponent = ((bits >> 52) & 0x7FF) - 1022;
  bits = (bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000;
  double mantissa;
  std::memcpy(&mantissa, &bits, 8);
  const bool low = mantissa < 0.70710678118654757;
  const double f = (low ? mantissa * 2.0 : mantissa) - 1.0;
  const double k = double(int32_t(exponent) - (low ? 1 : 0));
  const double s = f / (f + 2.0);
  const double z = s * s;
  const double series = polynomial(z, LOG) * z;
  const double half = 0.5 * f * f;
  return k * LN2 + (f - (half - s * (half + series)));
}

// Two normals from two words, Box and Muller's.
inline void pair_of(uint32_t even, uint32_t odd, double& first, double& second) {
  const double radius = std::sqrt(-2.0 * log_of((double(even) + 0.5) * 0x1p-32));
  const uint32_t quadrant = odd >> 30;
  const double angle = (double(odd & 0x3FFFFFFF) + 0.5) * 0x1p-30 - 0.5;
  const double x = angle * (0.5 * PI);
  const double z = x * x;
  const double sine = x + x * (z * polynomial(z, SIN));
  const double cosine = 1.0 - (0.5 * z - z * z * polynomial(z, COS));
  const double sign = radius * (1.0 - 2.0 * double(quadrant >> 1));
  const bool is_odd = quadrant & 1;
  first = sign * (is_odd ? -sine : cosine);
  second = sign * (is_odd ? cosine : sine);
}

struct Words {
  uint32_t at[4][WIDTH];
};

void philox(Words& w, uint32_t first, uint32_t second) {
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < WIDTH; i++) {
      const uint64_t a = uint64_t(w.at[0][i]) * 0xD2511F53u, b = uint64_t(w.at[2][i]) * 0xCD9E8D57u;
      w.at[0][i] = uint32_t(b >> 32) ^ w.at[1][i] ^ first;
      w.at[1][i] = uint32_t(b);
      w.at[2][i] = uint32_t(a >> 32) ^ w.at[3][i] ^ second;
      w.at[3][i] = uint32_t(a);
    }
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
}

}  // namespace
}  // namespace carryall

CARRYALL_API void carryall_normal_vectors(uint64_t seed, uint32_t stream, int64_t n, const int64_t* system, const int64_t* atom,
                                          const int64_t* step, double* out) {
  using namespace carryall;
  for (int64_t begin = 0; begin < n; begin += WIDTH) {
    const int count = int(std::min<int64_t>(WIDTH, n - begin));
    Words w = {};
    for (int i = 0; i < count; i++) {
      const uint64_t t = uint64_t(step[begin + i]);
      w.at[0][i] = uint32_t(atom[begin + i]);
      w.at[1][i] = uint32_t(t);
      w.at[2][i] = (uint32_t(t >> 32) & 0xFFFFFF) | (stream << 24);
      w.at[3][i] = uint32_t(system[begin + i]);
    }
    philox(w, uint32_t(seed), uint32_t(seed >> 32));
    double x[WIDTH], y[WIDTH], z[WIDTH], unused[WIDTH];
    for (int i = 0; i < WIDTH; i++) pair_of(w.at[0][i], w.at[1][i], x[i], z[i]);
    for (int i = 0; i < WIDTH; i++) pair_of(w.at[2][i], w.at[3][i], y[i], unused[i]);
    for (int i = 0; i < count; i++) {
      double* row = out + 3 * (begin + i);
      row[0] = x[i], row[1] = y[i], row[2] = z[i];
    }
  }
}
