#pragma once
// Compressions on the device: rows of tokens to rows of landmarks, the adjoint, and the gradient of a learned table. Every sum has a fixed order.

#include <polyattn/backend/cuda/clusters.cuh>
#include <polyattn/policy/compression/compression.hpp>

#include <cub/block/block_reduce.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

// Forms: what one landmark reads, and what comes back to one token. x(i) and d_y(j) are vectors of columns of rows, `valid` the tokens that there are.

template <class T>
struct MeanForm {
    static constexpr int vector = 16 / sizeof(T);
    index_t length;
    __device__ index_t landmarks(index_t valid) const { return valid / length + (valid % length != 0); }
    __device__ T share(index_t first, index_t valid) const { return 1 / static_cast<T>(min(length, valid - first)); }
    template <class Read>
    __device__ Vector<T> landmark(const Read& x, index_t j, index_t valid) const {
        const index_t first = j * length, count = min(length, valid - first);
        const T factor = share(first, valid);
        Vector<T> sum{};
        for (index_t i = 0; i < count; ++i) {
            const Vector<T> row = x(first + i);
#pragma unroll
            for (int l = 0; l < vector; ++l) sum.at[l] += factor * row.at[l];
        }
        return sum;
    }
    template <class Read, class ReadGradient>
    __device__ Vector<T> token(const Read&, const ReadGradient& d_y, index_t i, index_t valid) const {
        Vector<T> d = d_y(i / length);
        const T factor = share(i - i % length, valid);
#pragma unroll
        for (int l = 0; l < vector; ++l) d.at[l] *= factor;
        return d;
    }
};

/// Means of at most `segments` segments, as long as an item's tokens make them.
template <class T>
struct EvenMeansForm {
    index_t segments;
    Lengths lengths;
    __device__ MeanForm<T> of(index_t item, index_t heads) const {
        const index_t valid = lengths(item / heads);
        return {max(1, valid / segments + (valid % segments != 0))};
    }
};

template <class T>
struct MaxForm {
    static constexpr int vector = 16 / sizeof(T);
    index_t length;
    __device__ index_t landmarks(index_t valid) const { return valid / length + (valid % length != 0); }
    /// The largest entries of a segment, and the tokens where they are first.
    template <class Read>
    __device__ Vector<T> largest(const Read& x, index_t first, index_t valid, index_t (&where)[vector]) const {
        const index_t count = min(length, valid - first);
        Vector<T> most = x(first);
#pragma unroll
        for (int l = 0; l < vector; ++l) where[l] = first;
        for (index_t i = 1; i < count; ++i) {
            const Vector<T> row = x(first + i);
#pragma unroll
            for (int l = 0; l < vector; ++l)
                if (row.at[l] > most.at[l] || row.at[l] != row.at[l]) {  // not a number stays so
                    most.at[l] = row.at[l];
                    where[l] = first + i;
                }
        }
        return most;
    }
    template <class Read>
    __device__ Vector<T> landmark(const Read& x, index_t j, index_t valid) const {
        index_t where[vector];
        return largest(x, j * length, valid, where);
    }
    template <class Read, class ReadGradient>
    __device__ Vector<T> token(const Read& x, const ReadGradient& d_y, index_t i, index_t valid) const {
        index_t where[vector];
        largest(x, i - i % length, valid, where);
        Vector<T> d = d_y(i / length);
#pragma unroll
        for (int l = 0; l < vector; ++l)
            if (where[l] != i) d.at[l] = 0;
        return d;
    }
};

/// Landmark j reads `width` tokens, from token j stride - before on.
template <class T>
struct ConvolutionForm {
    static constexpr int vector = 16 / sizeof(T);
    index_t stride, width;
    const T* weights;
    index_t before = 0, of_head = 0;  // of_head: from the weights of a head to those of the next
    /// That of one item of `heads` heads.
    __device__ ConvolutionForm of(index_t item, index_t heads) const { return {stride, width, weights + item % heads * of_head, before, of_head}; }
    __device__ index_t landmarks(index_t valid) const { return valid / stride + (valid % stride != 0); }
    template <class Read>
    __device__ Vector<T> landmark(const Read& x, index_t j, index_t valid) const {
        const index_t first = j * stride - before, end = min(width, valid - first);
        Vector<T> sum{};
        for (index_t t = max(0, -first); t < end; ++t) add(sum, weights[t], x(first + t));
        return sum;
    }
    template <class Read, class ReadGradient>
    __device__ Vector<T> token(const Read&, const ReadGradient& d_y, index_t i, index_t valid) const {
        const index_t last = i + before, end = min(landmarks(valid), last / stride + 1);
        Vector<T> sum{};
        for (index_t j = last < width ? 0 : (last - width) / stride + 1; j < end; ++j) add(sum, weights[last - j * stride], d_y(j));
        return sum;
    }

private:
    static __device__ void add(Vector<T>& sum, T weight, const Vector<T>& row) {
#pragma unroll
        for (int l = 0; l < vector; ++l) sum.at[l] += weight * row.at[l];
    }
};

