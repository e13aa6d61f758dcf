// Energy and forces of one structure (extended XYZ, atoms inside the box) from a packed potential, by libtorch alone, no Python.
#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <regex>
#include <sstream>
#include <vector>

struct Structure {
  std::vector<int64_t> types;
  std::vector<double> positions, cell;  // by rows; no cell: nine zeros
};

// The value of a key of metadata.json, which is flat: every key occurs once at the start of a line
std::string value_of(const std::string& json, const std::string& key) {
  std::smatch found;
  if (!std::regex_search(json, found, std::regex("\n \"" + key + "\": ([^\\[,\n]+|\\[[^\\]]*\\])")))
    throw std::runtime_error("metadata.json has no " + key);
  return found[1];
}

std::vector<std::string> strings_of(std::string list) {
  std::vector<std::string> found;
  const std::regex word("\"([^\"]*)\"");
  for (std::sregex_iterator it(list.begin(), list.end(), word), end; it != end; ++it) found.push_back((*it)[1]);
  return found;
}

Structure read_structure(const std::string& path, const std::vector<std::string>& type_map) {
  std::ifstream file(path);
  std::string line, symbol;
  Structure found{{}, {}, std::vector<double>(9, 0.0)};
  std::getline(file, line);
  const int n_atoms = std::stoi(line);
  std::getline(file, line);
  std::smatch lattice;
  if (std::regex_search(line, lattice, std::regex("Lattice=\"([^\"]*)\""))) {
    std::istringstream numbers(lattice[1]);
    for (double& number : found.cell) numbers >> number;
  }
  for (int atom = 0; atom < n_atoms && file >> symbol; ++atom) {
    const auto place = std::find(type_map.begin(), type_map.end(), symbol);
    if (place == type_map.end()) throw std::runtime_error("the model does not know " + symbol);
    found.types.push_back(place - type_map.begin());
    for (int k = 0; k < 3; ++k) found.positions.emplace_back(), file >> found.positions.back();
    std::getline(file, line);  // forces and whatever else stands in the row
  }
  return found;
}

template <typename T> at::Tensor tensor(const std::vector<T>& values, at::IntArrayRef shape, at::ScalarType type) {
  return at::from_blob(const_cast<T*>(values.data()), shape, type).clone();
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: evaluate model.pt2 structure.xyz\n"), 2;
  caffe2::serialize::PyTorchStreamReader archive{std::string(argv[1])};
  const auto [bytes, size] = archive.getRecord("extra/metadata.json");
  const std::string metadata(static_cast<const char*>(bytes.get()), size);
  const double cutoff = std::stod(value_of(metadata, "cutoff"));
  const auto names = strings_of(value_of(metadata, "output_keys"));
  const Structure it = read_structure(argv[2], strings_of(value_of(metadata, "type_map")));
  const int64_t n = it.types.size();

  // every pair within the cutoff, by trying all images: a real engine has lists; edges sorted by centre, ptr[c]:ptr[c + 1]
  const auto box = tensor(it.cell, {3, 3}, at::kDouble);
  int reach[3] = {0, 0, 0};  // images along each vector: the columns of the inverse cell are as long as one over the box's heights
  for (int k = 0; k < 3 && box.det().item<double>() != 0; ++k)
    reach[k] = std::ceil(cutoff * box.inverse().select(1, k).norm().item<double>()) + 1;
  std::vector<int64_t> center, neighbor, ptr{0};
  std::vector<int32_t> shift;
  int64_t degree = 0;
  for (int64_t i = 0; i < n; ptr.push_back(center.size()), degree = std::max(degree, ptr[i + 1] - ptr[i]), ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int a = -reach[0]; a <= reach[0]; ++a)
        for (int b = -reach[1]; b <= reach[1]; ++b)
          for (int c = -reach[2]; c <= reach[2]; ++c) {
            double square = 0;
            for (int k = 0; k < 3; ++k)
              square += std::pow(it.positions[3 * j + k] - it.positions[3 * i + k] + a * it.cell[k] + b * it.cell[3 + k] + c * it.cell[6 + k], 2);
            if (square > cutoff * cutoff || (i == j && !a && !b && !c)) continue;
            center.push_back(i), neighbor.push_back(j), shift.insert(shift.end(), {a, b, c});
          }
  const int64_t edges = center.size();
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  // in the order of input_keys
  const auto out = model.run({tensor(it.positions, {n, 3}, at::kDouble), tensor(it.types, {n}, at::kLong), at::zeros({n}, at::kLong),
                              box.unsqueeze(0), tensor(center, {edges}, at::kLong), tensor(neighbor, {edges}, at::kLong),
                              tensor(shift, {edges, 3}, at::kInt), at::ones({edges}, at::kBool), tensor(ptr, {n + 1}, at::kLong),
                              at::arange(n, at::kLong), at::arange(degree, at::kLong)});
  const auto output = [&](const char* name) { return out[std::find(names.begin(), names.end(), name) - names.begin()]; };
  std::printf("energy %.17g\n", output("energy").item<double>());
  for (int64_t i = 0; i < 3 * n; ++i) std::printf("force %.17g\n", output("forces").flatten()[i].item<double>());
}
