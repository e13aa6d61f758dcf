// SPDX-License-Identifier: GPL-2.0-only
// A packed potential as carryall writes it: its facts, and a copy of its program that holds nothing but what was verified.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace carryall {

struct Facts {
  std::string path;
  double cutoff = 0;    // Å
  std::vector<std::string> type_map, inputs, outputs;
  bool message_passing = false;
  int64_t block_edges = 0;    // 0: everything in one call
};

// A folder of this process alone, removed with what is in it
class PrivateFolder {
 public:
  PrivateFolder();
  ~PrivateFolder();
  PrivateFolder(const PrivateFolder &) = delete;
  PrivateFolder &operator=(const PrivateFolder &) = delete;
  std::string path;
};

// Check every entry of a .pt2 against the manifest, and that it runs here; write what torch needs of it to `copy`, where its
// exchanges are the ops of `ops`. std::runtime_error says what is wrong and what to do.
Facts verified_copy(const std::string &path, const std::string &copy, const std::string &ops);

}    // namespace carryall
