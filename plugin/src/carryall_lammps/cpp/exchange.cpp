// SPDX-License-Identifier: GPL-2.0-only
// The ops by which a program exchanges rows between ranks, done by LAMMPS' own communication. The handle of a call is the address
// of the Swap that does it. They are in a namespace of this very build: carryall's own may be there as well.
#include "exchange.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace carryall {

namespace {

using at::Tensor;

Swap &swap_of(const Tensor &handle)
{
  return *reinterpret_cast<Swap *>(handle.item<int64_t>());
}

template <typename T> void add(void *into, const void *from, size_t bytes)
{
  auto *sums = static_cast<T *>(into);
  const auto *values = static_cast<const T *>(from);
  for (size_t k = 0; k < bytes / sizeof(T); ++k) sums[k] = static_cast<T>(sums[k] + values[k]);
}

void either(void *into, const void *from, size_t bytes)
{
  auto *sums = static_cast<unsigned char *>(into);
  const auto *values = static_cast<const unsigned char *>(from);
  for (size_t k = 0; k < bytes; ++k) sums[k] = sums[k] || values[k];
}

Add add_for(at::ScalarType type)
{
  Add found = nullptr;
  if (type == at::kBool) return either;
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX_AND2(at::kHalf, at::kBFloat16, type, "exchange_reverse", [&] { found = add<scalar_t>; });
  return found;
}

void check(const Swap &swap, const Tensor &local, const Tensor &ghost, const Tensor &rows, int64_t expected)
{
  TORCH_CHECK(local.size(0) == swap.n_local() && ghost.size(0) == swap.n_ghost(), "the program was called for ", local.size(0),
              " local and ", ghost.size(0), " ghost atoms, but LAMMPS has ", swap.n_local(), " and ", swap.n_ghost());
  TORCH_CHECK(rows.dim() > 0 && rows.size(0) == expected, "rows to exchange: expected ", expected);
  TORCH_CHECK(rows.is_cpu(), "rows to exchange have to be on the CPU");
}

Tensor like(const Tensor &rows, int64_t n)
{
  auto shape = rows.sizes().vec();
  shape[0] = n;
  return at::empty(shape, rows.options());
}

size_t row_bytes(const Tensor &rows)
{
  size_t width = rows.element_size();
  for (int64_t k = 1; k < rows.dim(); ++k) width *= static_cast<size_t>(rows.size(k));
  return width;
}

// `step` with each piece of the rows of `from`, atoms begin to begin + n, in a buffer for all atoms, and from it to `to`
template <typename Step>
void in_pieces(const Swap &swap, const Tensor &from, int64_t from_atom, const Tensor &to, int64_t to_atom, Step step)
{
  const size_t width = row_bytes(from);
  std::vector<double> buffer;
  for (size_t begin = 0; begin < width; begin += WIDTH * sizeof(double)) {
    const size_t bytes = std::min(width - begin, WIDTH * sizeof(double)), words = (bytes + sizeof(double) - 1) / sizeof(double);
    buffer.assign(words * static_cast<size_t>(swap.n_local() + swap.n_ghost()), 0.0);
    const auto *source = static_cast<const char *>(from.const_data_ptr()) + begin;
    for (int64_t k = 0; k < from.size(0); ++k) std::memcpy(buffer.data() + (from_atom + k) * words, source + k * width, bytes);
    step(buffer.data(), static_cast<int>(words));
    auto *target = static_cast<char *>(to.data_ptr()) + begin;
    for (int64_t k = 0; k < to.size(0); ++k) std::memcpy(target + k * width, buffer.data() + (to_atom + k) * words, bytes);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor &rows, const Tensor &local, const Tensor &ghost, const Tensor &handle, const Tensor &token)
{
  Swap &swap = swap_of(handle);
  try {
    check(swap, local, ghost, rows, swap.n_local());
    const Tensor out = like(rows, swap.n_ghost());
    in_pieces(swap, rows.contiguous(), 0, out, swap.n_local(), [&](double *buffer, int words) { swap.to_ghosts(buffer, words); });
    return {out, token.clone()};
  } catch (const c10::Error &error) {
    swap.failure = error.what_without_backtrace();
    throw;
  }
}

std::tuple<Tensor, Tensor> reverse(const Tensor &rows, const Tensor &local, const Tensor &ghost, const Tensor &handle, const Tensor &token)
{
  Swap &swap = swap_of(handle);
  try {
    check(swap, local, ghost, rows, swap.n_ghost());
    const Tensor out = like(rows, swap.n_local());
    const Add sum = add_for(rows.scalar_type());
    in_pieces(swap, rows.contiguous(), swap.n_local(), out, 0,
              [&](double *buffer, int words) { swap.to_owners(buffer, words, sum); });
    return {out, token.clone()};
  } catch (const c10::Error &error) {
    swap.failure = error.what_without_backtrace();
    throw;
  }
}

std::tuple<Tensor, Tensor> all_reduce(const Tensor &values, const Tensor &handle, const Tensor &token)
{
  Swap &swap = swap_of(handle);
  const auto type = values.scalar_type();
  // sums of half precision, which MPI does not know, in single; of truths in whole numbers
  const bool narrow = type == at::kHalf || type == at::kBFloat16;
  const Tensor out = values.to(narrow ? at::kFloat : type == at::kBool ? at::kInt : type).contiguous().clone();
  const auto count = static_cast<size_t>(out.numel());
  void *data = out.data_ptr();
  switch (out.scalar_type()) {
    case at::kDouble: swap.sum(data, count, Number::F64); break;
    case at::kComplexDouble: swap.sum(data, 2 * count, Number::F64); break;
    case at::kFloat: swap.sum(data, count, Number::F32); break;
    case at::kComplexFloat: swap.sum(data, 2 * count, Number::F32); break;
    case at::kLong: swap.sum(data, count, Number::I64); break;
    case at::kInt: swap.sum(data, count, Number::I32); break;
    case at::kShort: swap.sum(data, count, Number::I16); break;
    case at::kChar: swap.sum(data, count, Number::I8); break;
    case at::kByte: swap.sum(data, count, Number::U8); break;
    default:
      swap.failure = std::string("all_reduce cannot sum values of type ") + c10::toString(type);
      TORCH_CHECK(false, swap.failure);
  }
  return {out.to(type), token.clone()};
}

}    // namespace

const std::string &registered_ops()
{
  static const std::string name = "carryall_lammps_" CARRYALL_BUILD;
  // never freed: programs may hold the ops until the process ends
  [[maybe_unused]] static const auto *library = [] {
    auto *made = new torch::Library(torch::Library::DEF, name, std::nullopt, __FILE__, __LINE__);
    const std::string rows = "(Tensor rows, Tensor local, Tensor ghost, Tensor handle, Tensor token) -> (Tensor, Tensor)";
    made->def(("exchange_forward" + rows).c_str());
    made->def(("exchange_reverse" + rows).c_str());
    made->def("all_reduce(Tensor values, Tensor handle, Tensor token) -> (Tensor, Tensor)");
    made->impl("exchange_forward", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(forward)));
    made->impl("exchange_reverse", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(reverse)));
    made->impl("all_reduce", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(all_reduce)));
    return made;
  }();
  return name;
}

}    // namespace carryall
