// All neighbours of one system within a distance: any cell, any periodicity, atoms in and out of the cell.
//
// Atoms are wrapped into the cell along periodic axes. Candidates are the images of every atom that lie within reach of the
// wrapped atoms' box, in the order of atom and lattice vectors, so that lists come out sorted when candidates are met in turn.
// Small systems compare every centre with every candidate, large ones look candidates up among binned centres.
#include <limits>

#include "frame.h"
#include "lists.h"
#include "pack.h"

namespace carryall {
namespace {

constexpr double FARTHEST = 1e9;            // cells from the origin; beyond, shifts do not fit
constexpr double SLACK = 1e-6;              // in fractions of a cell, for rounding
constexpr int64_t COMPARE_ALL = 1 << 20;    // pairs of centre and candidate up to which bins do not pay
constexpr int64_t LARGEST = 1 << 28;        // images, whose places are multiplied by four in 32 bits

// Positions inside the cell along periodic axes, their fractions and the lattice vectors taken off. False: too far out.
bool wrap(const double* positions, int64_t n, const uint8_t* pbc, const Frame& frame, Workspace& work, int64_t& atom) {
  work.fractional.resize(3 * n), work.wrapped.resize(3 * n), work.wraps.resize(3 * n);
  for (int64_t i = 0; i < n; i++) {
    const double* r = positions + 3 * i;
    double whole[3];
    for (int k = 0; k < 3; k++) {
      const double f = r[0] * frame.inverse[k] + r[1] * frame.inverse[3 + k] + r[2] * frame.inverse[6 + k];
      whole[k] = pbc[k] ? std::floor(f) : 0.0;
      if (!(std::fabs(whole[k]) < FARTHEST)) {
        atom = i;
        return false;
      }
      work.fractional[3 * i + k] = f - whole[k];
      work.wraps[3 * i + k] = int32_t(whole[k]);
    }
    for (int k = 0; k < 3; k++) {
      const double shift = whole[0] * frame.box[k] + whole[1] * frame.box[3 + k] + whole[2] * frame.box[6 + k];
      work.wrapped[3 * i + k] = r[k] - shift;
    }
  }
  return true;
}

struct Bounds {
  double low[3], high[3];
};

Bounds bounds_of(const std::vector<double>& rows, int64_t n) {
  Bounds b;
  for (int k = 0; k < 3; k++) b.low[k] = std::numeric_limits<double>::infinity(), b.high[k] = -b.low[k];
  for (int64_t i = 0; i < n; i++)
    for (int k = 0; k < 3; k++) {
      b.low[k] = std::min(b.low[k], rows[3 * i + k]);
      b.high[k] = std::max(b.high[k], rows[3 * i + k]);
    }
  return b;
}

// Images of all atoms that can have a neighbour, in the order of atom and lattice vectors.
void list_candidates(int64_t n, const uint8_t* pbc, const Frame& frame, double reach, Workspace& work) {
  const Bounds fractions = bounds_of(work.fractional, n), box = bounds_of(work.wrapped, n);
  const double* h = frame.box;
  work.self.resize(n);
  size_t filled = 0;
  for (int64_t j = 0; j < n; j++) {
    int32_t from[3], to[3];
    double most = 1;
    for (int k = 0; k < 3; k++) {
      const double margin = reach / frame.heights[k] + SLACK, f = work.fractional[3 * j + k];
      const double low = pbc[k] ? std::ceil(fractions.low[k] - margin - f) : 0.0;
      const double high = pbc[k] ? std::floor(fractions.high[k] + margin - f) : 0.0;
      if (!(high - low < double(LARGEST))) throw std::bad_alloc();
      from[k] = int32_t(low), to[k] = int32_t(high);
      most *= high - low + 1;
    }
    if (double(filled) + most > double(LARGEST)) throw std::bad_alloc();
    work.grow(filled + size_t(most));
    const double* r = &work.wrapped[3 * j];
    for (int32_t a = from[0]; a <= to[0]; a++)
      for (int32_t b = from[1]; b <= to[1]; b++)
        for (int32_t c = from[2]; c <= to[2]; c++) {
          const double x = r[0] + (a * h[0] + b * h[3] + c * h[6]);
          const double y = r[1] + (a * h[1] + b * h[4] + c * h[7]);
          const double z = r[2] + (a * h[2] + b * h[5] + c * h[8]);
          const bool itself = a == 0 && b == 0 && c == 0;
          const bool near = x >= box.low[0] - reach && x <= box.high[0] + reach && y >= box.low[1] - reach &&
                            y <= box.high[1] + reach && z >= box.low[2] - reach && z <= box.high[2] + reach;
          if (itself) work.self[j] = int32_t(filled);
          work.x[filled] = x, work.y[filled] = y, work.z[filled] = z;
          work.atom[filled] = int32_t(j);
          int32_t* image = &work.image[3 * filled];
          image[0] = a, image[1] = b, image[2] = c;
          filled += near || itself;
        }
  }
  work.n_candidates = int64_t(filled);
}

// Every centre against every candidate.
void compare_all(int64_t n, double reach, Workspace& work, List& list) {
  const int64_t m = work.n_candidates;
  list.ptr.assign(1, 0);
  int64_t filled = 0;
  for (int64_t c = 0; c < n; c++) {
    work.make_room(filled + m + LANES);
    int32_t* begin = work.found.data() + filled;
    const double *x = work.x.data(), *y = work.y.data(), *z = work.z.data();
    int32_t* end = begin + within(&work.wrapped[3 * c], x, y, z, 0, m, reach * reach, begin);
    // the centre itself is among them, once
    int32_t* self = std::lower_bound(begin, end, work.self[c]);
    std::copy(self + 1, end, self);
    filled += end - begin - 1;
    list.ptr.push_back(filled);
  }
  list.edge.assign(work.found.begin(), work.found.begin() + filled);
}

// Atoms sorted by bins: rows along x, each row's bins one after another. A table of all bins where there are not too many of
// them, else the occupied bins' keys in ascending order.
struct Bins {
  double low[3], width[3];
  int64_t size[3];
  bool table;

