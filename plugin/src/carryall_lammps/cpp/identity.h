// SPDX-License-Identifier: GPL-2.0-only
// Which build of a shared library is loaded: its build id, or where it has none its size and the CRC-32 of its first MiB.
// build.py does the same with the files.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

namespace carryall {

struct Loaded {
  std::string path, id;
};

inline std::string identity_of_file(const std::string &path)
{
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return "unknown";
  const long long size = file.tellg();
  std::vector<unsigned char> start(static_cast<size_t>(size < (1 << 20) ? size : (1 << 20)));
  file.seekg(0);
  file.read(reinterpret_cast<char *>(start.data()), static_cast<std::streamsize>(start.size()));
  uint32_t crc = 0xFFFFFFFFu;
  for (const unsigned char byte : start) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
  }
  char text[64];
  std::snprintf(text, sizeof text, "size %lld crc %08x", size, crc ^ 0xFFFFFFFFu);
  return text;
}

inline std::string build_id(const dl_phdr_info &info)
{
  for (int k = 0; k < info.dlpi_phnum; ++k) {
    const auto &segment = info.dlpi_phdr[k];
    if (segment.p_type != PT_NOTE) continue;
    const size_t align = segment.p_align == 8 ? 8 : 4;
    const auto padded = [align](size_t size) { return (size + align - 1) / align * align; };
    const auto *place = reinterpret_cast<const unsigned char *>(info.dlpi_addr + segment.p_vaddr);
    const auto *end = place + segment.p_memsz;
    while (place + sizeof(ElfW(Nhdr)) <= end) {
      ElfW(Nhdr) note;
      std::memcpy(&note, place, sizeof note);
      const auto *name = place + sizeof note;
      const auto *data = name + padded(note.n_namesz);
      if (data + note.n_descsz > end) break;
      if (note.n_type == NT_GNU_BUILD_ID && note.n_namesz == 4 && !std::memcmp(name, "GNU", 4)) {
        std::string id = "build id ";
        for (size_t byte = 0; byte < note.n_descsz; ++byte) {
          char digits[3];
          std::snprintf(digits, sizeof digits, "%02x", data[byte]);
          id += digits;
        }
        return id;
      }
      place = data + padded(note.n_descsz);
    }
  }
  return "";
}

struct Question {
  const void *address;
  const char *name;
  Loaded answer;
};

inline int look_at(dl_phdr_info *info, size_t, void *data)
{
  auto *question = static_cast<Question *>(data);
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  bool found = false;
  if (question->name) {
    const auto slash = path.rfind('/');
    found = path.compare(slash == std::string::npos ? 0 : slash + 1, std::string::npos, question->name) == 0;
  } else {
    const auto wanted = reinterpret_cast<ElfW(Addr)>(question->address);
    for (int k = 0; k < info->dlpi_phnum; ++k) {
      const auto &segment = info->dlpi_phdr[k];
      const auto begin = info->dlpi_addr + segment.p_vaddr;
      if (segment.p_type == PT_LOAD && begin <= wanted && wanted < begin + segment.p_memsz) found = true;
    }
  }
  if (!found) return 0;
  question->answer = {path, build_id(*info)};
  if (question->answer.id.empty()) question->answer.id = identity_of_file(path);
  return 1;
}

// The library that holds an address
inline Loaded loaded_at(const void *address)
{
  Question question{address, nullptr, {}};
  dl_iterate_phdr(look_at, &question);
  return question.answer;
}

// The library of that file name, with an empty path where none is loaded
inline Loaded loaded_as(const char *name)
{
  Question question{nullptr, name, {}};
  dl_iterate_phdr(look_at, &question);
  return question.answer;
}

}    // namespace carryall
