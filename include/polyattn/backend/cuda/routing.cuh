#pragma once
// Routes of AdaMRA's router: which resolution each row goes to, and the rows sorted by (resolution, batch item, place), as the CPU's layer has them.

#include <polyattn/backend/cuda/tile.cuh>

#include <cub/device/device_radix_sort.cuh>

#include <bit>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// What kernels see of a batch's rows, [batch x tokens].
struct RoutedRows {
    index_t batch, tokens, resolutions;
    Lengths lengths;
    __host__ __device__ index_t rows() const { return batch * tokens; }
    __host__ __device__ index_t buckets() const { return resolutions * batch; }
    __device__ bool valid(index_t row) const { return row % tokens < lengths(row / tokens); }
};

/// The highest logit's resolution, the first of equal ones, -1 for padding; and softmax of the logits, 0 for padding. Both may be the same memory.
template <class T>
__global__ void choose_routes(const __grid_constant__ RoutedRows rows, const T* logits, T* probabilities, index_t* routes) {
    const auto row = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows.rows()) return;
    const T* const x = logits + row * rows.resolutions;
    T* const p = probabilities + row * rows.resolutions;
    if (!rows.valid(static_cast<index_t>(row))) {
        routes[row] = -1;
        for (index_t h = 0; h < rows.resolutions; ++h) p[h] = 0;
        return;
    }
    index_t chosen = 0;
    for (index_t h = 1; h < rows.resolutions; ++h)
        if (x[h] > x[chosen]) chosen = h;
    const T highest = x[chosen];
    T sum = 0;
    for (index_t h = 0; h < rows.resolutions; ++h) sum += p[h] = exp(x[h] - highest);
    for (index_t h = 0; h < rows.resolutions; ++h) p[h] /= sum;
    routes[row] = chosen;
}

/// RandomRoute: a function of (seed, draw, row).
template <class Index>
__global__ void draw_routes(const __grid_constant__ RoutedRows rows, std::uint64_t seed, std::uint32_t draw, Index* routes) {
    const auto row = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows.rows()) return;
    routes[row] = rows.valid(static_cast<index_t>(row)) ? static_cast<Index>(RandomRow(seed, static_cast<std::uint32_t>(row), random_stream::random_routes, draw).below(static_cast<std::uint32_t>(rows.resolutions))) : -1;
}

/// ConcatenateAll: 0, or -1 for padding.
template <class Index>
__global__ void mark_valid_rows(const __grid_constant__ RoutedRows rows, Index* routes) {
    const auto row = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row < rows.rows()) routes[row] = rows.valid(static_cast<index_t>(row)) ? 0 : -1;
}

/// What is sorted: the bucket of each row, or, of a row that goes to all resolutions, one for each; padding comes last.
template <class Key>
__global__ void make_bucket_keys(const __grid_constant__ RoutedRows rows, bool all, const index_t* routes, Key* keys, index_t* values, offset_t count) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const auto row = static_cast<index_t>(at % rows.rows()), copy = static_cast<index_t>(at / rows.rows()), route = routes[row];
    keys[at] = static_cast<Key>(route < 0 ? rows.buckets() : (all ? copy : route) * rows.batch + row / rows.tokens);
    values[at] = row;
}

/// The first place of each bucket's keys, and the end of the last.
template <class Key>
__global__ void find_bucket_starts(const Key* sorted, offset_t count, index_t buckets, index_t* starts) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at > count) return;
    const auto before = at == 0 ? index_t{-1} : static_cast<index_t>(sorted[at - 1]), own = at == count ? buckets : static_cast<index_t>(sorted[at]);
    for (index_t bucket = before + 1; bucket <= own; ++bucket) starts[bucket] = static_cast<index_t>(at);
}

/// How many rows each bucket has.
template <class Index>
__global__ void count_bucket_rows(const Index* starts, Index buckets, Index* counts) {
    const auto bucket = static_cast<Index>(blockIdx.x * blockDim.x + threadIdx.x);
    if (bucket < buckets) counts[bucket] = starts[bucket + 1] - starts[bucket];
}

/// Where the rows of a batch go; with `all`, every row to each resolution.
struct Routes {
    RoutedRows rows;
    bool all;
    index_t* of_rows;  // [rows], -1 for padding
    index_t* order;    // rows by (resolution, batch item, place), as many as the last start says; padding behind
    index_t* starts;   // [resolutions x batch + 1]: of each (resolution, batch item) in `order`
    index_t* counts;   // [resolutions x batch]

    offset_t count() const { return offset_t{rows.rows()} * (all ? rows.resolutions : 1); }
    /// The carver may only count.
    static Routes take(Carver& carver, const RoutedRows& rows, bool all) {
        Routes made{rows, all, carver.take<index_t>(rows.rows()), nullptr, nullptr, nullptr};
        made.order = carver.take<index_t>(made.count());
        made.starts = carver.take<index_t>(offset_t{rows.buckets()} + 1);
        made.counts = carver.take<index_t>(rows.buckets());
        return made;
    }
};

/// Makes routes. Stable, without atomics. O(rows).
class Routing {
public:
    /// The carver is for scratch memory and may only count.
    Routing(Carver& carver, const Routes& routes, cudaStream_t stream) : routes_(routes), count_(routes.count()), stream_(stream) {
        keys_ = carver.take<std::uint32_t>(count_);
        sorted_ = carver.take<std::uint32_t>(count_);
        values_ = carver.take<index_t>(count_);
        if (count_ > 0) check_cuda(sort_pairs(nullptr), "cub::DeviceRadixSort");
        memory_ = carver.take<std::byte>(static_cast<offset_t>(bytes_));
    }

