// Neighbour lists that live for many calls, one for each system.
#pragma once

#include <memory>
#include <unordered_map>

#include "common.h"
#include "pack.h"

namespace carryall {

constexpr double COINCIDENT = 1e-6;  // Å, as in carryall/graph/neighbor_graph.py
constexpr double WIDER = 1 + 1e-8;   // as in carryall/graph/neighbor_search.py

enum Failure : int32_t { NONE = 0, NOT_FINITE = 1, BAD_CELL = 2, COINCIDE = 3, TOO_FAR = 4 };

// All edges of one system within cutoff + skin. An edge is an image: a neighbour and whole lattice vectors. The edges of centre
// c are edge[ptr[c]] to edge[ptr[c + 1] - 1], in the order of neighbour and shift.
struct List {
  std::vector<double> positions;  // as searched
  double cell[9];
  uint8_t pbc[3];
  std::vector<int64_t> ptr;
  std::vector<int32_t> edge;
  std::vector<int32_t> image_atom;
  std::vector<int32_t> image_shift;  // which of `shifts`
  std::vector<int32_t> shifts;       // three numbers each
  int64_t widest = 0;                // edges of the centre that has most
  uint64_t last_used = 0;
  bool searched = false;

  int64_t n_atoms() const { return int64_t(positions.size()) / 3; }
  int64_t n_images() const { return int64_t(image_atom.size()); }
};

// Where the images of a list are now: 4 numbers each, the last unused. The sums are those of `edge_vectors`.
struct Images {
  std::vector<double> at, vectors;

  void place(const List& list, const double* positions, const double* cell);
};

// What a search needs beside its result; kept from search to search.
struct Workspace {
  std::vector<double> fractional, wrapped, x, y, z, row_x, row_y, row_z;
  std::vector<int32_t> wraps, atom, image, self, found, row_atom, number, classes;
  std::vector<int64_t> count, first, start, key, order;
  int64_t n_candidates = 0;  // their x, y, z, atom and image may have room for more

  void make_room(int64_t size) {
    if (int64_t(found.size()) < size) found.resize(std::max(size, 2 * int64_t(found.size())));
  }

  void grow(size_t candidates) {
    if (x.size() >= candidates) return;
    const size_t size = std::max(candidates, 2 * x.size());
    for (auto* one : {&x, &y, &z}) one->resize(size);
    atom.resize(size), image.resize(3 * size);
  }
};

// Fills `list` for these positions (n, 3), or says why there is none; `atom` is the one to blame.
Failure search(const double* positions, int64_t n, const double* cell, const uint8_t* pbc, double reach, List& list,
               Workspace& work, int64_t& atom);

struct Problem {
  Failure failure = NONE;
  int64_t first = 0, second = 0;
  double distance = 0;
};

// The closest pair of a list, as the problem that two atoms coincide.
Problem closest(const List& list, const Images& images, const double* positions);

// The systems of one call.
struct Call {
  int64_t n_systems;
  const int64_t* ptr;
  const int64_t* ids;  // null: by place
  const double* positions;
  const double* cell;
  const uint8_t* pbc;
  int64_t threads;
};

struct Key {
  int64_t id, copy;  // copy: systems of the call before this one with the same id
  bool operator==(const Key& other) const { return id == other.id && copy == other.copy; }
};

struct KeyHash {
  size_t operator()(const Key& key) const { return std::hash<int64_t>()(key.id) * 1000003u + size_t(key.copy); }
};

// Of one thread, for an evaluation.
struct Scratch {
  Images images;
  Packed packed;
  std::vector<double> parameters[3];
};

class Lists {
 public:
  Lists(double cutoff, double skin, double limit) : cutoff(cutoff), skin(skin), limit(limit) {}

  // Lists of the call's systems, right for their positions; the number of systems that have none.
  int64_t update(const Call& call);
  const List& list(int64_t system) const { return *current_[system]; }
  int64_t kept() const { return int64_t(lists_.size()); }

  std::vector<Scratch>& scratch(int64_t threads) {
    if (int64_t(scratch_.size()) < threads) scratch_.resize(size_t(threads));
    return scratch_;
  }

  const double cutoff, skin, limit;  // limit: the cutoff squared
  int64_t n_searches = 0;
  std::vector<Problem> problems;  // one for each system of the call

 private:
  void resolve(const Call& call);
  std::vector<int64_t> stale(const Call& call) const;
  void forget(const Call& call);

  std::unordered_map<Key, std::unique_ptr<List>, KeyHash> lists_;
  std::vector<List*> current_;
  std::vector<int64_t> last_ids_, last_ptr_;
  bool last_by_place_ = false, resolved_ = false;
  uint64_t calls_ = 0;
  std::vector<Workspace> workspaces_;
  std::vector<Scratch> scratch_;
};

}  // namespace carryall
