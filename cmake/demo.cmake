# Builds the main example and runs it:  cmake -P cmake/demo.cmake
# On a text of one's own:               cmake -DTEXT=book.txt -DWORD=whale -P cmake/demo.cmake
cmake_minimum_required(VERSION 3.24)
include(${CMAKE_CURRENT_LIST_DIR}/setup.cmake)
polyattn_setup(libxtensor-dev libxsimd-dev libstb-dev)

set(build ${CMAKE_CURRENT_LIST_DIR}/../build/demo)
polyattn_run(${CMAKE_COMMAND} -S . -B ${build} -DCMAKE_BUILD_TYPE=Release -DPOLYATTN_BUILD_TESTS=OFF -DPOLYATTN_BUILD_BENCHMARKS=OFF --log-level=NOTICE)
polyattn_run(${CMAKE_COMMAND} --build ${build} --target diffuse_document --parallel ${polyattn_jobs})
set(arguments --pictures ${build})
if(TEXT)
  get_filename_component(TEXT ${TEXT} ABSOLUTE)
  list(APPEND arguments ${TEXT})
endif()
if(WORD)
  list(APPEND arguments --word ${WORD})
endif()
polyattn_run(${build}/examples/diffuse_document ${arguments})
