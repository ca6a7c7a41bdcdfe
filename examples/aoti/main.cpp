// Runs a package that fastxattn.export.to_aoti wrote, without Python:
//   ./run_package MODEL.pt2 libfastxattn_cpu.so INPUTS.pt [ROUNDS]
// INPUTS.pt holds a list of tensors saved by torch.jit (see export_package.py). Prints the outputs' sums and the time.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/library.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_package MODEL.pt2 libfastxattn_cpu.so INPUTS.pt [ROUNDS]\n";
    return 2;
  }
  // Python defines the operators' schemas when fastxattn is imported; here the package's own list does.
  torch::Library library(torch::Library::DEF, "fastxattn", std::nullopt, __FILE__, __LINE__);
  std::ifstream schemas(std::string(argv[1]) + ".schemas");
  for (std::string line; std::getline(schemas, line);) {
    if (!line.empty()) library.def(torch::jit::parseSchema("fastxattn::" + line));
  }
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  c10::InferenceMode no_grad;
  std::vector<at::Tensor> inputs;
  const auto holder = torch::jit::load(argv[3]);
  for (size_t i = 0; holder.hasattr("input_" + std::to_string(i)); ++i) {
    inputs.push_back(holder.attr("input_" + std::to_string(i)).toTensor());
  }
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const auto outputs = loader.run(inputs);
  for (const auto& output : outputs) {
    std::cout << output.sizes() << " sum " << output.to(at::kDouble).sum().item<double>() << "\n";
  }
  std::vector<double> times(argc > 4 ? std::max(1, std::atoi(argv[4])) : 20);
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    loader.run(inputs);
    time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  std::cout << times[times.size() / 2] << " ms a run\n";
  return 0;
}
