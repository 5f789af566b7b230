# polyattn::cuda: headers for sources that nvcc compiles. It needs CUDA's toolkit only where it is used.
add_library(polyattn_cuda INTERFACE)
add_library(polyattn::cuda ALIAS polyattn_cuda)
set_target_properties(polyattn_cuda PROPERTIES EXPORT_NAME cuda)
file(GLOB_RECURSE polyattn_cuda_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/polyattn/*.cuh)
# A file set of type HEADERS would be verified as C++, so these are installed as files.
target_include_directories(polyattn_cuda INTERFACE $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
# By option: CMake before 3.25.2 does not know which flag makes nvcc 13 compile C++20.
target_compile_options(polyattn_cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
target_link_libraries(polyattn_cuda INTERFACE CUDA::cudart)

if(NOT PROJECT_IS_TOP_LEVEL)
  if(NOT TARGET CUDA::cudart)
    find_package(CUDAToolkit QUIET GLOBAL)
  endif()
  return()
endif()
# The project's own GPU programs are built where nvcc is found; POLYATTN_CUDA=OFF leaves them out.
find_program(POLYATTN_NVCC NAMES nvcc HINTS ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
option(POLYATTN_CUDA "Build the tests, examples and benchmarks of the CUDA backend where nvcc is found" ON)
if(POLYATTN_CUDA AND POLYATTN_NVCC)
  if(NOT DEFINED CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${POLYATTN_NVCC})
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-virtual)  # compiled for the GPU at hand when it runs
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
elseif(POLYATTN_CUDA)
  set(POLYATTN_CUDA OFF)
  message(NOTICE "polyattn: nvcc was not found, the GPU parts are left out")
endif()