  int64_t place(double x, int k) const {
    const double at = std::floor((x - low[k]) / width[k]);
    return at < 0 ? 0 : at >= double(size[k]) ? size[k] - 1 : int64_t(at);
  }
  int64_t key(int64_t x, int64_t y, int64_t z) const { return (z * size[1] + y) * size[0] + x; }

  // [begin, end) of the atoms in bins x0 to x1 of a row
  void row(const Workspace& work, int64_t x0, int64_t x1, int64_t y, int64_t z, int64_t& begin, int64_t& end) const {
    const int64_t a = key(x0, y, z), b = key(x1, y, z);
    if (table) {
      begin = work.start[a], end = work.start[b + 1];
      return;
    }
    begin = std::lower_bound(work.key.begin(), work.key.end(), a) - work.key.begin();
    end = std::upper_bound(work.key.begin() + begin, work.key.end(), b) - work.key.begin();
  }
};

Bins make_bins(int64_t n, double reach, Workspace& work) {
  const Bounds box = bounds_of(work.wrapped, n);
  Bins bins;
  double total = 1;
  for (int k = 0; k < 3; k++) {
    bins.low[k] = box.low[k];
    bins.width[k] = std::max(reach / (k == 0 ? 8 : 1), (box.high[k] - box.low[k]) / double(1 << 20));
    bins.size[k] = int64_t((box.high[k] - box.low[k]) / bins.width[k]) + 1;
    total *= double(bins.size[k]);
  }
  bins.table = total <= 64.0 * double(n) + 4096;
  std::vector<int64_t>& key = work.key;
  std::vector<int64_t>& order = work.order;
  key.resize(n), order.resize(n);
  for (int64_t i = 0; i < n; i++) {
    const double* r = &work.wrapped[3 * i];
    key[i] = bins.key(bins.place(r[0], 0), bins.place(r[1], 1), bins.place(r[2], 2));
  }
  if (bins.table) {
    work.start.assign(size_t(total) + 1, 0);
    for (int64_t i = 0; i < n; i++) work.start[key[i] + 1]++;
    for (size_t b = 1; b < work.start.size(); b++) work.start[b] += work.start[b - 1];
    for (int64_t i = 0; i < n; i++) order[work.start[key[i]]++] = i;
    for (size_t b = work.start.size() - 1; b > 0; b--) work.start[b] = work.start[b - 1];
    work.start[0] = 0;
  } else {
    for (int64_t i = 0; i < n; i++) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key[a] != key[b] ? key[a] < key[b] : a < b; });
    std::vector<int64_t> sorted(n);
    for (int64_t i = 0; i < n; i++) sorted[i] = key[order[i]];
    key.swap(sorted);
  }
  work.row_x.resize(n), work.row_y.resize(n), work.row_z.resize(n), work.row_atom.resize(n);
  for (int64_t i = 0; i < n; i++) {
    const double* r = &work.wrapped[3 * order[i]];
    work.row_x[i] = r[0], work.row_y[i] = r[1], work.row_z[i] = r[2];
    work.row_atom[i] = int32_t(order[i]);
  }
  return bins;
}