    /// Of logits [rows][resolutions].
    template <class T>
    void choose(const T* logits, T* probabilities) const {
        if (rows() > 0) launch("choose_routes", choose_routes<T>, grid(rows()), threads, 0, stream_, routes_.rows, logits, probabilities, routes_.of_rows);
    }
    void draw(std::uint64_t seed, const Draw& draw) const {
        if (rows() > 0) launch("draw_routes", draw_routes<index_t>, grid(rows()), threads, 0, stream_, routes_.rows, seed, draw.hash(), routes_.of_rows);
    }
    void send_to_all() const {
        if (rows() > 0) launch("mark_valid_rows", mark_valid_rows<index_t>, grid(rows()), threads, 0, stream_, routes_.rows, routes_.of_rows);
    }
    /// After one of these.
    void sort() {
        const index_t buckets = routes_.rows.buckets();
        if (count_ > 0) {
            launch("make_bucket_keys", make_bucket_keys<std::uint32_t>, grid(count_), threads, 0, stream_, routes_.rows, routes_.all, static_cast<const index_t*>(routes_.of_rows), keys_, values_, count_);
            check_cuda(sort_pairs(memory_), "cub::DeviceRadixSort");
        }
        launch("find_bucket_starts", find_bucket_starts<std::uint32_t>, grid(count_ + 1), threads, 0, stream_, static_cast<const std::uint32_t*>(sorted_), count_, buckets, routes_.starts);
        if (buckets > 0) launch("count_bucket_rows", count_bucket_rows<index_t>, grid(buckets), threads, 0, stream_, static_cast<const index_t*>(routes_.starts), buckets, routes_.counts);
    }

private:
    static constexpr int threads = 256;
    static dim3 grid(offset_t count) { return dim3(blocks_for(count, threads)); }
    index_t rows() const { return routes_.rows.rows(); }
    cudaError_t sort_pairs(void* memory) {
        return cub::DeviceRadixSort::SortPairs(memory, bytes_, static_cast<const std::uint32_t*>(keys_), sorted_, static_cast<const index_t*>(values_), routes_.order, count_, 0,
                                               std::bit_width(static_cast<unsigned>(routes_.rows.buckets())), stream_);
    }

    Routes routes_;
    offset_t count_;
    cudaStream_t stream_;
    index_t* values_;
    std::uint32_t *keys_, *sorted_;
    std::byte* memory_ = nullptr;
    std::size_t bytes_ = 0;
};

/// What rows are multiplied with on their way.
template <class T>
struct RowFactors {
    const T* gates = nullptr;  // [rows][resolutions]; null: 1
    CallDropout dropout{};     // of values, with draws, by sub-head
    index_t head_columns = 1;
};

/// The rows of one resolution, [batch][places], and all rows, where they belong.
template <class T>
struct BucketRows {
    RoutedRows rows;
    const index_t *order, *starts;
    index_t resolution, places, columns;
    T *bucket, *all;
    offset_t bucket_stride, all_stride;  // from row to row
    RowFactors<T> factors;
    bool adds;  // scattered rows are added to what is there

    /// The row at a place of an item, or -1.
    __device__ index_t row(index_t item, index_t place) const {
        const index_t begin = starts[resolution * rows.batch + item], end = starts[resolution * rows.batch + item + 1];
        return place < end - begin ? order[begin + place] : -1;
    }
    __device__ T factor(index_t item, index_t row, index_t place, index_t column) const {
        T mask[1] = {1};
        if (factors.dropout.drops_values())
            factors.dropout.of_head(item, column / factors.head_columns).values(0, place, column % factors.head_columns, mask);
        return factors.gates ? factors.gates[offset_t{row} * rows.resolutions + resolution] * mask[0] : mask[0];
    }
};

/// Rows to a resolution; places without a row become 0.
template <class T>
__global__ void gather_rows(const __grid_constant__ BucketRows<T> a) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= offset_t{a.places} * a.columns) return;
    const auto item = static_cast<index_t>(blockIdx.y), place = static_cast<index_t>(at / a.columns), column = static_cast<index_t>(at % a.columns), row = a.row(item, place);
    a.bucket[(offset_t{item} * a.places + place) * a.bucket_stride + column] = row < 0 ? T(0) : a.factor(item, row, place, column) * a.all[row * a.all_stride + column];
}
/// And back, a row at most once; rows of other resolutions stay as they are.
template <class T>
__global__ void scatter_rows(const __grid_constant__ BucketRows<T> a) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= offset_t{a.places} * a.columns) return;
    const auto item = static_cast<index_t>(blockIdx.y), place = static_cast<index_t>(at / a.columns), column = static_cast<index_t>(at % a.columns), row = a.row(item, place);
    if (row < 0) return;
    T& to = a.all[row * a.all_stride + column];
    const T value = a.factor(item, row, place, column) * a.bucket[(offset_t{item} * a.places + place) * a.bucket_stride + column];
    to = a.adds ? to + value : value;
}

/// One of the two kernels, on all batch items.
template <class T>
void move_rows(const char* name, void (*kernel)(BucketRows<T>), const BucketRows<T>& rows, cudaStream_t stream) {
    const offset_t count = offset_t{rows.places} * rows.columns;
    if (count == 0 || rows.rows.batch == 0) return;
    require(rows.rows.batch <= 65535, "batch", "at most 65535 items", rows.rows.batch);
    launch(name, kernel, dim3(blocks_for(count, 256), static_cast<unsigned>(rows.rows.batch)), 256, 0, stream, rows);
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
