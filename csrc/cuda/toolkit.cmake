# Finds a CUDA toolkit without asking for a GPU. Sets CUDA_ROOT (the folder of bin/nvcc and of the headers' and libraries'
# folders), CUDA_INCLUDE, CUDA_NVCC and CUDA_CUDART (the static runtime), or CUDA_LACKS, a phrase.
#
# Looked at, in this order: CUDA_ROOT, CUDA_HOME or CUDA_PATH of the environment, nvcc in PATH, /usr/local/cuda, and the
# site-packages of Python_EXECUTABLE (PyPI: nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime,
# nvidia-cuda-cccl).
set(CUDA_ROOT "" CACHE PATH "CUDA toolkit")
set(CUDA_LACKS "")

set(folders ${CUDA_ROOT} "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
find_program(in_path nvcc NO_CACHE)
if(in_path)
  # nvcc in PATH may be a script or a link; it knows its own folder.
  execute_process(COMMAND ${in_path} --dryrun -E -x cu /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
  if(dryrun MATCHES "#\\$ TOP=([^\n]+)")
    get_filename_component(top "${CMAKE_MATCH_1}" REALPATH)
    list(APPEND folders "${top}")
  endif()
endif()
list(APPEND folders /usr/local/cuda)
if(Python_EXECUTABLE)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  file(GLOB from_pypi "${packages}/nvidia/cu[0-9]*")
  list(APPEND folders ${from_pypi})
endif()

unset(CUDA_INCLUDE CACHE)
unset(CUDA_CUDART CACHE)
unset(CUDA_NVCC CACHE)
foreach(folder IN LISTS folders)
  if(folder AND EXISTS "${folder}/bin/nvcc")
    set(CUDA_ROOT "${folder}")
    set(CUDA_NVCC "${folder}/bin/nvcc" CACHE INTERNAL "nvcc")
    break()
  endif()
endforeach()
if(NOT CUDA_NVCC)
  set(CUDA_LACKS "no nvcc in CUDA_HOME, PATH, /usr/local/cuda or Python's site-packages")
else()
  set(includes "${CUDA_ROOT}/include" "${CUDA_ROOT}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/include")
  find_path(CUDA_INCLUDE cuda_runtime_api.h PATHS ${includes} NO_DEFAULT_PATH)
  find_library(CUDA_CUDART libcudart_static.a NO_DEFAULT_PATH
               PATHS "${CUDA_ROOT}/lib64" "${CUDA_ROOT}/lib" "${CUDA_ROOT}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib")
  execute_process(COMMAND ${CUDA_NVCC} --version OUTPUT_VARIABLE version)
  string(REGEX MATCH "release ([0-9.]+)" version "${version}")
  set(CUDA_VERSION ${CMAKE_MATCH_1})
  if(NOT CUDA_INCLUDE)
    set(CUDA_LACKS "${CUDA_ROOT} has no cuda_runtime_api.h")
  elseif(NOT EXISTS "${CUDA_INCLUDE}/nv/target" AND NOT EXISTS "${CUDA_INCLUDE}/cccl/nv/target")
    set(CUDA_LACKS "${CUDA_INCLUDE} has no nv/target (PyPI: nvidia-cuda-cccl)")
    set(CUDA_INCLUDE "")
  elseif(NOT CUDA_CUDART)
    set(CUDA_LACKS "${CUDA_ROOT} has no libcudart_static.a")
  elseif(CUDA_VERSION VERSION_LESS 12.5)
    set(CUDA_LACKS "${CUDA_NVCC} is of CUDA ${CUDA_VERSION}, 12.5 is needed")
  endif()
endif()
