// How launchers start kernels, under nvcc and in CPU execution.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cuda/ptx.h"

namespace resnet_fused::cuda {

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;            // blocks along x that form a cluster
  bool programmatic = false;  // may start before the kernel ahead of it ends; it then calls ptx::grid_wait
  int most_shared_bytes = 0;  // of any launch of a kernel whose shared_bytes depend on the shape
};

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
            const Arguments&... arguments) {
  // 48 KiB is what a block may have without asking. The limit is the function's: always the same one, or a launch of
  // another thread, or of a graph that was captured before, would find one that is too low.
  const int most = shape.most_shared_bytes ? shape.most_shared_bytes : shape.shared_bytes;
  if (most > 48 * 1024)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++count;
  }
  if (shape.programmatic) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "kernel launch");
}

#else

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t, const Arguments&... arguments) {
  emu::launch(kernel, shape.grid, dim3(static_cast<unsigned>(shape.threads)), static_cast<size_t>(shape.shared_bytes),
              static_cast<unsigned>(shape.cluster), shape.programmatic, arguments...);
}

#endif

}  // namespace resnet_fused::cuda
