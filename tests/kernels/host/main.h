// Reads a launch from a folder, runs it, writes its outputs. launch: grid, block, bytes of shared memory, seed; for each
// input its bytes, its number of dimensions and those; for each output its bytes. Arrays in in0, in1, ..., out0, ...
#pragma once
#include <fstream>
#include <iterator>
#include <string>

namespace host {
struct Arrays {
  std::string folder;
  std::vector<unsigned char*> inputs, outputs;
  std::vector<size_t> output_bytes;
  std::vector<mlx::core::cu::Shape> shapes;
  Index blocks;
  size_t shared_bytes;

  explicit Arrays(const char* where, int input_count, int output_count) : folder(where) {
    std::ifstream launch(folder + "/launch");
    launch >> blocks.x >> blocks.y >> blocks.z >> threads.x >> threads.y >> threads.z >> shared_bytes >> seed;
    for (int i = 0; i < input_count; i++) {
      size_t bytes, dimensions;
      mlx::core::cu::Shape shape{};
      launch >> bytes >> dimensions;
      for (size_t d = 0; d < dimensions; d++) launch >> shape.sizes[d];
      shapes.push_back(shape);
      inputs.push_back(guarded(bytes, 0xA5));
      std::ifstream file(folder + "/in" + std::to_string(i), std::ios::binary);
      file.read((char*)inputs.back(), std::streamsize(bytes));
      mprotect((void*)(uintptr_t(inputs.back()) / 4096 * 4096), (bytes + uintptr_t(inputs.back()) % 4096 + 4095) / 4096 * 4096, PROT_READ);
    }
    for (int i = 0; i < output_count; i++) {
      size_t bytes;
      launch >> bytes;
      output_bytes.push_back(bytes);
      outputs.push_back(guarded(bytes, seed % 2 ? 0x5A : 0x3C));  // what is never written differs from seed to seed
    }
    if (!launch) fail("the launch cannot be read");
  }
  void write() const {
    for (size_t i = 0; i < outputs.size(); i++) {
      std::ofstream file(folder + "/out" + std::to_string(i), std::ios::binary);
      file.write((const char*)outputs[i], std::streamsize(output_bytes[i]));
    }
  }
};
}  // namespace host
