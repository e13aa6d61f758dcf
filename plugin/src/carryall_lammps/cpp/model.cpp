// SPDX-License-Identifier: GPL-2.0-only
#include "model.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <unordered_map>

namespace carryall {

namespace {

using at::Tensor;

Tensor view(const double *values, at::IntArrayRef shape)
{
  return at::from_blob(const_cast<double *>(values), shape, at::kDouble);
}

Tensor view(const int64_t *values, at::IntArrayRef shape)
{
  return at::from_blob(const_cast<int64_t *>(values), shape, at::kLong);
}

}    // namespace

void Edges::clear()
{
  ptr.assign(1, 0);
  center.clear();
  neighbor.clear();
  vectors.clear();
  max_degree = 0;
}

struct Model::Parts {
  Facts facts;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
  std::vector<Tensor> outputs;
  // constants of which each call takes as many rows as it needs
  Tensor count, zeros, no_shift, every;
  std::vector<double> star_positions;

  void reserve(int64_t rows)
  {
    if (count.defined() && count.size(0) >= rows) return;
    const int64_t size = std::max<int64_t>(rows + rows / 2, 1024);
    count = at::arange(size, at::kLong);
    zeros = at::zeros({size}, at::kLong);
    no_shift = at::zeros({size, 3}, at::kInt);
    every = at::ones({size}, at::kBool);
  }

  // Outputs that are no numbers of that size would be read beyond their end
  const double *output(const char *name, int64_t size)
  {
    const auto place = std::find(facts.outputs.begin(), facts.outputs.end(), name) - facts.outputs.begin();
    auto &found = outputs.at(static_cast<size_t>(place));
    found = found.contiguous();
    if (found.scalar_type() != at::kDouble || found.numel() != size)
      throw std::runtime_error(facts.path + ": its " + name + " has not the type or size that its metadata says");
    return found.const_data_ptr<double>();
  }

  void run(const std::unordered_map<std::string, Tensor> &values)
  {
    std::vector<Tensor> inputs;
    for (const auto &name : facts.inputs) inputs.push_back(values.at(name));
    outputs = loader->run(inputs);
    if (outputs.size() != facts.outputs.size()) throw std::runtime_error(facts.path + ": the program gives other outputs than its metadata says");
  }
};

Model::Model(const std::string &path) : parts_(std::make_unique<Parts>())
{
  // ranks share the cores of a machine
  if (!std::getenv("OMP_NUM_THREADS")) at::set_num_threads(1);
  const c10::InferenceMode guard;
  const PrivateFolder folder;
  const std::string copy = folder.path + "/model.pt2";
  parts_->facts = verified_copy(path, copy, registered_ops());
  try {
    parts_->loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(copy, "model", false, 1, -1);
  } catch (const std::exception &error) {
    const auto *ours = dynamic_cast<const c10::Error *>(&error);
    const std::string text = ours ? ours->what_without_backtrace() : error.what();
    throw std::runtime_error(path + ": its compiled part cannot be loaded (" + text.substr(0, text.find('\n')) +
                             "): carryall rebuild OLD.pt2 NEW.pt2");
  }
  // glibc gives large pieces back to the system, and each block would fault them in again, until a larger one was freed
  at::empty({31 << 20}, at::kByte);
}

Model::~Model() = default;

const Facts &Model::facts() const
{
  return parts_->facts;
}

Found Model::whole(int64_t n_local, int64_t n_atoms, const double *positions, const int64_t *types, const double *cell,
                   const Edges &edges, Swap &swap)
{
  Parts &it = *parts_;
  const c10::InferenceMode guard;
  const int64_t n = edges.size();
  it.reserve(std::max({n, n_atoms, edges.max_degree}));
  const int64_t address = reinterpret_cast<int64_t>(&swap);
  swap.failure.clear();
  try {
    it.run({{"positions", view(positions, {n_atoms, 3})},
            {"atom_types", view(types, {n_atoms})},
            {"system", it.zeros.narrow(0, 0, n_atoms)},
            {"cell", view(cell, {1, 3, 3})},
            {"edge_center", view(edges.center.data(), {n})},
            {"edge_neighbor", view(edges.neighbor.data(), {n})},
            {"edge_shift", it.no_shift.narrow(0, 0, n)},
            {"edge_mask", it.every.narrow(0, 0, n)},
            {"ptr", view(edges.ptr.data(), {n_local + 1})},
            {"local", it.count.narrow(0, 0, n_local)},
            {"rank", it.count.narrow(0, 0, edges.max_degree)},
            {"ghost", it.count.narrow(0, n_local, n_atoms - n_local)},
            {"exchange_handle", view(&address, {1})},
            {"exchange_token", at::zeros({1}, at::kDouble)}});
  } catch (const std::exception &error) {
    throw std::runtime_error(it.facts.path + " failed: " + (swap.failure.empty() ? error.what() : swap.failure));
  }
  return {it.output("atomic_energy", n_local), it.output("edge_gradient", 3 * n), it.output("forces", 3 * n_atoms),
          it.output("virial", 9)};
}

Found Model::star(int64_t n_centers, const int64_t *types, const Edges &edges)
{
  Parts &it = *parts_;
  const c10::InferenceMode guard;
  const int64_t n = edges.size(), n_atoms = n_centers + n;
  it.reserve(std::max(n_atoms, edges.max_degree));
  it.star_positions.assign(static_cast<size_t>(3 * n_centers), 0.0);
  it.star_positions.insert(it.star_positions.end(), edges.vectors.begin(), edges.vectors.end());
  try {
    it.run({{"positions", view(it.star_positions.data(), {n_atoms, 3})},
            {"atom_types", view(types, {n_atoms})},
            {"system", it.zeros.narrow(0, 0, n_atoms)},
            {"cell", at::zeros({1, 3, 3}, at::kDouble)},
            {"edge_center", view(edges.center.data(), {n})},
            {"edge_neighbor", it.count.narrow(0, n_centers, n)},
            {"edge_shift", it.no_shift.narrow(0, 0, n)},
            {"edge_mask", it.every.narrow(0, 0, n)},
            {"ptr", view(edges.ptr.data(), {n_centers + 1})},
            {"local", it.count.narrow(0, 0, n_centers)},
            {"rank", it.count.narrow(0, 0, edges.max_degree)}});
  } catch (const std::exception &error) {
    throw std::runtime_error(it.facts.path + " failed: " + error.what());
  }
  return {it.output("atomic_energy", n_centers), it.output("edge_gradient", 3 * n), nullptr, nullptr};
}

}    // namespace carryall
