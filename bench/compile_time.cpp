// How long the first program takes to compile at -O2, and the size of its object.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <string>

void first_program(benchmark::State& state) {
    const std::string object = POLYATTN_BINARY "/first_program.o";
    const std::string command = POLYATTN_COMPILER " -std=c++20 -O2 -march=native -fopenmp -I" POLYATTN_SOURCE "/include -c " POLYATTN_SOURCE "/examples/first_program.cpp -o " + object;
    const auto start = std::chrono::steady_clock::now();
    for (auto _ : state)
        if (std::system(command.c_str()) != 0) return state.SkipWithError("it does not compile");
    state.counters["ratio"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();  // seconds
    state.counters["most"] = 8;
    state.counters["object_MB"] = double(std::filesystem::file_size(object)) / 1e6;
}
BENCHMARK(first_program)->Iterations(1)->UseRealTime()->Unit(benchmark::kSecond);

BENCHMARK_MAIN();
