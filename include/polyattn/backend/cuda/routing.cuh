#pragma once
// Routes of AdaMRA's router: which resolution each row goes to, and the rows sorted by (resolution, batch item, place), as the CPU's layer has them.

#include <polyattn/backend/cuda/tile.cuh>
#include <polyattn/core/rng.hpp>

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

/// Routes of one batch. Stable, without atomics. O(rows).
class Routing {
public:
    /// With `all`, every row goes to each resolution. The carver may only count.
    Routing(Carver& carver, const RoutedRows& rows, bool all, cudaStream_t stream) : rows_(rows), all_(all), count_(offset_t{rows.rows()} * (all ? rows.resolutions : 1)), stream_(stream) {
        routes_ = carver.take<index_t>(rows.rows());
        order_ = carver.take<index_t>(count_);
        starts_ = carver.take<index_t>(offset_t{rows.buckets()} + 1);
        keys_ = carver.take<std::uint32_t>(count_);
        sorted_ = carver.take<std::uint32_t>(count_);
        values_ = carver.take<index_t>(count_);
        if (count_ > 0) check_cuda(sort_pairs(nullptr), "cub::DeviceRadixSort");
        memory_ = carver.take<std::byte>(static_cast<offset_t>(bytes_));
    }

    /// Of logits [rows][resolutions].
    template <class T>
    void choose(const T* logits, T* probabilities) const {
        if (rows_.rows() > 0) launch("choose_routes", choose_routes<T>, grid(rows_.rows()), threads, 0, stream_, rows_, logits, probabilities, routes_);
    }
    void draw(std::uint64_t seed, const Draw& draw) const {
        if (rows_.rows() > 0) launch("draw_routes", draw_routes<index_t>, grid(rows_.rows()), threads, 0, stream_, rows_, seed, draw.hash(), routes_);
    }
    void send_to_all() const {
        if (rows_.rows() > 0) launch("mark_valid_rows", mark_valid_rows<index_t>, grid(rows_.rows()), threads, 0, stream_, rows_, routes_);
    }
    /// After one of these.
    void sort() {
        if (count_ > 0) {
            launch("make_bucket_keys", make_bucket_keys<std::uint32_t>, grid(count_), threads, 0, stream_, rows_, all_, static_cast<const index_t*>(routes_), keys_, values_, count_);
            check_cuda(sort_pairs(memory_), "cub::DeviceRadixSort");
        }
        launch("find_bucket_starts", find_bucket_starts<std::uint32_t>, grid(count_ + 1), threads, 0, stream_, static_cast<const std::uint32_t*>(sorted_), count_, rows_.buckets(), starts_);
    }

    const RoutedRows& rows() const { return rows_; }
    bool all() const { return all_; }
    offset_t count() const { return count_; }
    cudaStream_t stream() const { return stream_; }
    /// [rows], -1 for padding.
    const index_t* routes() const { return routes_; }
    /// Rows by (resolution, batch item, place), so many as the last start says; padding behind.
    const index_t* order() const { return order_; }
    /// [resolutions x batch + 1].
    const index_t* starts() const { return starts_; }

private:
    static constexpr int threads = 256;
    static dim3 grid(offset_t count) { return dim3(blocks_for(count, threads)); }
    cudaError_t sort_pairs(void* memory) {
        return cub::DeviceRadixSort::SortPairs(memory, bytes_, static_cast<const std::uint32_t*>(keys_), sorted_, static_cast<const index_t*>(values_), order_, count_, 0, std::bit_width(static_cast<unsigned>(rows_.buckets())), stream_);
    }

    RoutedRows rows_;
    bool all_;
    offset_t count_;
    cudaStream_t stream_;
    index_t *routes_, *order_, *starts_, *values_;
    std::uint32_t *keys_, *sorted_;
    std::byte* memory_ = nullptr;
    std::size_t bytes_ = 0;
};

/// The rows of one resolution, [batch][places][columns], and all rows, where they belong.
template <class T>
struct BucketRows {
    RoutedRows rows;
    const index_t *order, *starts;
    index_t resolution, places, columns;
    T* bucket;
    T* all;               // rows as long as all_stride
    offset_t all_stride;
    const T* gates;       // [rows][resolutions]: what a row is multiplied with on its way back; null: 1

    /// The row at a place of an item, or -1.
    __device__ index_t row(index_t item, index_t place) const {
        const index_t begin = starts[resolution * rows.batch + item], end = starts[resolution * rows.batch + item + 1];
        return place < end - begin ? order[begin + place] : -1;
    }
};

/// Rows to a resolution; places without a row become 0.
template <class T>
__global__ void gather_rows(const __grid_constant__ BucketRows<T> a) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= offset_t{a.places} * a.columns) return;
    const auto item = static_cast<index_t>(blockIdx.y), row = a.row(item, static_cast<index_t>(at / a.columns));
    a.bucket[item * offset_t{a.places} * a.columns + at] = row < 0 ? T(0) : a.all[row * a.all_stride + at % a.columns];
}
/// And back; rows of other resolutions stay as they are.
template <class T>
__global__ void scatter_rows(const __grid_constant__ BucketRows<T> a) {
    const auto at = static_cast<offset_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= offset_t{a.places} * a.columns) return;
    const auto item = static_cast<index_t>(blockIdx.y), row = a.row(item, static_cast<index_t>(at / a.columns));
    if (row < 0) return;
    const T gate = a.gates ? a.gates[offset_t{row} * a.rows.resolutions + a.resolution] : T(1);
    a.all[row * a.all_stride + at % a.columns] = gate * a.bucket[item * offset_t{a.places} * a.columns + at];
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
