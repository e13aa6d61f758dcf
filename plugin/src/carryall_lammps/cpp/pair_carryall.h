// SPDX-License-Identifier: GPL-2.0-only
// pair_style carryall model.pt2, pair_coeff * * Cu Au: a packed potential across the ranks of LAMMPS.
#pragma once

#include "pair.h"

#include "model.h"

#include <memory>
#include <string>
#include <vector>

namespace LAMMPS_NS {

class PairCarryall : public Pair, public carryall::Swap {
 public:
  explicit PairCarryall(LAMMPS *);
  ~PairCarryall() noexcept override;

  void compute(int, int) override;
  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override;
  double memory_usage() override;

  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

  int n_local() const override;
  int n_ghost() const override;
  void to_ghosts(double *, int) override;
  void to_owners(double *, int, carryall::Add) override;
  void sum(void *, size_t, carryall::Number) override;

 private:
  std::unique_ptr<carryall::Model> model_;
  std::vector<int64_t> type_of_;    // index into the type map of each LAMMPS type, -1 where it has none
  carryall::Edges edges_;
  std::vector<int64_t> types_, star_types_;
  // what this rank adds to its atoms and ghosts, in eV and Å
  std::vector<double> energy_, forces_, site_virial_, site_centroid_;
  double virial_[6] = {};

  // of the exchange that is under way
  double *rows_ = nullptr;
  int words_ = 0;
  carryall::Add add_ = nullptr;

  void allocate();
  double unit() const;
  void check_lists();
  void add_edges(int);
  void evaluate_whole();
  void evaluate_blocks();
  void evaluate_block(const int *, int);
  void add_edge(int, int, const double *, const double *);
  void add_site_virials(int, int, const double *, const double *);
  void fold(std::vector<double> &, int);
  void check_numbers();
  void hand_over();
  void refuse_together(const std::string &);
  [[noreturn]] void fail(const std::string &);
};

}    // namespace LAMMPS_NS
