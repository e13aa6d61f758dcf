// What all sources share: names of types, vectors of eight numbers, loops over threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define CARRYALL_API extern "C" __attribute__((visibility("default")))

namespace carryall {

// Eight lanes on every processor, whatever its own width: sums come out the same on all of them.
constexpr int LANES = 8;
typedef double Real8 __attribute__((vector_size(64)));
typedef int64_t Int8 __attribute__((vector_size(64)));

inline Real8 load8(const double* p) {
  Real8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store8(double* p, Real8 v) { std::memcpy(p, &v, sizeof v); }

inline Real8 all8(double x) { return Real8{x, x, x, x, x, x, x, x}; }

inline Real8 select8(Int8 mask, Real8 yes, Real8 no) { return (Real8)((mask & (Int8)yes) | (~mask & (Int8)no)); }

inline Real8 root8(Real8 v) {
#ifdef __AVX512F__
  return (Real8)_mm512_sqrt_pd((__m512d)v);
#else
  double x[LANES];
  store8(x, v);
  for (int k = 0; k < LANES; k++) x[k] = std::sqrt(x[k]);
  return load8(x);
#endif
}

// Halves onto halves, so that the order of the sum is that of vector registers.
inline double sum8(Real8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// work(begin, end, thread) over ranges of equal cost; `cost` (n + 1,) ascends. One thread starts no other.
template <class Work>
void in_threads(int64_t n, const int64_t* cost, int64_t threads, Work work) {
  threads = std::max<int64_t>(1, std::min<int64_t>(threads, n));
  if (threads == 1) {
    work(int64_t(0), n, int64_t(0));
    return;
  }
  std::vector<int64_t> bounds(threads + 1, n);
  bounds[0] = 0;
  for (int64_t t = 1; t < threads; t++) {
    const int64_t wanted = cost[0] + (cost[n] - cost[0]) / threads * t;
    bounds[t] = std::lower_bound(cost, cost + n, wanted) - cost;
  }
  std::vector<std::exception_ptr> failed(threads);
  std::vector<std::thread> others;
  auto guarded = [&](int64_t t) {
    try {
      work(bounds[t], bounds[t + 1], t);
    } catch (...) {
      failed[t] = std::current_exception();
    }
  };
  for (int64_t t = 1; t < threads; t++) others.emplace_back(guarded, t);
  guarded(0);
  for (auto& one : others) one.join();
  for (auto& one : failed)
    if (one) std::rethrow_exception(one);
}

}  // namespace carryall
