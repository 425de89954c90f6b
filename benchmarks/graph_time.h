// Times one kernel without any library between: a CUDA graph of 64 launches, each after the one before, replayed.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

struct Pool {  // device memory of one measurement
  std::vector<char*> held;
  // bytes: of one array; copies: how many of them. Filled with random words in which no two-bit code is 3, or with the float 1.
  char* array(size_t bytes, size_t copies, bool codes) {
    char* to = nullptr;
    if (cudaMalloc(&to, bytes * copies + 64) != cudaSuccess) return nullptr;
    held.push_back(to);
    std::vector<unsigned> block(1 << 20);
    for (unsigned& word : block) {
      word = codes ? unsigned(rand()) * 2654435761u : 0x3F800000u;
      if (codes) word ^= word & word >> 1 & 0x55555555u;
    }
    for (size_t at = 0; at < bytes * copies; at += block.size() * 4)
      cudaMemcpy(to + at, block.data(), std::min(bytes * copies - at, block.size() * 4), cudaMemcpyHostToDevice);
    return to;
  }
  char* numbers(const std::vector<int>& values) {
    char* to = nullptr;
    if (cudaMalloc(&to, values.size() * 4) != cudaSuccess) return nullptr;
    held.push_back(to);
    cudaMemcpy(to, values.data(), values.size() * 4, cudaMemcpyHostToDevice);
    return to;
  }
  ~Pool() {
    for (char* p : held) cudaFree(p);
  }
};

// Microseconds of one launch in each of `repeats` replays of the graph; 0 where all went well, else CUDA's error.
template <typename Launch>
int time_graph(float* microseconds, int repeats, Launch launch) {
  constexpr int CALLS = 64, WARM = 3;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  cudaEvent_t begin, end;
  cudaStreamCreate(&stream);
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  for (int call = 0; call < CALLS; call++) launch(call, stream);
  cudaStreamEndCapture(stream, &graph);
  if (cudaGraphInstantiate(&ready, graph, 0) != cudaSuccess) return int(cudaGetLastError());
  for (int i = -WARM; i < repeats; i++) {
    float milliseconds = 0;
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(ready, stream);
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i >= 0) microseconds[i] = milliseconds / CALLS * 1000;
  }
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return int(cudaGetLastError());
}
