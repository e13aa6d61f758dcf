// SPDX-License-Identifier: GPL-2.0-only
#include "pair_carryall.h"

#include "atom.h"
#include "comm.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neighbor.h"
#include "update.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace LAMMPS_NS;

static constexpr double KCAL_PER_MOL = 23.060548012069493;    // of an eV: CODATA 2014, as everywhere in carryall
static constexpr int GIVEN_BACK = 9;                          // numbers of a ghost that `fold` sends, at most
static const std::string WHO = "Pair style carryall: ";

PairCarryall::PairCarryall(LAMMPS *lmp) : Pair(lmp)
{
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  reinitflag = 0;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_AVAIL;
}

PairCarryall::~PairCarryall() noexcept
{
  if (copymode || !allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
}

void PairCarryall::allocate()
{
  const int n = atom->ntypes + 1;
  if (!allocated) {
    memory->create(setflag, n, n, "pair:setflag");
    memory->create(cutsq, n, n, "pair:cutsq");
    allocated = 1;
  }
  for (int i = 1; i < n; ++i)
    for (int j = 1; j < n; ++j) setflag[i][j] = 0;
}

// -- settings

void PairCarryall::settings(int narg, char **arg)
{
  if (narg != 1)
    error->all(FLERR, WHO + "expected one word, the file, as in `pair_style carryall model.pt2`, got " + std::to_string(narg));
  unit();
  std::string problem;
  try {
    model_.reset();
    model_ = std::make_unique<carryall::Model>(arg[0]);
  } catch (const std::exception &failed) {
    problem = failed.what();
  }
  refuse_together(problem);
  // LAMMPS makes its buffers once for all, of this width: for messages, and for what ghosts give back with newton off
  const bool messages = model_->facts().message_passing;
  comm_forward = messages ? carryall::WIDTH : 0;
  comm_reverse = comm_reverse_off = messages ? carryall::WIDTH : GIVEN_BACK;
}

void PairCarryall::coeff(int narg, char **arg)
{
  const auto &known = model_->facts().type_map;
  const int ntypes = atom->ntypes;
  if (narg != 2 + ntypes || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0)
    error->all(FLERR, WHO + "write `pair_coeff * *` and one element for each of the " + std::to_string(ntypes) +
                   " atom types, as in `pair_coeff * * Cu Au`, got " + std::to_string(std::max(narg - 2, 0)) + " elements");
  type_of_.assign(ntypes + 1, -1);
  allocate();
  for (int type = 1; type <= ntypes; ++type) {
    const std::string element = arg[1 + type];
    const auto place = std::find(known.begin(), known.end(), element);
    if (place != known.end()) {
      type_of_[type] = place - known.begin();
    } else if (element != "NULL") {
      std::string names;
      for (const auto &name : known) names += " " + name;
      error->all(FLERR, WHO + "the model " + model_->facts().path + " does not know the element " + element + "; it knows" + names);
    } else if (model_->facts().message_passing) {
      error->all(FLERR, WHO + "NULL, but the model passes messages between all atoms: give every atom type an element");
    }
  }
  int count = 0;
  for (int i = 1; i <= ntypes; ++i)
    for (int j = i; j <= ntypes; ++j)
      if (type_of_[i] >= 0 && type_of_[j] >= 0) setflag[i][j] = 1, ++count;
  if (!count) error->all(FLERR, WHO + "pair_coeff names no element but NULL");
}

// eV in LAMMPS' unit of energy
double PairCarryall::unit() const
{
  if (!strcmp(update->unit_style, "metal")) return 1.0;
  if (!strcmp(update->unit_style, "real")) return KCAL_PER_MOL;
  error->all(FLERR, WHO + "units " + update->unit_style + ", but it knows those of metal and real: write `units metal`");
}

void PairCarryall::init_style()
{
  unit();
  if (domain->dimension != 3)
    error->all(FLERR, WHO + "dimension 2, but its models are made for three: use dimension 3, with boundary p p f for a layer");
  if (tail_flag || offset_flag)
    error->all(FLERR, WHO + "pair_modify tail and shift have no meaning for a learned potential: leave them out");
  neighbor->add_request(this, NeighConst::REQ_FULL);
}

double PairCarryall::init_one(int, int)
{
  return model_->facts().cutoff;
}

// Pairs that LAMMPS leaves out of its lists would be missing from the energy
void PairCarryall::check_lists()
{
  if (neighbor->exclude_setting())
    error->all(FLERR, WHO + "neigh_modify exclude takes pairs out of the neighbour lists that the energy depends on: leave it out");
  if (neighbor->includegroup)
    error->all(FLERR, WHO + "neigh_modify include takes atoms out of the neighbour lists that the energy depends on: leave it out");
  if (atom->molecular == Atom::ATOMIC || (atom->molecular != Atom::TEMPLATE && !atom->nbonds)) return;
  for (int k = 1; k <= 3; ++k)
    if (neighbor->special_flag[k] == 0)
      error->all(FLERR, WHO + "special_bonds takes bonded pairs out of the neighbour lists that the energy depends on: write "
                     "`special_bonds lj/coul 1.0 1.0 1.0`");
}

// -- exchanges

int PairCarryall::n_local() const
{
  return atom->nlocal;
}

int PairCarryall::n_ghost() const
{
  return atom->nghost;
}

void PairCarryall::to_ghosts(double *rows, int words)
{
  rows_ = rows, words_ = words;
  comm->forward_comm(this, words);
}

void PairCarryall::to_owners(double *rows, int words, carryall::Add add)
{
  rows_ = rows, words_ = words, add_ = add;
  comm->reverse_comm(this, words);
}

// Rows of ghosts are sent on to other ranks too, so both directions go through rows of all atoms
int PairCarryall::pack_forward_comm(int n, int *atoms, double *buffer, int, int *)
{
  for (int k = 0; k < n; ++k)
    std::memcpy(buffer + static_cast<size_t>(k) * words_, rows_ + static_cast<size_t>(atoms[k]) * words_, words_ * sizeof(double));
  return n * words_;
}

void PairCarryall::unpack_forward_comm(int n, int first, double *buffer)
{
  if (n) std::memcpy(rows_ + static_cast<size_t>(first) * words_, buffer, static_cast<size_t>(n) * words_ * sizeof(double));
}

int PairCarryall::pack_reverse_comm(int n, int first, double *buffer)
{
  if (n) std::memcpy(buffer, rows_ + static_cast<size_t>(first) * words_, static_cast<size_t>(n) * words_ * sizeof(double));
  return n * words_;
}

void PairCarryall::unpack_reverse_comm(int n, int *atoms, double *buffer)
{
  for (int k = 0; k < n; ++k)
    add_(rows_ + static_cast<size_t>(atoms[k]) * words_, buffer + static_cast<size_t>(k) * words_, words_ * sizeof(double));
}

void PairCarryall::sum(void *values, size_t count, carryall::Number kind)
{
  using carryall::Number;
  const auto type = [kind] {
    switch (kind) {
      case Number::F64: return MPI_DOUBLE;
      case Number::F32: return MPI_FLOAT;
      case Number::I64: return MPI_INT64_T;
      case Number::I32: return MPI_INT32_T;
      case Number::I16: return MPI_INT16_T;
      case Number::I8: return MPI_INT8_T;
      default: return MPI_UINT8_T;
    }
  }();
  static const int sizes[] = {8, 4, 8, 4, 2, 1, 1};
  auto *place = static_cast<char *>(values);
  for (size_t done = 0; done < count;) {
    const int part = static_cast<int>(std::min<size_t>(count - done, 1 << 28));
    // summed on one rank, so that no rank can round in another order
    MPI_Reduce(comm->me ? place : MPI_IN_PLACE, comm->me ? nullptr : place, part, type, MPI_SUM, 0, world);
    MPI_Bcast(place, part, type, 0, world);
    done += part;
    place += static_cast<size_t>(part) * sizes[static_cast<int>(kind)];
  }
}

// -- errors

// What is wrong on one rank is an error of all; collective
void PairCarryall::refuse_together(const std::string &problem)
{
  int mine = problem.empty() ? comm->nprocs : comm->me, first = 0;
  MPI_Allreduce(&mine, &first, 1, MPI_INT, MPI_MIN, world);
  if (first == comm->nprocs) return;
  std::string text = problem;
  int size = static_cast<int>(text.size());
  MPI_Bcast(&size, 1, MPI_INT, first, world);
  text.resize(size);
  MPI_Bcast(text.data(), size, MPI_CHAR, first, world);
  error->all(FLERR, WHO + text);
}

void PairCarryall::fail(const std::string &problem)
{
  if (comm->nprocs == 1) error->one(FLERR, WHO + problem);
  // the other ranks may wait in an exchange, and an exception on this one would not reach them
  std::fflush(screen);
  std::fprintf(stderr, "ERROR on proc %d: %s%s\n", comm->me, WHO.c_str(), problem.c_str());
  std::fflush(stderr);
  if (logfile) {
    std::fprintf(logfile, "ERROR on proc %d: %s%s\n", comm->me, WHO.c_str(), problem.c_str());
    std::fflush(logfile);
  }
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::abort();
}

double PairCarryall::memory_usage()
{
  const size_t numbers = edges_.ptr.capacity() + edges_.center.capacity() + edges_.neighbor.capacity() + edges_.vectors.capacity() +
      types_.capacity() + star_types_.capacity() + energy_.capacity() + forces_.capacity() + site_virial_.capacity() +
      site_centroid_.capacity();
  return Pair::memory_usage() + 8.0 * static_cast<double>(numbers);
}

extern "C" __attribute__((visibility("default"))) void *carryall_new_pair(void *lmp)
{
  return static_cast<Pair *>(new PairCarryall(static_cast<LAMMPS *>(lmp)));
}
