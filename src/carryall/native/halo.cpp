// Neighbours of the atoms that a rank owns among all points that it has, its own and ghosts; no periodicity: images are points.
//
// A search is made once for many steps, with a reach wider than the cutoff; each step keeps the pairs that are within it then.
#include <limits>
#include <new>

#include "common.h"
#include "pack.h"

namespace carryall {
namespace {

constexpr int NARROW = 8;                        // bins along x in a reach: rows of them are gone through side by side
constexpr double BINS = 64, LEAST_BINS = 4096;   // a table of at most so many bins for a point, and in all

// Points sorted by bins: rows along x, each row's bins one after another.
struct Rows {
  double low[3], width[3];
  int64_t size[3];
  std::vector<int64_t> start;
  std::vector<int32_t> point;
  std::vector<double> x, y, z;

  int64_t place(double v, int k) const {
    const double at = std::floor((v - low[k]) / width[k]);
    return at > 0 ? (at < double(size[k]) ? int64_t(at) : size[k] - 1) : 0;
  }
  int64_t key(const double* r) const { return (place(r[2], 2) * size[1] + place(r[1], 1)) * size[0] + place(r[0], 0); }
};

Rows sorted_rows(const double* positions, int64_t n, double reach) {
  Rows rows;
  double high[3];
  for (int k = 0; k < 3; k++) rows.low[k] = std::numeric_limits<double>::infinity(), high[k] = -rows.low[k];
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < 3; k++) {
      rows.low[k] = std::min(rows.low[k], positions[3 * i + k]);
      high[k] = std::max(high[k], positions[3 * i + k]);
    }
  // wider where points are few in much space
  for (double scale = 1;; scale *= 2) {
    double total = 1;
    for (int k = 0; k < 3; k++) {
      rows.width[k] = scale * reach / (k == 0 ? NARROW : 1);
      total *= std::floor((high[k] - rows.low[k]) / rows.width[k]) + 1;
    }
    if (!(total > BINS * double(n) + LEAST_BINS)) break;
  }
  for (int k = 0; k < 3; k++) rows.size[k] = int64_t((high[k] - rows.low[k]) / rows.width[k]) + 1;
  std::vector<int64_t> key(n);
  rows.start.assign(size_t(rows.size[0] * rows.size[1] * rows.size[2]) + 1, 0);
  for (int64_t i = 0; i < n; i++) key[i] = rows.key(positions + 3 * i), rows.start[key[i] + 1]++;
  for (size_t b = 1; b < rows.start.size(); b++) rows.start[b] += rows.start[b - 1];
  std::vector<int64_t> next(rows.start.begin(), rows.start.end() - 1);
  rows.point.resize(n), rows.x.resize(n), rows.y.resize(n), rows.z.resize(n);
  for (int64_t i = 0; i < n; i++) {
    const int64_t at = next[key[i]]++;
    const double* r = positions + 3 * i;
    rows.point[at] = int32_t(i), rows.x[at] = r[0], rows.y[at] = r[1], rows.z[at] = r[2];
  }
  return rows;
}

int64_t search(const double* positions, int64_t n, int64_t n_centers, double reach, int64_t room, int32_t* found, int64_t* ptr) {
  ptr[0] = 0;
  if (n_centers == 0) return 0;
  const Rows rows = sorted_rows(positions, n, reach);
  std::vector<int32_t> near, mine;
  int64_t filled = 0;
  for (int64_t c = 0; c < n_centers; c++) {
    const double* p = positions + 3 * c;
    mine.clear();
    const int64_t x0 = rows.place(p[0] - reach, 0), x1 = rows.place(p[0] + reach, 0);
    const int64_t y0 = rows.place(p[1] - reach, 1), y1 = rows.place(p[1] + reach, 1);
    const int64_t z0 = rows.place(p[2] - reach, 2), z1 = rows.place(p[2] + reach, 2);
    for (int64_t z = z0; z <= z1; z++)
      for (int64_t y = y0; y <= y1; y++) {
        const int64_t row = (z * rows.size[1] + y) * rows.size[0];
        const int64_t begin = rows.start[row + x0], end = rows.start[row + x1 + 1];
        if (int64_t(near.size()) < end - begin + LANES) near.resize(end - begin + LANES);
        const int64_t count = within(p, rows.x.data(), rows.y.data(), rows.z.data(), begin, end, reach * reach, near.data());
        for (int64_t k = 0; k < count; k++)
          if (rows.point[near[k]] != int32_t(c)) mine.push_back(rows.point[near[k]]);
      }
    std::sort(mine.begin(), mine.end());
    // beyond the room only counted: the caller makes more and calls again
    if (filled + int64_t(mine.size()) <= room) std::copy(mine.begin(), mine.end(), found + filled);
    filled += int64_t(mine.size());
    ptr[c + 1] = filled;
  }
  return filled;
}

}  // namespace
}  // namespace carryall

// Neighbours of the first n_centers of n points (rows of three) within `reach`, ascending for each, and their CSR pointer
// (n_centers + 1). Returns how many there are; only where that is at most `room` are all of them in `found`. -1: no memory.
CARRYALL_API int64_t carryall_halo_search(const double* positions, int64_t n, int64_t n_centers, double reach, int64_t room,
                                          int32_t* found, int64_t* ptr) {
  try {
    return carryall::search(positions, n, n_centers, reach, room, found, ptr);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// Of these pairs those whose squared distance is at most `squared` now: center, neighbor and their CSR pointer; room for all
// pairs. Returns how many; `closest` gets the least squared distance of all pairs, and a center that has it.
CARRYALL_API int64_t carryall_halo_edges(const double* positions, int64_t n_centers, const int64_t* ptr, const int32_t* found,
                                         double squared, int64_t* center, int64_t* neighbor, int64_t* edge_ptr,
                                         double* closest) {
  int64_t count = 0;
  double least = std::numeric_limits<double>::infinity();
  edge_ptr[0] = 0;
  for (int64_t c = 0; c < n_centers; c++) {
    const double cx = positions[3 * c], cy = positions[3 * c + 1], cz = positions[3 * c + 2];
    double nearest = least;
    for (int64_t k = ptr[c]; k < ptr[c + 1]; k++) {
      const int64_t j = found[k];
      const double dx = positions[3 * j] - cx, dy = positions[3 * j + 1] - cy, dz = positions[3 * j + 2] - cz;
      const double r2 = dx * dx + dy * dy + dz * dz;
      center[count] = c, neighbor[count] = j;
      nearest = r2 < nearest ? r2 : nearest;
      count += r2 <= squared;
    }
    edge_ptr[c + 1] = count;
    if (nearest < least) least = nearest, closest[1] = double(c);
  }
  closest[0] = least;
  return count;
}