/// Means of clusters: of each head of keys the cluster of every token, the tokens by cluster, and where clusters begin in them.
template <class T>
struct ClusterForm {
    static constexpr int vector = 16 / sizeof(T);
    const index_t *cluster, *order, *starts;
    index_t tokens, clusters, key_heads;
    /// That of one item of `heads` heads.
    __device__ ClusterForm of(index_t item, index_t heads) const {
        const offset_t own = offset_t{item / heads} * key_heads + item % heads / (heads / key_heads);
        return {cluster + own * tokens, order + own * tokens, starts + own * (clusters + 1), tokens, clusters, key_heads};
    }
    __device__ index_t landmarks(index_t valid) const { return min(clusters, valid); }
    __device__ T share(index_t j) const { return 1 / static_cast<T>(starts[j + 1] - starts[j]); }
    template <class Read>
    __device__ Vector<T> landmark(const Read& x, index_t j, index_t) const {
        const T factor = share(j);
        Vector<T> sum{};
        for (index_t at = starts[j]; at < starts[j + 1]; ++at) {
            const Vector<T> row = x(order[at]);
#pragma unroll
            for (int l = 0; l < vector; ++l) sum.at[l] += factor * row.at[l];
        }
        return sum;
    }
    template <class Read, class ReadGradient>
    __device__ Vector<T> token(const Read&, const ReadGradient& d_y, index_t i, index_t) const {
        const index_t j = cluster[i];
        Vector<T> d = d_y(j);
        const T factor = share(j);
#pragma unroll
        for (int l = 0; l < vector; ++l) d.at[l] *= factor;
        return d;
    }
};

/// All heads of one call. `landmarks` rows an item, those behind an item's own are 0.
struct CompressionCall {
    index_t batch, heads, tokens, landmarks, columns;  // columns: padded
    Lengths lengths;                                   // of tokens
    cudaStream_t stream;
};

template <class T>
struct CompressArguments {
    Rows<T> x, d_y;
    CompressionCall call;
    index_t first_item;
    Finish<T> finish;
};

template <class Form>
__device__ auto form_of(const Form& form, index_t item, index_t heads) {
    if constexpr (requires { form.of(item, heads); }) return form.of(item, heads);
    else return form;
}

/// A vector of columns of a landmark, or, of the adjoint, of a token.
template <bool Adjoint, class T, class Form>
__global__ void __launch_bounds__(256) compress_rows(const __grid_constant__ CompressArguments<T> a, const __grid_constant__ Form all) {
    constexpr index_t vector = 16 / sizeof(T);
    const offset_t at = offset_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const index_t vectors = a.call.columns / vector;
    if (at >= offset_t{Adjoint ? a.call.tokens : a.call.landmarks} * vectors) return;
    const auto row = static_cast<index_t>(at / vectors), c = static_cast<index_t>(at % vectors) * vector, item = a.first_item + static_cast<index_t>(blockIdx.y);
    const index_t valid = a.call.lengths(item / a.call.heads);
    const auto form = form_of(all, item, a.call.heads);
    const auto x = [&](index_t i) { return load_vector(a.x.head(item) + i * a.x.row_stride + c); };
    Vector<T> made{};
    if constexpr (Adjoint) {
        if (row < valid) made = form.token(x, [&](index_t j) { return load_vector(a.d_y.head(item) + j * a.d_y.row_stride + c); }, row, valid);
    } else if (row < form.landmarks(valid))
        made = form.landmark(x, row, valid);
    a.finish.store(item, row, c, made, true);
}

/// Landmarks of tokens, or, of the adjoint, the other way.
template <bool Adjoint, class T, class Form>
void compress_with(const Form& form, CompressArguments<T> arguments) {
    constexpr index_t vector = 16 / sizeof(T);
    const CompressionCall& call = arguments.call;
    const offset_t vectors = offset_t{Adjoint ? call.tokens : call.landmarks} * (call.columns / vector);
    if (vectors == 0) return;
    for_each_grid(0, call.batch * call.heads, [&](index_t item, unsigned count) {
        arguments.first_item = item;
        launch("compress_rows", compress_rows<Adjoint, T, Form>, dim3(blocks_for(vectors, 256), count), 256, 0, call.stream, arguments, form);
    });
}

