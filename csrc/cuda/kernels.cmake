# The kernels compiled by nvcc, ${cuda_objects} (target cuda_objects), and target cuda_kernels: their table, and the static
# CUDA runtime. nvcc is called directly: CMake's CUDA language wants a complete toolkit and links a test program, which the
# packages of PyPI do not allow.
#
# TORCH_CUDA_ARCH_LIST, for example "8.0+PTX;9.0a", says what to compile for. Kernels of sm80/ are compiled for every entry,
# those of sm90/ only for 9.0a, whose instructions no other architecture has. What ptxas says of registers and spills is
# kept in cuda/*/*.o.ptxas.
set(arches "$ENV{TORCH_CUDA_ARCH_LIST}")
if(NOT arches)
  set(arches "8.0+PTX;9.0a")
endif()
string(REGEX REPLACE "[ ,]+" ";" arches "${arches}")

set(gencode_sm80 "")
set(gencode_sm90 "")
foreach(arch IN LISTS arches)
  if(NOT arch MATCHES "^([0-9]+)\\.([0-9]+)([af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 8.0+PTX, got ${arch}")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  set(suffix "${CMAKE_MATCH_3}")
  set(ptx "${CMAKE_MATCH_4}")
  if(number LESS 80)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: the kernels need 8.0 or later, got ${arch}")
  endif()
  list(APPEND gencode_sm80 -gencode "arch=compute_${number}${suffix},code=sm_${number}${suffix}")
  if(ptx)
    list(APPEND gencode_sm80 -gencode "arch=compute_${number}${suffix},code=compute_${number}${suffix}")
  endif()
  if("${number}${suffix}" STREQUAL "90a")
    set(gencode_sm90 -gencode arch=compute_90a,code=sm_90a)
  endif()
endforeach()
if(NOT gencode_sm90)
  set(cuda_sm90 "")
endif()

# Objects, not an archive: a kernel joins the table by a static object, which a linker would drop.
set(cuda_objects "")
function(compile_cuda source)
  get_filename_component(name ${source} NAME_WE)
  get_filename_component(folder ${source} DIRECTORY)
  get_filename_component(folder ${folder} NAME)
  set(object "${CMAKE_BINARY_DIR}/cuda/${folder}/${name}.o")
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${CMAKE_COMMAND} -E make_directory "${CMAKE_BINARY_DIR}/cuda/${folder}"
    COMMAND sh ${CMAKE_SOURCE_DIR}/csrc/cuda/compile.sh ${object}.ptxas
            ${CUDA_NVCC} -c ${source} -o ${object} -std=c++17 -O3 -lineinfo --expt-relaxed-constexpr -ccbin ${CMAKE_CXX_COMPILER}
            -I${CMAKE_SOURCE_DIR}/csrc -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas -v ${ARGN} -MD -MF ${object}.d
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "nvcc ${folder}/${name}.cu"
    VERBATIM)
  set(cuda_objects ${cuda_objects} ${object} PARENT_SCOPE)
endfunction()
foreach(source IN LISTS cuda_sm80)
  compile_cuda(${source} ${gencode_sm80})
endforeach()
foreach(source IN LISTS cuda_sm90)
  compile_cuda(${source} ${gencode_sm90})
endforeach()
file(GLOB cuda_common CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
foreach(source IN LISTS cuda_common)
  compile_cuda(${source} ${gencode_sm80})
endforeach()

file(GLOB cuda_host CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cpp)
find_package(Threads REQUIRED)
add_custom_target(cuda_objects DEPENDS ${cuda_objects})
add_library(cuda_kernels OBJECT ${cuda_host})
target_include_directories(cuda_kernels PUBLIC csrc)
target_include_directories(cuda_kernels SYSTEM PUBLIC ${CUDA_INCLUDE})
# The runtime is static, so that the library loads beside a torch without CUDA; libcuda is looked up at run time.
target_link_libraries(cuda_kernels PUBLIC ${CUDA_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
message(STATUS "resnet_fused: CUDA kernels by ${CUDA_NVCC} (${CUDA_VERSION}) for ${arches}")
