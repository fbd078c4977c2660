# The CUDA kernels for execution on the CPU: libcuda_emulated.so (library.cpp), and an executable a test_*.cpp.
if(NOT Python_EXECUTABLE)
  find_package(Python 3.10 COMPONENTS Interpreter)
endif()
include(csrc/cuda/toolkit.cmake)
if(NOT CUDA_INCLUDE)
  message(FATAL_ERROR "resnet_fused: the CUDA tests need CUDA's headers: ${CUDA_LACKS}")
endif()
find_package(Threads REQUIRED)

add_library(emulator INTERFACE)
target_include_directories(emulator INTERFACE csrc tests/cuda)
target_include_directories(emulator SYSTEM INTERFACE ${CUDA_INCLUDE})
target_compile_options(emulator INTERFACE -Wno-unknown-pragmas)  # "#pragma unroll" is nvcc's
target_link_libraries(emulator INTERFACE Threads::Threads)

set(emulated_sources ${cuda_sm80} ${cuda_sm90})
set_source_files_properties(${emulated_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
add_library(emulated_kernels OBJECT ${emulated_sources} csrc/cuda/registry.cpp)
target_link_libraries(emulated_kernels PUBLIC emulator)

add_library(cuda_emulated SHARED tests/cuda/library.cpp)
target_link_libraries(cuda_emulated PRIVATE emulated_kernels)

file(GLOB emulated_tests CONFIGURE_DEPENDS tests/cuda/test_*.cpp)
foreach(source IN LISTS emulated_tests)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  if(name STREQUAL "test_emulator")
    target_link_libraries(${name} PRIVATE emulator)
  else()
    target_link_libraries(${name} PRIVATE emulated_kernels)
  endif()
endforeach()
