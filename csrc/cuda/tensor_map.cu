// cuTensorMapEncode*, found through the runtime: the library is not linked against libcuda and loads where there is
// none.
#include "cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace resnet_fused::cuda {
namespace {

template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": " + cudaGetErrorString(error));
  return reinterpret_cast<Function>(function);
}

CUtensorMapDataType element_type(DType dtype) {
  if (dtype == DType::kF32) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

CUtensorMapSwizzle swizzle_mode(int bytes) {
  if (bytes == 128) return CU_TENSOR_MAP_SWIZZLE_128B;
  if (bytes == 64) return CU_TENSOR_MAP_SWIZZLE_64B;
  return bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

CUtensorMap encode_tensor_map(const TensorMapGeometry& g) {
  if (const char* reason = defect(g)) throw std::runtime_error(reason);
  static const auto tiled = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const auto rank = static_cast<cuuint32_t>(g.rank);
  cuuint64_t sizes[5], strides[4] = {};
  cuuint32_t box[5], steps[5];
  for (int i = 0; i < g.rank; ++i) {
    sizes[i] = g.size[i];
    if (i) strides[i - 1] = g.stride[i];
    box[i] = g.box[i];
    steps[i] = g.step[i] ? g.step[i] : 1;
  }
  CUtensorMap map;
  void* pointer = const_cast<void*>(g.pointer);
  const CUresult result =
      g.im2col
          ? im2col(&map, element_type(g.dtype), rank, pointer, sizes, strides, g.lower, g.upper, g.channels, g.pixels,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_mode(g.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
          : tiled(&map, element_type(g.dtype), rank, pointer, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  swizzle_mode(g.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncode refused a tensor map: error " + std::to_string(result));
  return map;
}

}  // namespace resnet_fused::cuda
