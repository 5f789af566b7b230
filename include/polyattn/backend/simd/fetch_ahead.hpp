#pragma once

#include <polyattn/backend/simd/vector.hpp>
#include <polyattn/core/view.hpp>

#include <span>

POLYATTN_BEGIN_NAMESPACE

namespace detail::simd {

/// What is wanted next, fetched some lines at a time while something else is worked on: the next head of many short ones, the next block of long ones.
template <class T>
class FetchAhead {
public:
    static constexpr std::size_t most_matrices = 8;

    /// `calls` calls of operator() fetch all of `matrices`; nothing where they would push what is at hand out of the second-level cache.
    void start(std::span<const MatrixView<const T>> matrices, offset_t calls) {
        count_ = 0;
        offset_t lines = 0;
        for (const MatrixView<const T>& matrix : matrices) {
            if (matrix.col_stride != 1) return;
            lines += offset_t{matrix.rows} * matrix.cols / values_of_line;
        }
        if (lines > most_lines || calls == 0) return;
        for (const MatrixView<const T>& matrix : matrices.first(std::min(matrices.size(), most_matrices))) cursors_[count_++].start(matrix, calls);
    }

    POLYATTN_ALWAYS_INLINE void operator()() {
        if (count_ > 0) fetch();
    }

private:
    static constexpr offset_t most_lines = 4096;  // 256 KiB
    static constexpr index_t values_of_line = 64 / static_cast<index_t>(sizeof(T));

    struct Cursor {
        const T *at, *row;     // the next line, and the row that it is in
        index_t rows;          // that are left
        offset_t size;         // of a row
        std::ptrdiff_t stride;
        offset_t lines_a_call;

        /// Rows that follow one another are one.
        void start(const MatrixView<const T>& matrix, offset_t calls) {
            const bool whole = matrix.row_stride == matrix.cols;
            at = row = matrix.data;
            rows = whole ? 1 : matrix.rows;
            size = whole ? offset_t{matrix.rows} * matrix.cols : offset_t{matrix.cols};
            stride = matrix.row_stride;
            lines_a_call = (offset_t{matrix.rows} * matrix.cols / values_of_line + calls - 1) / calls;
        }
        void fetch() {
            for (offset_t lines = lines_a_call; lines > 0 && rows > 0;) {
                const T* const end = row + size;
                for (; at < end && lines > 0; at += values_of_line, --lines) prefetch(at);
                if (at < end) return;
                at = row += stride;
                --rows;
            }
        }
    };

    POLYATTN_NOINLINE void fetch() {
        for (std::size_t m = 0; m < count_; ++m) cursors_[m].fetch();
    }

    Cursor cursors_[most_matrices];
    std::size_t count_ = 0;
};

}  // namespace detail::simd

POLYATTN_END_NAMESPACE
