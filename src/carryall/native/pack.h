// Which of many points lie within a distance of one, packed side by side without branches.
#pragma once

#include "common.h"

namespace carryall {

// Places of the points begin to end - 1 within the distance of `center`; writes up to LANES places more than it returns.
inline int64_t within(const double* center, const double* x, const double* y, const double* z, int64_t begin, int64_t end,
                      double squared, int32_t* out) {
  const double cx = center[0], cy = center[1], cz = center[2];
  int64_t count = 0;
#ifdef __AVX512F__
  const __m512d vx = _mm512_set1_pd(cx), vy = _mm512_set1_pd(cy), vz = _mm512_set1_pd(cz), limit = _mm512_set1_pd(squared);
  __m512i index = _mm512_add_epi64(_mm512_set1_epi64(begin), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  for (int64_t k = begin; k < end; k += LANES) {
    const __mmask8 real = end - k >= LANES ? 0xFF : __mmask8((1u << (end - k)) - 1);
    const __m512d dx = _mm512_sub_pd(_mm512_maskz_loadu_pd(real, x + k), vx);
    const __m512d dy = _mm512_sub_pd(_mm512_maskz_loadu_pd(real, y + k), vy);
    const __m512d dz = _mm512_sub_pd(_mm512_maskz_loadu_pd(real, z + k), vz);
    const __m512d r2 = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(dx, dx), _mm512_mul_pd(dy, dy)), _mm512_mul_pd(dz, dz));
    const __mmask8 near = _mm512_mask_cmp_pd_mask(real, r2, limit, _CMP_LE_OQ);
    const __m256i places = _mm512_cvtepi64_epi32(_mm512_maskz_compress_epi64(near, index));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + count), places);
    count += __builtin_popcount(near);
    index = _mm512_add_epi64(index, _mm512_set1_epi64(LANES));
  }
#else
  for (int64_t k = begin; k < end; k++) {
    const double dx = x[k] - cx, dy = y[k] - cy, dz = z[k] - cz;
    out[count] = int32_t(k);
    count += dx * dx + dy * dy + dz * dz <= squared;
  }
#endif
  return count;
}

// Edges of one centre within the cutoff, in their order; room for LANES more than there are edges.
struct Packed {
  std::vector<double> x, y, z, squared;
  std::vector<int32_t> image;
  double least = 1e300;  // of all squared lengths so far

  void reserve(int64_t n) {
    if (int64_t(x.size()) < n + LANES)
      for (auto* one : {&x, &y, &z, &squared}) one->resize(n + LANES);
    if (int64_t(image.size()) < n + LANES) image.resize(n + LANES);
  }
};

// From images (4 numbers each, the last unused) and the edges of `center` to those within the cutoff; returns how many.
template <bool WITH_IMAGE>
inline int64_t pack(const double* images, const int32_t* edge, int64_t n, const double* center, double limit, Packed& out) {
  const double cx = center[0], cy = center[1], cz = center[2];
  double *px = out.x.data(), *py = out.y.data(), *pz = out.z.data(), *ps = out.squared.data();
  int32_t* pi = out.image.data();
  int64_t count = 0;
#ifdef __AVX512F__
  const __m512d vx = _mm512_set1_pd(cx), vy = _mm512_set1_pd(cy), vz = _mm512_set1_pd(cz), cut = _mm512_set1_pd(limit);
  __m512d least = _mm512_set1_pd(out.least);
  for (int64_t k = 0; k < n; k += LANES) {
    const __mmask8 real = n - k >= LANES ? 0xFF : __mmask8((1u << (n - k)) - 1);
#ifdef __AVX512VL__
    const __m256i which = _mm256_maskz_loadu_epi32(real, edge + k);
#else
    int32_t few[LANES] = {};
    std::memcpy(few, edge + k, sizeof(int32_t) * std::min<int64_t>(LANES, n - k));
    const __m256i which = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(few));
#endif
    const __m256i place = _mm256_slli_epi32(which, 2);
    const __m512d dx = _mm512_sub_pd(_mm512_i32gather_pd(place, images, 8), vx);
    const __m512d dy = _mm512_sub_pd(_mm512_i32gather_pd(place, images + 1, 8), vy);
    const __m512d dz = _mm512_sub_pd(_mm512_i32gather_pd(place, images + 2, 8), vz);
    const __m512d r2 = _mm512_add_pd(_mm512_add_pd(_mm512_mul_pd(dx, dx), _mm512_mul_pd(dy, dy)), _mm512_mul_pd(dz, dz));
    const __mmask8 near = _mm512_mask_cmp_pd_mask(real, r2, cut, _CMP_LE_OQ);
    least = _mm512_mask_min_pd(least, near, least, r2);
    _mm512_storeu_pd(px + count, _mm512_maskz_compress_pd(near, dx));
    _mm512_storeu_pd(py + count, _mm512_maskz_compress_pd(near, dy));
    _mm512_storeu_pd(pz + count, _mm512_maskz_compress_pd(near, dz));
    _mm512_storeu_pd(ps + count, _mm512_maskz_compress_pd(near, r2));
    if (WITH_IMAGE) {
      const __m512i packed = _mm512_maskz_compress_epi64(near, _mm512_cvtepi32_epi64(which));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(pi + count), _mm512_cvtepi64_epi32(packed));
    }
    count += __builtin_popcount(near);
  }
  out.least = _mm512_reduce_min_pd(least);
#else
  double least = out.least;
  for (int64_t k = 0; k < n; k++) {
    const double* p = images + 4 * int64_t(edge[k]);
    const double dx = p[0] - cx, dy = p[1] - cy, dz = p[2] - cz, r2 = dx * dx + dy * dy + dz * dz;
    px[count] = dx, py[count] = dy, pz[count] = dz, ps[count] = r2;
    if (WITH_IMAGE) pi[count] = edge[k];
    least = r2 < least ? r2 : least;
    count += r2 <= limit;
  }
  out.least = least;
#endif
  return count;
}

}  // namespace carryall
