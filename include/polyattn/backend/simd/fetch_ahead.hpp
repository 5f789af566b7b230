#pragma once

#include <polyattn/backend/simd/vector.hpp>
#include <polyattn/core/view.hpp>

#include <span>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// Lines one behind the other, which a tile fetches between its steps.
template <class T>
struct LineRun {
    const T* at;
    std::ptrdiff_t distance;

    POLYATTN_ALWAYS_INLINE void fetch() {
        prefetch(at);
        at += distance;
    }
};

/// Rows that will be wanted next, fetched a few lines at a time, so that memory works while tiles compute.
template <class T>
class NextRows {
public:
    NextRows() = default;
    NextRows(const T* first, std::ptrdiff_t stride, index_t rows, index_t columns) : at_(first), end_(first + columns), stride_(stride), rows_(rows), size_(columns) {
        if (stride == columns) {  // one long row
            rows_ = std::min(rows, 1);
            size_ *= rows;
            end_ = first + size_;
        }
    }
    bool empty() const { return rows_ == 0; }
    /// All rows in so many equal steps, which leave up to `run` lines of one long row to the caller.
    void spread(offset_t steps, offset_t run = 0) {
        const offset_t lines = (size_ + cache_line<T> - 1) / cache_line<T> * rows_;
        step_ = steps > 0 ? (lines + steps - 1) / steps : 0;
        run_ = rows_ == 1 ? std::min(step_, run) : 0;
        step_ -= run_;
    }
    /// A step, and the lines that are left to the caller, who may fetch more of them: the next run's. `own`: what it reads anyway, for when nothing is left.
    POLYATTN_ALWAYS_INLINE LineRun<T> next_run(const T* own) {
        step();
        if (run_ == 0 || rows_ == 0) return {own, 0};
        const LineRun<T> run{at_, cache_line<T>};
        at_ += run_ * cache_line<T>;
        if (at_ >= end_) rows_ = 0;
        return run;
    }
    POLYATTN_ALWAYS_INLINE void step() {
        for (offset_t lines = step_; lines > 0 && rows_ > 0; --lines) line();
    }
    /// One line, which will be written to if `Write`.
    template <bool Write = false>
    POLYATTN_ALWAYS_INLINE void line() {
        if (rows_ == 0) return;
        prefetch<Write>(at_);
        at_ += cache_line<T>;
        if (at_ < end_) return;
        at_ = end_ + (stride_ - size_);
        end_ += stride_;
        --rows_;
    }

private:
    const T *at_ = nullptr, *end_ = nullptr;  // the next line, and the end of its row
    std::ptrdiff_t stride_ = 0;
    index_t rows_ = 0;                        // that are left
    offset_t size_ = 0, step_ = 0, run_ = 0;  // of a row, of a step and a run in lines
};

/// Rows of which a tile fetches a line between its steps.
template <class T, bool Write = false>
struct LinesOf {
    NextRows<T>* rows;

    POLYATTN_ALWAYS_INLINE void fetch() { rows->template line<Write>(); }
};

/// What is wanted after the work at hand, fetched beside it: the next head of many short ones, the next block of long ones.
template <class T>
class FetchAhead {
public:
    static constexpr std::size_t most_matrices = 8;

    /// `calls` calls of operator() fetch all of `matrices`; nothing where they would push what is at hand out of the second-level cache.
    void start(std::span<const MatrixView<const T>> matrices, offset_t calls) {
        constexpr offset_t most_values = (offset_t{256} << 10) / static_cast<offset_t>(sizeof(T));
        count_ = 0;
        offset_t values = 0;
        for (const MatrixView<const T>& matrix : matrices) {
            if (matrix.col_stride != 1) return;
            values += offset_t{matrix.rows} * matrix.cols;
        }
        if (values > most_values) return;
        for (const MatrixView<const T>& matrix : matrices) {
            rows_[count_] = NextRows<T>(matrix.data, matrix.row_stride, matrix.rows, matrix.cols);
            rows_[count_++].spread(calls);
        }
    }

    POLYATTN_ALWAYS_INLINE void operator()() {
        if (count_ > 0) step();
    }

private:
    POLYATTN_NOINLINE void step() {
        for (std::size_t i = 0; i < count_; ++i) rows_[i].step();
    }

    NextRows<T> rows_[most_matrices];
    std::size_t count_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