// Distance from p to bin b along axis k, 0 inside.
double gap(const Bins& bins, double p, int64_t b, int k) {
  const double low = bins.low[k] + double(b) * bins.width[k], high = low + bins.width[k];
  return std::max(0.0, std::max(low - p, p - high) - 1e-9 * bins.width[k]);
}

// For each candidate in turn the centres that it is a neighbour of; then the same by centre, in the order of candidates.
void look_up(int64_t n, double reach, Workspace& work, List& list) {
  const Bins bins = make_bins(n, reach, work);
  const int64_t m = work.n_candidates;
  const double squared = reach * reach;
  work.first.resize(m + 1);
  list.ptr.assign(n + 1, 0);
  int64_t filled = 0;
  for (int64_t e = 0; e < m; e++) {
    work.first[e] = filled;
    const double p[3] = {work.x[e], work.y[e], work.z[e]};
    const int64_t y0 = bins.place(p[1] - reach, 1), y1 = bins.place(p[1] + reach, 1);
    const int64_t z0 = bins.place(p[2] - reach, 2), z1 = bins.place(p[2] + reach, 2);
    const int64_t begin_of_e = filled;
    for (int64_t z = z0; z <= z1; z++)
      for (int64_t y = y0; y <= y1; y++) {
        const double dy = gap(bins, p[1], y, 1), dz = gap(bins, p[2], z, 2), left = squared - dy * dy - dz * dz;
        if (left < 0) continue;
        const double dx = std::sqrt(left) * (1 + 1e-9);
        int64_t begin, end;
        bins.row(work, bins.place(p[0] - dx, 0), bins.place(p[0] + dx, 0), y, z, begin, end);
        work.make_room(filled + end - begin + LANES);
        filled += within(p, work.row_x.data(), work.row_y.data(), work.row_z.data(), begin, end, squared,
                         work.found.data() + filled);
      }
    const int32_t atom = work.atom[e];
    const bool itself = work.self[atom] == e;
    int64_t kept = begin_of_e;
    for (int64_t k = begin_of_e; k < filled; k++) {
      const int32_t c = work.row_atom[work.found[k]];
      work.found[kept] = c;
      if (itself && c == atom) continue;
      list.ptr[c + 1]++;
      kept++;
    }
    filled = kept;
  }
  work.first[m] = filled;
  for (int64_t c = 0; c < n; c++) list.ptr[c + 1] += list.ptr[c];
  list.edge.resize(filled);
  work.count.assign(list.ptr.begin(), list.ptr.end() - 1);
  for (int64_t e = 0; e < m; e++)
    for (int64_t k = work.first[e]; k < work.first[e + 1]; k++) list.edge[work.count[work.found[k]]++] = int32_t(e);
}

struct Triple {
  int32_t at[3];
  bool operator==(const Triple& other) const { return std::memcmp(at, other.at, sizeof at) == 0; }
};

struct TripleHash {
  size_t operator()(const Triple& t) const {
    return (size_t(uint32_t(t.at[0])) * 73856093u) ^ (size_t(uint32_t(t.at[1])) * 19349663u) ^
           (size_t(uint32_t(t.at[2])) * 83492791u);
  }
};

using Numbers = std::unordered_map<Triple, int32_t, TripleHash>;

// Numbers for shifts, in the order of their coming: a table where all possible ones are few.
class ShiftNumbers {
 public:
  ShiftNumbers(int64_t n, const Workspace& work, std::vector<int32_t>& shifts) : shifts_(shifts) {
    double size = 1;
    for (int k = 0; k < 3; k++) {
      int32_t low = 0, high = 0, first = work.wraps[k], last = first;
      for (int64_t e = 0; e < work.n_candidates; e++) {
        low = std::min(low, work.image[3 * e + k]);
        high = std::max(high, work.image[3 * e + k]);
      }
      for (int64_t i = 0; i < n; i++) {
        first = std::min(first, work.wraps[3 * i + k]);
        last = std::max(last, work.wraps[3 * i + k]);
      }
      low_[k] = int64_t(low) + first - last;
      size_[k] = int64_t(high) + last - first - low_[k] + 1;
      size *= double(size_[k]);
    }
    if (size <= 65536) table_.assign(size_t(size), -1);
  }

  int32_t operator()(const Triple& s) {
    if (!table_.empty()) {
      const int64_t a = s.at[0] - low_[0], b = s.at[1] - low_[1], c = s.at[2] - low_[2];
      int32_t& number = table_[(a * size_[1] + b) * size_[2] + c];
      if (number < 0) number = add(s);
      return number;
    }
    const auto found = numbers_.find(s);
    return found != numbers_.end() ? found->second : numbers_[s] = add(s);
  }

