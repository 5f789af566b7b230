#pragma once

#include <polyattn/core/config.hpp>

#include <algorithm>
#include <exception>
#include <utility>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

POLYATTN_BEGIN_NAMESPACE

/// Threads that parallel_for may use here: OpenMP's setting, 1 without OpenMP or inside a parallel region, one of a single thread
/// included (OpenMP may trim teams, and a nested team must not outgrow what the outer one was given memory for).
inline int worker_count() {
#if defined(_OPENMP)
    return omp_get_level() > 0 ? 1 : omp_get_max_threads();
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

/// Out of line, so that the body is compiled once for the parallel and the serial loop.
template <class Body>
POLYATTN_NOINLINE void call_body(Body& body, offset_t i, int worker) {
    body(i, worker);
}

}  // namespace detail

/// Calls body(i, worker) once for every i of [0, count), worker < worker_count(). A call inside the body of several is serial. The first
/// exception a body throws is rethrown to the caller after all threads have stopped. Which thread takes which i is open,
/// so a body must not let its result depend on it. On x86 numbers below the smallest normal one count as 0 in a body.
template <class Body>
void parallel_for(offset_t count, Body&& body) {
#if defined(_OPENMP)
    if (count > 1 && worker_count() > 1) {
        std::exception_ptr failure;
        bool failed = false;
#pragma omp parallel
        {
            const detail::FlushDenormals flush;
            const int worker = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
            for (offset_t i = 0; i < count; ++i) {
                bool stop;
#pragma omp atomic read
                stop = failed;
                if (stop) continue;
                try {
                    detail::call_body(body, i, worker);
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
    const detail::FlushDenormals flush;
    for (offset_t i = 0; i < count; ++i) detail::call_body(body, i, 0);
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

}  // namespace detail

POLYATTN_END_NAMESPACE
