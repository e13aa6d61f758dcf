// The cell that a search works in.
#pragma once

#include "common.h"

namespace carryall {

// Rows of `box` are vectors; columns of `inverse` belong to them; heights: between opposite faces.
struct Frame {
  double box[9], inverse[9], heights[3];
};

inline void cross(const double* a, const double* b, double* c) {
  c[0] = a[1] * b[2] - a[2] * b[1];
  c[1] = a[2] * b[0] - a[0] * b[2];
  c[2] = a[0] * b[1] - a[1] * b[0];
}

inline double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

inline bool normalize(double* a) {
  const double length = std::sqrt(dot(a, a));
  if (!(length > 0) || !std::isfinite(length)) return false;
  for (int k = 0; k < 3; k++) a[k] /= length;
  return true;
}

// Missing vectors of open axes become unit vectors normal to the others, as complete_cell of neighbor_search.py makes them.
inline bool complete(const double* cell, const uint8_t* pbc, double* box) {
  std::memcpy(box, cell, 9 * sizeof(double));
  bool missing[3];
  int count = 0;
  for (int a = 0; a < 3; a++) {
    for (int k = 0; k < 3; k++)
      if (!std::isfinite(cell[3 * a + k])) return false;
    missing[a] = box[3 * a] == 0 && box[3 * a + 1] == 0 && box[3 * a + 2] == 0;
    if (missing[a] && pbc[a]) return false;
    count += missing[a];
  }
  if (count == 3) {
    for (int k = 0; k < 9; k++) box[k] = k % 4 == 0;
    return true;
  }
  if (count == 2) {
    const int kept = !missing[0] ? 0 : !missing[1] ? 1 : 2;
    const double* a = box + 3 * kept;
    int least = 0;
    for (int k = 1; k < 3; k++)
      if (std::fabs(a[k]) < std::fabs(a[least])) least = k;
    double axis[3] = {0, 0, 0};
    axis[least] = 1;
    double* b = box + 3 * ((kept + 1) % 3);
    double* c = box + 3 * ((kept + 2) % 3);
    cross(a, axis, b);
    if (!normalize(b)) return false;
    cross(a, b, c);
    return normalize(c);
  }
  if (count == 1) {
    const int a = missing[0] ? 0 : missing[1] ? 1 : 2;
    cross(box + 3 * ((a + 1) % 3), box + 3 * ((a + 2) % 3), box + 3 * a);
    return normalize(box + 3 * a);
  }
  return true;
}

// False: the cell is not finite, lacks a periodic axis or has no volume.
inline bool make_frame(const double* cell, const uint8_t* pbc, Frame& frame) {
  if (!complete(cell, pbc, frame.box)) return false;
  const double* h = frame.box;
  double normal[3][3], product = 1;
  for (int a = 0; a < 3; a++) {
    cross(h + 3 * ((a + 1) % 3), h + 3 * ((a + 2) % 3), normal[a]);
    product *= std::sqrt(dot(h + 3 * a, h + 3 * a));
  }
  const double volume = dot(h, normal[0]);
  if (!(std::fabs(volume) >= 1e-8 * std::max(product, 1e-300)) || !std::isfinite(volume)) return false;
  for (int a = 0; a < 3; a++) {
    for (int k = 0; k < 3; k++) frame.inverse[3 * k + a] = normal[a][k] / volume;
    frame.heights[a] = std::fabs(volume) / std::sqrt(dot(normal[a], normal[a]));
  }
  return true;
}

}  // namespace carryall
