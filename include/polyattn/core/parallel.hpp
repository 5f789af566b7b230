#pragma once

#include <polyattn/core/config.hpp>

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// While it lives, this thread works alone.
class OneThread {
public:
    OneThread() : before_(std::exchange(works_alone, true)) {}
    ~OneThread() { works_alone = before_; }
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;
    static bool here() { return works_alone; }

private:
    static inline thread_local bool works_alone = false;
    bool before_;
};

}  // namespace detail

/// Threads that parallel_for may use here: OpenMP's setting, 1 without OpenMP, inside a parallel region, one of a single thread
/// included (OpenMP may trim teams, and a nested team must not outgrow what the outer one was given memory for), and where a layer
/// works on a head with one thread.
inline int worker_count() {
#if defined(_OPENMP)
    return omp_get_level() > 0 || detail::OneThread::here() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

namespace detail {

/// While it lives, numbers below the smallest normal one count as 0 on this thread, as results and as operands. x86 takes a hundred cycles and more for each operation
/// that meets one, and weights far down the tail of a softmax, their gradients and the squares of an optimiser meet them all the time. Nothing on other processors.
class FlushDenormals {
public:
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
#if defined(__SSE__)
    FlushDenormals() : before_(_mm_getcsr() & modes) {
        if (before_ != modes) _mm_setcsr(_mm_getcsr() | modes);
    }
    ~FlushDenormals() {
        if (before_ != modes) _mm_setcsr((_mm_getcsr() & ~modes) | before_);
    }

private:
    static constexpr unsigned modes = 0x8040;  // flush to zero, denormals are zero
    unsigned before_;
#else
    FlushDenormals() {}
#endif
};

/// A body of any type, by address: the machinery around it is compiled once for all of them.
struct Body {
    const void* object;
    void (*call)(const void* object, offset_t i, int worker);
};

POLYATTN_NOINLINE inline void run_parallel(offset_t count, Body body) {
#if defined(_OPENMP)
    if (count > 1 && worker_count() > 1) {
        std::exception_ptr failure;
        bool failed = false;
#pragma omp parallel
        {
            const FlushDenormals flush;
            const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
            for (offset_t i = 0; i < count; ++i) {
                bool stop;
#pragma omp atomic read
                stop = failed;
                if (stop) continue;
                try {
                    body.call(body.object, i, worker);
                } catch (...) {
#pragma omp critical(polyattn_failure)
                    if (!failure) failure = std::current_exception();
#pragma omp atomic write
                    failed = true;
                }
            }
        }
        if (failure) std::rethrow_exception(failure);
        return;
    }
#endif
    const FlushDenormals flush;
    for (offset_t i = 0; i < count; ++i) body.call(body.object, i, 0);
}

}  // namespace detail

/// Calls body(i, worker) once for every i of [0, count), worker < worker_count(). A call inside the body of several is serial. The first
/// exception a body throws is rethrown to the caller after all threads have stopped. Which thread takes which i is open,
/// so a body must not let its result depend on it. On x86 numbers below the smallest normal one count as 0 in a body.
template <class F>
void parallel_for(offset_t count, F&& body) {
    const auto call = [&](offset_t i, int worker) { body(i, worker); };
    using Call = decltype(call);
    detail::run_parallel(count, {&call, [](const void* object, offset_t i, int worker) { (*static_cast<Call*>(object))(i, worker); }});
}

namespace detail {

/// Calls f(i) for the rows [0, count), in parallel, several at a time.
template <class F>
void parallel_rows(index_t count, F&& f) {
    constexpr index_t unit = 64;
    parallel_for((count + unit - 1) / unit, [&](offset_t u, int) {
        const auto first = static_cast<index_t>(u) * unit;
        for (index_t i = first; i < std::min(first + unit, count); ++i) f(i);
    });
}

/// What a head takes: floating-point operations, and how often threads that share them wait for each other.
struct Work {
    static constexpr double serial = std::numeric_limits<double>::max();  // meetings of what one thread has to do
    static constexpr double meeting = 2e6;                                // operations in the time that one takes

    double flops, meetings;

    Work times(double count) const { return {flops * count, meetings == serial ? serial : meetings * count}; }
    /// Of `items` such heads, fewer than `threads`: one after the other with all threads inside is faster than side by side.
    bool gains_from_threads(offset_t items, int threads) const {
        if (meetings == serial) return false;
        const double spared = flops * (1 - static_cast<double>(items) / threads);
        return spared > static_cast<double>(items) * meeting * meetings;
    }
    /// Too little of it to wake threads for.
    bool is_little(offset_t items) const { return flops * static_cast<double>(items) < meeting / 4; }
};

}  // namespace detail

POLYATTN_END_NAMESPACE
