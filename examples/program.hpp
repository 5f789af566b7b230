#pragma once
// What the examples' main() functions share.

#include <chrono>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>

/// Seconds of a clock that only goes forward.
inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// set(option, value) for each pair of "--option value", then run(); what is thrown becomes a message and status 1. set returns whether it
/// knows the option.
inline int run_program(const char* name, int argc, char** argv, const std::function<bool(const std::string&, const std::string&)>& set, const std::function<int()>& run) {
    try {
        for (int i = 1; i < argc; i += 2) {
            const std::string option = argv[i];
            if (i + 1 == argc) throw std::runtime_error(option + " needs a value");
            if (!set(option, argv[i + 1])) throw std::runtime_error("unknown option " + option);
        }
        return run();
    } catch (const std::exception& error) {
        std::cerr << name << ": " << error.what() << "\n";
        return 1;
    }
}