template <class T>
struct ProjectArguments {
    const T* table;         // [others][own, padded]
    index_t table_columns;
    Rows<T> from;           // the others
    index_t own, others, columns, heads, first_item;
    Lengths lengths;        // of tokens
    bool adjoint;           // own rows are tokens
    Finish<T> finish;
};

/// A tile of table^T times rows: landmarks of tokens, or of the adjoint tokens of landmarks.
template <class T>
__global__ void __launch_bounds__(tile_threads, 2) project_rows(const __grid_constant__ ProjectArguments<T> a) {
    using S = TileShape<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    T* const weights = reinterpret_cast<T*>(memory);
    T* const rows = weights + S::buffer;
    const index_t first = static_cast<index_t>(blockIdx.x) * S::side, item = a.first_item + static_cast<index_t>(blockIdx.y), panel = static_cast<index_t>(blockIdx.z) * S::width;
    const index_t valid = a.lengths(item / a.heads), end = a.adjoint ? (valid > 0 ? a.others : 0) : min(a.others, valid);
    const Sequence tokens{0, nullptr};
    T sum[S::rows_each][S::values_each] = {};
    for (index_t begin = 0; begin < end; begin += S::side) {
        load_tile(weights, a.table, a.table_columns, tokens, begin, end, first, a.table_columns);
        load_tile(rows, a.from.head(item), a.from.row_stride, tokens, begin, end, panel, a.columns);
        __syncthreads();
        multiply<false>(sum, weights, rows, min(S::side, end - begin), [](int, int) { return true; });
        __syncthreads();
    }
    for_each_row(rows, sum, ~std::uint64_t{0}, [&](int slot, int c, const Vector<T>& value) {
        const index_t row = first + slot;
        if (row < a.own) a.finish.store(item, row, panel + c, a.adjoint && row >= valid ? Vector<T>{} : value, true);
    });
}

// Which (landmark, token) an entry of a table joins.

struct ConvolutionPairs {
    index_t stride, before = 0;
    __device__ index_t count(index_t valid) const { return valid / stride + (valid % stride != 0); }
    __device__ index_t landmark(index_t, index_t pair) const { return pair; }
    __device__ index_t token(index_t entry, index_t pair) const { return pair * stride - before + entry; }
};
struct ProjectionPairs {
    index_t tokens;
    __device__ index_t count(index_t) const { return 1; }
    __device__ index_t landmark(index_t entry, index_t) const { return entry / tokens; }
    __device__ index_t token(index_t entry, index_t) const { return entry % tokens; }
};

template <class T>
struct TableGradientArguments {
    Rows<T> x, d_y;
    CompressionCall call;
    index_t entries, parts;
    double* sums;  // [parts][entries]
    bool first;    // nothing is in the sums
};

inline constexpr int table_threads = 128;

/// One entry's sum over a part of the heads, a block each.
template <class T, class Pairs>
__global__ void __launch_bounds__(table_threads) table_gradient(const __grid_constant__ TableGradientArguments<T> a, const __grid_constant__ Pairs pairs) {
    using Reduce = cub::BlockReduce<double, table_threads>;
    __shared__ typename Reduce::TempStorage storage;
    const auto entry = static_cast<index_t>(blockIdx.x) % a.entries, part = static_cast<index_t>(blockIdx.x) / a.entries;
    const offset_t items = offset_t{a.call.batch} * a.call.heads;
    double sum = 0;
    for (auto item = static_cast<index_t>(items * part / a.parts); item < static_cast<index_t>(items * (part + 1) / a.parts); ++item) {
        const index_t valid = a.call.lengths(item / a.call.heads);
        const T* const x = a.x.head(item);
        const T* const d_y = a.d_y.head(item);
        const offset_t terms = offset_t{pairs.count(valid)} * a.call.columns;
        for (offset_t at = threadIdx.x; at < terms; at += table_threads) {
            const auto pair = static_cast<index_t>(at / a.call.columns), c = static_cast<index_t>(at % a.call.columns), token = pairs.token(entry, pair);
            if (token >= 0 && token < valid) sum += double(d_y[pairs.landmark(entry, pair) * a.d_y.row_stride + c]) * double(x[token * a.x.row_stride + c]);
        }
    }
    const double total = Reduce(storage).Sum(sum);
    if (threadIdx.x == 0) {
        double& to = a.sums[blockIdx.x];
        to = a.first ? total : to + total;
    }
}