 private:
  int32_t add(const Triple& s) {
    shifts_.insert(shifts_.end(), s.at, s.at + 3);
    return int32_t(shifts_.size() / 3) - 1;
  }

  int64_t low_[3], size_[3];
  std::vector<int32_t> table_;
  Numbers numbers_;
  std::vector<int32_t>& shifts_;
};

// Centres whose wraps are alike see a candidate with the same shift; returns the number of such classes.
int64_t classify(int64_t n, Workspace& work) {
  work.classes.assign(n, 0);
  const int32_t* w = work.wraps.data();
  bool same = true;
  for (int64_t i = 1; i < n && same; i++) same = std::memcmp(w + 3 * i, w, 3 * sizeof(int32_t)) == 0;
  if (same) return 1;
  Numbers numbers;
  for (int64_t i = 0; i < n; i++) {
    const Triple t = {{w[3 * i], w[3 * i + 1], w[3 * i + 2]}};
    const auto found = numbers.find(t);
    work.classes[i] = found != numbers.end() ? found->second : int32_t(numbers.size());
    if (found == numbers.end()) numbers[t] = work.classes[i];
  }
  return int64_t(numbers.size());
}

// From candidates of wrapped atoms to images of the atoms where they are: (atom, shift), each once for a class of centres.
void name_images(int64_t n, Workspace& work, List& list) {
  const int64_t n_classes = classify(n, work), m = work.n_candidates, n_edges = int64_t(list.edge.size());
  const bool table = n_classes * m <= 4 * (n_edges + m);
  list.image_atom.clear(), list.image_shift.clear(), list.shifts.clear();
  ShiftNumbers number_of(n, work, list.shifts);
  auto add = [&](int64_t center, int64_t candidate) {
    const int32_t j = work.atom[candidate];
    Triple s;
    for (int k = 0; k < 3; k++) s.at[k] = work.image[3 * candidate + k] + work.wraps[3 * center + k] - work.wraps[3 * j + k];
    list.image_atom.push_back(j);
    list.image_shift.push_back(number_of(s));
    if (int64_t(list.image_atom.size()) > LARGEST) throw std::bad_alloc();
    return int32_t(list.image_atom.size() - 1);
  };
  if (!table) {
    for (int64_t c = 0; c < n; c++)
      for (int64_t k = list.ptr[c]; k < list.ptr[c + 1]; k++) list.edge[k] = add(c, list.edge[k]);
    return;
  }
  // which are used, and by which centre first; then numbers in the order of candidates
  std::vector<int32_t>& number = work.number;
  number.assign(n_classes * m, -1);
  for (int64_t c = 0; c < n; c++)
    for (int64_t k = list.ptr[c]; k < list.ptr[c + 1]; k++) number[list.edge[k] * n_classes + work.classes[c]] = int32_t(c);
  for (int64_t k = 0; k < n_classes * m; k++)
    if (number[k] >= 0) number[k] = add(number[k], k / n_classes);
  for (int64_t c = 0; c < n; c++)
    for (int64_t k = list.ptr[c]; k < list.ptr[c + 1]; k++) list.edge[k] = number[list.edge[k] * n_classes + work.classes[c]];
}

}  // namespace

Failure search(const double* positions, int64_t n, const double* cell, const uint8_t* pbc, double reach, List& list,
               Workspace& work, int64_t& atom) {
  for (int64_t k = 0; k < 3 * n; k++)
    if (!std::isfinite(positions[k])) {
      atom = k / 3;
      return NOT_FINITE;
    }
  Frame frame;
  if (!make_frame(cell, pbc, frame)) return BAD_CELL;
  if (!wrap(positions, n, pbc, frame, work, atom)) return TOO_FAR;
  list.widest = 0;
  if (n == 0) {
    list.ptr.assign(1, 0);
    list.edge.clear(), list.image_atom.clear(), list.image_shift.clear(), list.shifts.clear();
  } else {
    list_candidates(n, pbc, frame, reach, work);
    if (n * work.n_candidates <= COMPARE_ALL) compare_all(n, reach, work, list);
    else look_up(n, reach, work, list);
    name_images(n, work, list);
    for (int64_t c = 0; c < n; c++) list.widest = std::max(list.widest, list.ptr[c + 1] - list.ptr[c]);
  }
  list.positions.assign(positions, positions + 3 * n);
  std::memcpy(list.cell, cell, sizeof list.cell);
  std::memcpy(list.pbc, pbc, sizeof list.pbc);
  list.searched = true;
  return NONE;
}

}  // namespace carryall
