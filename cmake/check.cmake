# Builds everything and runs all tests:  cmake -P cmake/check.cmake
# With AddressSanitizer and UBSan:       cmake -DPRESET=sanitize -P cmake/check.cmake
cmake_minimum_required(VERSION 3.24)
include(${CMAKE_CURRENT_LIST_DIR}/setup.cmake)
polyattn_setup(libxtensor-dev libxsimd-dev libstb-dev libeigen3-dev doctest-dev libbenchmark-dev pkg-config)

if(NOT PRESET)
  set(PRESET ci)
endif()
polyattn_run(${CMAKE_COMMAND} --preset ${PRESET} --log-level=NOTICE)
polyattn_run(${CMAKE_COMMAND} --build --preset ${PRESET} --parallel ${polyattn_jobs})
polyattn_run(${CMAKE_CTEST_COMMAND} --preset ${PRESET} --parallel ${polyattn_jobs})
