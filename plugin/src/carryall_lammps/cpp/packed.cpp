// SPDX-License-Identifier: GPL-2.0-only
#include "packed.h"

#include "json.h"
#include "sha256.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/version.h>

#include <sys/utsname.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <utility>

namespace carryall {

namespace {

constexpr int FORMAT = 2;
constexpr std::pair<int, int> OLDEST{2, 11}, NEWEST{2, 13};    // of torch, between which compiled programs are exchangeable
constexpr int64_t LARGEST_JSON = 1 << 22;
const std::string EXTRA = "extra/", MANIFEST = "extra/manifest.json", SIGNATURE = "extra/signature.json";
const std::vector<std::string> PLAIN = {"positions", "atom_types", "system", "cell", "edge_center", "edge_neighbor",
                                        "edge_shift", "edge_mask", "ptr", "local", "rank"};
const std::vector<std::string> OF_EXCHANGE = {"ghost", "exchange_handle", "exchange_token"};
const std::vector<std::string> NEEDED = {"atomic_energy", "forces", "virial", "edge_gradient"};
const std::array<const char *, 3> OPS = {"exchange_forward", "exchange_reverse", "all_reduce"};

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string quoted(const std::string &word)
{
  return "'" + word.substr(0, 100) + "'";
}

bool ends_with(const std::string &text, const std::string &end)
{
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

Json parsed(const std::string &path, const std::string &name, const std::string &text)
{
  try {
    return JsonReader(text).read();
  } catch (const std::runtime_error &error) {
    throw Refused(path + ": entry " + name + " is " + error.what() + "; the file is damaged: copy or pack it again");
  }
}

class Archive {
 public:
  explicit Archive(const std::string &path) : reader_(path) {}

  std::vector<std::string> names() { return reader_.getAllRecords(); }
  std::string read(const std::string &name)
  {
    const auto [bytes, size] = reader_.getRecord(name);
    return {static_cast<const char *>(bytes.get()), size};
  }
  int64_t size(const std::string &name) { return static_cast<int64_t>(reader_.getRecordSize(name)); }

 private:
  caffe2::serialize::PyTorchStreamReader reader_;
};

// Every entry of the manifest with its bytes, which have its size and hash; nothing else is in the file
std::map<std::string, std::string> verified_entries(const std::string &path)
{
  Archive archive(path);
  const auto names = archive.names();
  if (std::find(names.begin(), names.end(), MANIFEST) == names.end())
    throw Refused(path + " was not written by carryall (it has no manifest): make one of it, carryall rebuild, or pack the model");
  if (archive.size(MANIFEST) > LARGEST_JSON) throw Refused(path + ": its manifest is too large; the file is damaged");
  const Json manifest = parsed(path, MANIFEST, archive.read(MANIFEST));
  if (manifest["format_version"].number > FORMAT)
    throw Refused(path + " has a newer format than this plugin reads: pip install -U carryall-lammps, then carryall build-lammps");
  const auto &listed = manifest["entries"].object;
  const std::string damaged = " does not match the manifest; the file is damaged or was changed: pack it again";
  size_t unlisted = 0;
  for (const auto &name : names) unlisted += name == MANIFEST || name == SIGNATURE;
  if (listed.empty() || names.size() != listed.size() + unlisted)
    throw Refused(path + ": its list of entries" + damaged);
  std::map<std::string, std::string> found;
  for (const auto &[full, entry] : listed) {
    const auto slash = full.find('/');
    const std::string name = slash == std::string::npos ? full : full.substr(slash + 1);
    if (std::find(names.begin(), names.end(), name) == names.end()) throw Refused(path + ": entry " + quoted(full) + damaged);
    std::string bytes = archive.read(name);
    Sha256 hash;
    hash.add(bytes.data(), bytes.size());
    if (hash.digest() != entry["sha256"].text || static_cast<double>(bytes.size()) != entry["size"].number)
      throw Refused(path + ": entry " + quoted(full) + damaged);
    found[name] = std::move(bytes);
  }
  return found;
}

std::string machine()
{
  utsname info;
  std::string name = uname(&info) ? "" : info.machine;
  if (name == "amd64") name = "x86_64";
  return name == "arm64" ? "aarch64" : name;
}

// The level of the x86-64 psABI, 0 where it is another processor
int level_here()
{
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool third = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool fourth = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return third ? fourth ? 4 : 3 : 2;
#else
  return 0;
#endif
}

std::pair<int, int> minor_of(const std::string &version)
{
  int major = 0, minor = 0;
  return std::sscanf(version.c_str(), "%d.%d", &major, &minor) == 2 ? std::pair{major, minor} : std::pair{0, 0};
}

// Why the compiled program cannot run here; empty when nothing speaks against it
std::string misfit(const Json &facts)
{
  if (facts["device"].text != "cpu")
    return "it was compiled for " + facts["device"].text + ", and the pair style runs on CPUs: pack the model with --device cpu";
  const std::string rebuild = ": make one for here from its source, carryall rebuild OLD.pt2 NEW.pt2";
  const std::string made_for = facts["machine"].text, level = facts["cpu_level"].text;
  if (made_for != machine()) return "it is for " + made_for + " and this machine is " + machine() + rebuild;
  if (level.rfind("x86-64-v", 0) == 0 && std::atoi(level.c_str() + 8) > level_here())
    return "it needs a CPU of level " + level + " and this one has x86-64-v" + std::to_string(level_here()) + rebuild;
  const auto made_by = minor_of(facts["torch_version"].text), here = minor_of(TORCH_VERSION);
  const auto exchangeable = [](std::pair<int, int> one) { return OLDEST <= one && one <= NEWEST; };
  if (made_by != here && !(exchangeable(made_by) && exchangeable(here)))
    return "it was compiled under torch " + facts["torch_version"].text + " and this is " TORCH_VERSION + rebuild;
  return "";
}

Facts checked_facts(const std::string &path, const Json &values)
{
  const auto refuse = [&](const std::string &why) { throw Refused(path + ": " + why); };
  if (values["kind"].text != "pt2")
    refuse("it is a portable program (.pte), and the pair style runs compiled ones: carryall rebuild OLD.pte NEW.pt2");
  if (values["target"].kind == Json::STRING && values["target"].text != "carryall")
    refuse("it was packed for " + values["target"].text + ": run it there, or carryall rebuild OLD.pt2 NEW.pt2");
  if (values["format_version"].number < FORMAT) refuse("it is of an old format: carryall rebuild OLD.pt2 NEW.pt2");
  if (values["length_unit"].text != "angstrom" || values["energy_unit"].text != "eV")
    refuse("its units are " + values["length_unit"].text + " and " + values["energy_unit"].text + ", expected angstrom and eV");
  if (values["long_range"].truth)
    refuse("it sums over the whole system (long range), which the compiled pair style cannot: use the driver, carryall lammps --engine driver");
  if (!values["extra_inputs"].list.empty()) {
    std::string names;
    for (const auto &name : values["extra_inputs"].strings()) names += (names.empty() ? "" : ", ") + name;
    refuse("it takes " + names + ", which the compiled pair style has no values for: use carryall from Python");
  }
  Facts facts;
  facts.path = path;
  facts.cutoff = values["cutoff"].number;
  facts.type_map = values["type_map"].strings();
  facts.message_passing = values["message_passing"].truth;
  facts.block_edges = static_cast<int64_t>(values["block_edges"].number);
  facts.inputs = values["input_keys"].strings();
  facts.outputs = values["output_keys"].strings();
  auto known = PLAIN;
  if (facts.message_passing) known.insert(known.end(), OF_EXCHANGE.begin(), OF_EXCHANGE.end());
  for (const auto &name : facts.inputs)
    if (std::find(known.begin(), known.end(), name) == known.end())
      refuse("it takes " + quoted(name) + ", which this plugin does not know: pip install -U carryall-lammps, then carryall build-lammps");
  if (facts.inputs.size() != known.size()) refuse("it has other inputs than this plugin gives: carryall rebuild OLD.pt2 NEW.pt2");
  for (const auto &name : NEEDED)
    if (std::find(facts.outputs.begin(), facts.outputs.end(), name) == facts.outputs.end())
      refuse("it does not give " + name + ", files of this carryall do: carryall rebuild OLD.pt2 NEW.pt2");
  if (!(facts.cutoff > 0) || facts.type_map.empty()) refuse("its metadata has no cutoff or no elements; the file is damaged");
  if (const auto why = misfit(values); !why.empty()) refuse(why);
  return facts;
}

// The list of the ops that the program calls, with ours for carryall's: Python may have registered those in this process,
// for exchanges of its own, and nobody may register a name twice
std::string with_own_ops(std::string text, const std::string &ops)
{
  for (const char *op : OPS) {
    const std::string old = "\"target\": \"carryall::" + std::string(op) + "\"";
    const std::string renamed = "\"target\": \"" + ops + "::" + op + "\"";
    for (auto place = text.find(old); place != std::string::npos; place = text.find(old, place + renamed.size()))
      text.replace(place, old.size(), renamed);
  }
  return text;
}

void write_program(const std::map<std::string, std::string> &entries, const std::string &copy, const std::string &ops)
{
  caffe2::serialize::PyTorchStreamWriter writer(copy);
  for (const auto &[name, bytes] : entries) {
    // the writer has records of its own under these names
    if (name.rfind(EXTRA, 0) == 0 || name.rfind(".data/", 0) == 0 || name == "version") continue;
    const std::string data = ends_with(name, ".json") ? with_own_ops(bytes, ops) : bytes;
    writer.writeRecord(name, data.data(), data.size());
  }
  writer.writeEndOfFile();
}

}    // namespace

PrivateFolder::PrivateFolder()
{
  const char *base = std::getenv("TMPDIR");
  std::string name = std::string(base && *base ? base : "/tmp") + "/carryall-XXXXXX";
  if (!mkdtemp(name.data())) throw std::runtime_error("no folder can be made in " + name + ": set TMPDIR to one that can be written");
  path = name;
}

PrivateFolder::~PrivateFolder()
{
  std::error_code ignored;
  std::filesystem::remove_all(path, ignored);
}

Facts verified_copy(const std::string &path, const std::string &copy, const std::string &ops)
{
  if (!std::ifstream(path)) throw std::runtime_error(path + " cannot be read: is the path right, seen from where LAMMPS runs?");
  if (const char *keys = std::getenv("CARRYALL_TRUSTED_KEYS"); keys && *keys)
    throw std::runtime_error(
        "CARRYALL_TRUSTED_KEYS is set, but the compiled pair style cannot check signatures: use the driver (carryall lammps "
        "--engine driver), or check the file (carryall inspect) and unset the variable");
  try {
    const auto entries = verified_entries(path);
    const std::string name = EXTRA + "metadata.json";
    const auto found = entries.find(name);
    if (found == entries.end()) throw Refused(path + " has no metadata.json; the file is damaged: pack it again");
    const Facts facts = checked_facts(path, parsed(path, name, found->second));
    write_program(entries, copy, ops);
    return facts;
  } catch (const Refused &) {
    throw;
  } catch (const c10::Error &error) {
    const std::string text = error.what_without_backtrace();
    throw std::runtime_error(path + " is no packed potential (.pt2 of carryall pack), or is damaged: " + text.substr(0, text.find('\n')));
  }
}

}    // namespace carryall
