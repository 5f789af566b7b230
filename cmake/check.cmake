# Builds everything and runs all tests, those of the CPU under AddressSanitizer and UBSan:  cmake -P cmake/check.cmake
cmake_minimum_required(VERSION 3.24)
include(${CMAKE_CURRENT_LIST_DIR}/setup.cmake)
polyattn_setup(libxtensor-dev libxsimd-dev libstb-dev libeigen3-dev doctest-dev libbenchmark-dev pkg-config)

polyattn_run(${CMAKE_COMMAND} --preset ci --log-level=NOTICE)
polyattn_run(${CMAKE_COMMAND} --build --preset ci --parallel ${polyattn_jobs})
polyattn_run(${CMAKE_CTEST_COMMAND} --preset ci --parallel ${polyattn_jobs})