template <class Compression>
inline constexpr index_t max_length = 0;
template <index_t L>
inline constexpr index_t max_length<SegmentMax<L>> = L;

/// A compression with its table in device memory.
template <class T, class Compression>
class DeviceCompression {
    static constexpr bool convolves = std::is_same_v<Compression, StridedConvolution>, projects = std::is_same_v<Compression, LinearProjection>;
    static constexpr bool learned = convolves || projects;
    static constexpr bool takes_means = segment_lengths<Compression> == 1;
    static constexpr bool takes_maxima = max_length<Compression> > 0, clusters = std::is_same_v<Compression, KMeans>;
    static_assert(learned || takes_means || takes_maxima || clusters,
                  "polyattn::Attention: Cuda has the compressions SegmentMeans<L>, SegmentMax<L>, StridedConvolution, LinearProjection and KMeans; own ones need Simd<> or Reference");

public:
    /// For calls like that of the keys, and at most `heads` heads. The carver may only count.
    DeviceCompression([[maybe_unused]] Carver& carver, const Compression& compression, const CompressionCall& keys, [[maybe_unused]] index_t heads, [[maybe_unused]] bool backward)
        : compression_(&compression), key_heads_(keys.heads), tokens_(keys.tokens) {
        [[maybe_unused]] const index_t tokens = tokens_;
        [[maybe_unused]] const cudaStream_t stream = keys.stream;
        if constexpr (clusters) {
            entries_ = keys.landmarks;
            index_t* const cluster = carver.template take<index_t>(offset_t{keys.batch} * keys.heads * tokens);
            clusters_ = DeviceClusters<T>(carver, keys.batch, keys.heads, tokens, entries_, keys.columns, cluster);
        }
        if constexpr (convolves) {
            entries_ = compression.width;
            to_landmarks_ = put(carver, 1, entries_, [&](index_t, index_t t, std::size_t what) { return what * static_cast<std::size_t>(entries_) + static_cast<std::size_t>(t); }, stream);
        } else if constexpr (projects) {
            const offset_t entries = offset_t{compression.rows} * compression.tokens;
            require(entries <= std::numeric_limits<index_t>::max(), "compression", [] { return text("a matrix of at most ", std::numeric_limits<index_t>::max(), " entries on the device"); }, entries);
            entries_ = static_cast<index_t>(entries);
            const auto at = [&](index_t j, index_t i, std::size_t what) { return what * static_cast<std::size_t>(entries_) + static_cast<std::size_t>(j) * static_cast<std::size_t>(compression.tokens) + static_cast<std::size_t>(i); };
            to_landmarks_ = put(carver, tokens, compression.rows, [&](index_t i, index_t j, std::size_t what) { return at(j, i, what); }, stream);
            if (backward) to_tokens_ = put(carver, compression.rows, tokens, at, stream);
        }
        if (learned && backward) {
            // Many entries are work enough.
            parts_ = entries_ >= 256 ? 1 : static_cast<index_t>(std::clamp<offset_t>(offset_t{keys.batch} * heads, 1, 64));
            sums_ = carver.template take<double>(offset_t{2} * parts_ * entries_);
        }
    }

