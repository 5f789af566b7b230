#pragma once
// What the examples' main() functions share.

#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

/// Seconds of a clock that only goes forward.
inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The whole number that `value` is. Throws if it is none, or below `least`.
template <class Number>
Number number_of(const std::string& option, const std::string& value, Number least) {
    Number number{};
    const char* const last = value.data() + value.size();
    const auto [end, error] = std::from_chars(value.data(), last, number);
    if (error != std::errc() || end != last || number < least)
        throw std::runtime_error(option + " must be a whole number from " + std::to_string(least) + " to " + std::to_string(std::numeric_limits<Number>::max()) + ", not " + value);
    return number;
}

/// set(option, value) for each pair of "--option value", then run(); what is thrown becomes a message and status 1. set returns whether it
/// knows the option. `first` comes before all others, wherever it stands: the option that others change the values of.
inline int run_program(const char* name, int argc, char** argv, const std::function<bool(const std::string&, const std::string&)>& set, const std::function<int()>& run, const std::string& first = {}) {
    try {
        for (const bool early : {true, false})
            for (int i = 1; i < argc; i += 2) {
                const std::string option = argv[i];
                if (i + 1 == argc) throw std::runtime_error(option + " needs a value");
                if ((option == first) == early && !set(option, argv[i + 1])) throw std::runtime_error("unknown option " + option);
            }
        return run();
    } catch (const std::exception& error) {
        std::cerr << name << ": " << error.what() << "\n";
        return 1;
    }
}

/// Memory of this process in MB, by /proc; 0 where there is no such thing.
inline double megabytes_of(const char* kind) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with(kind)) return std::stod(line.substr(std::string(kind).size())) / 1024;
    return 0;
}
/// Forgets earlier peaks, gives freed memory back, and returns what is held now.
inline double reset_peak() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
    std::ofstream("/proc/self/clear_refs") << "5";
    return megabytes_of("VmRSS:");
}
inline double peak_megabytes() { return megabytes_of("VmHWM:"); }

inline std::string clock_text(double seconds) {
    char text[32];
    std::snprintf(text, sizeof text, "%d:%02d", static_cast<int>(seconds) / 60, static_cast<int>(seconds) % 60);
    return text;
}
