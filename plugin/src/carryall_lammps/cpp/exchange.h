// SPDX-License-Identifier: GPL-2.0-only
// What the ops of a program ask for, and who does it.
#pragma once

#include <cstddef>
#include <string>

namespace carryall {

// Adds `bytes` bytes of one buffer to another, element by element
using Add = void (*)(void *into, const void *from, size_t bytes);

enum class Number { F64, F32, I64, I32, I16, I8, U8 };

// Doubles of an atom that travel in one message; wider rows go in several
constexpr int WIDTH = 64;

// Rows of atoms between ranks. Both buffers have one row of `words` doubles (at most WIDTH) for each local and ghost atom; bits
// travel as they are.
class Swap {
 public:
  virtual ~Swap() = default;
  virtual int n_local() const = 0;
  virtual int n_ghost() const = 0;
  virtual void to_ghosts(double *rows, int words) = 0;
  virtual void to_owners(double *rows, int words, Add add) = 0;
  virtual void sum(void *values, size_t count, Number kind) = 0;

  // The error of an op, which compiled code does not hand on
  std::string failure;
};

// Register exchange_forward, exchange_reverse and all_reduce, once, and return the namespace that they are in
const std::string &registered_ops();

}    // namespace carryall