    /// What compress() needs to know of the keys; once a pass.
    void look_at_keys([[maybe_unused]] const CompressionCall& call, [[maybe_unused]] const Rows<T>& keys) const {
        if constexpr (clusters) clusters_.find(keys, call.lengths, compression_->iterations, call.stream);
    }
    /// Landmarks of x, [items][landmarks][columns].
    void compress(const CompressionCall& call, Compressed what, const Rows<T>& x, T* to) const {
        const Finish<T> finish = packed_finish(to, call.landmarks, call.columns, call.heads);
        if constexpr (projects) project(call, what, x, finish, false);
        else compress_with<false>(form(what), CompressArguments<T>{x, {}, call, 0, finish});
    }
    /// finish(adjoint of d_y), rows of tokens; x is what was compressed.
    void adjoint(const CompressionCall& call, Compressed what, const Rows<T>& x, const Rows<T>& d_y, const Finish<T>& finish) const {
        if constexpr (projects) project(call, what, d_y, finish, true);
        else compress_with<true>(form(what), CompressArguments<T>{x, d_y, call, 0, finish});
    }
    /// To, or onto, the sums of a table's gradient.
    void add_table_gradient(const CompressionCall& call, Compressed what, const Rows<T>& x, const Rows<T>& d_y, bool first) const {
        if constexpr (learned) {
            TableGradientArguments<T> arguments{x, d_y, call, entries_, parts_, sums_ + (what == Compressed::keys ? 0 : offset_t{parts_} * entries_), first};
            const dim3 grid(static_cast<unsigned>(entries_) * static_cast<unsigned>(parts_));
            if constexpr (projects) launch("table_gradient", table_gradient<T, ProjectionPairs>, grid, table_threads, 0, call.stream, arguments, ProjectionPairs{compression_->tokens});
            else launch("table_gradient", table_gradient<T, ConvolutionPairs>, grid, table_threads, 0, call.stream, arguments, ConvolutionPairs{compression_->stride});
        }
    }
    /// The table's gradient on the host: waits for the stream.
    void read_table_gradient(std::vector<double>& gradient, cudaStream_t stream) const {
        if constexpr (learned) {
            std::vector<double> sums(static_cast<std::size_t>(2 * parts_) * static_cast<std::size_t>(entries_));
            check_cuda(cudaMemcpyAsync(sums.data(), sums_, sums.size() * sizeof(double), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of a table's gradient");
            check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
            const auto entries = static_cast<std::size_t>(entries_), half = entries * static_cast<std::size_t>(parts_);
            for (std::size_t at = 0; at < sums.size(); ++at) gradient[at / half * entries + at % entries] += sums[at];
        }
    }

private:
    /// [keys, values][rows][columns, padded], entry (row, column) from where(row, column, what) in the table.
    template <class Where>
    T* put(Carver& carver, index_t rows, index_t columns, Where&& where, cudaStream_t stream) const {
        const index_t width = padded<T>(columns);
        T* const to = carver.template take<T>(offset_t{2} * rows * width);
        if (carver.counts() || rows == 0) return to;
        std::vector<T> made(2 * static_cast<std::size_t>(rows) * static_cast<std::size_t>(width), T(0));
        for (std::size_t what = 0; what < 2; ++what)
            for (index_t r = 0; r < rows; ++r)
                for (index_t c = 0; c < columns; ++c)
                    made[(what * static_cast<std::size_t>(rows) + static_cast<std::size_t>(r)) * static_cast<std::size_t>(width) + static_cast<std::size_t>(c)] = static_cast<T>(compression_->table[where(r, c, what)]);
        check_cuda(cudaMemcpyAsync(to, made.data(), made.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync of a compression's table");
        return to;
    }
    auto form([[maybe_unused]] Compressed what) const {
        if constexpr (takes_means) return MeanForm<T>{Compression::lengths[0]};
        else if constexpr (takes_maxima) return MaxForm<T>{max_length<Compression>};
        else if constexpr (clusters) return ClusterForm<T>{clusters_.cluster(), clusters_.order(), clusters_.starts(), tokens_, entries_, key_heads_};
        else if constexpr (!learned) return MeanForm<T>{1};  // of what is refused above
        else return ConvolutionForm<T>{compression_->stride, compression_->width, to_landmarks_ + (what == Compressed::keys ? 0 : padded<T>(entries_))};
    }
    void project(const CompressionCall& call, Compressed what, const Rows<T>& from, const Finish<T>& finish, bool adjoint) const {
        using S = TileShape<T>;
        const index_t own = adjoint ? call.tokens : call.landmarks, others = adjoint ? call.landmarks : call.tokens, width = padded<T>(own);
        if (own == 0 || call.columns == 0) return;
        ProjectArguments<T> arguments{(adjoint ? to_tokens_ : to_landmarks_) + (what == Compressed::keys ? 0 : offset_t{others} * width), width, from, own, others, call.columns, call.heads, 0, call.lengths, adjoint, finish};
        for_each_grid(0, call.batch * call.heads, [&](index_t item, unsigned count) {
            arguments.first_item = item;
            launch("project_rows", project_rows<T>, dim3(blocks_for(own, S::side), count, blocks_for(call.columns, S::width)), tile_threads, 2 * S::buffer * sizeof(T), call.stream, arguments);
        });
    }

    const Compression* compression_;
    index_t key_heads_, tokens_, entries_ = 0, parts_ = 1;  // entries of a half of the table, or clusters
    T *to_landmarks_ = nullptr, *to_tokens_ = nullptr;
    double* sums_ = nullptr;                                // of the table's gradient
    DeviceClusters<T> clusters_;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
