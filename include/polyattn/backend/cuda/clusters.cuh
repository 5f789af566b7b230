#pragma once
// K-means on the device, for compressed keys and for groups of tokens: Lloyd's iterations in double and without contraction, so that clusters are those of the CPU.

#include <polyattn/backend/cuda/rows.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Rows of the clusters' dimension, and where the nearest centroid of each goes; the heads of a batch share those of its key heads evenly.
template <class T>
struct ClusteredRows {
    Rows<T> x;
    Lengths lengths;
    index_t heads, tokens;
    index_t* nearest;   // [items][tokens]
    double* distances;  // the same, or null
};

template <class T>
struct ClusterArguments {
    ClusteredRows<T> keys;
    index_t clusters, columns, first_item;
    index_t *order, *sizes, *starts;  // [items][tokens], [items][clusters], [items][clusters + 1]
    double* centroids;                // [items][clusters][columns]

    __device__ index_t item(unsigned block) const { return first_item + static_cast<index_t>(block); }
    __device__ index_t valid(index_t item) const { return keys.lengths(item / keys.heads); }
};

/// An entry of a row, in double.
template <class T>
__device__ double entry_of(const Rows<T>& rows, index_t item, index_t i, index_t c) {
    return double(widen(rows.head(item)[i * rows.row_stride + c]));
}

inline constexpr int cluster_threads = 256;

/// A centroid a warp: evenly spaced keys at `first`, then the mean of the cluster.
template <class T>
__global__ void __launch_bounds__(cluster_threads) find_centroids(const __grid_constant__ ClusterArguments<T> a, bool first) {
    const index_t item = a.item(blockIdx.y), n = a.valid(item), count = min(a.clusters, n), j = static_cast<index_t>((blockIdx.x * cluster_threads + threadIdx.x) / 32);
    if (j >= count) return;
    double* const centroid = a.centroids + (offset_t{item} * a.clusters + j) * a.columns;
    const index_t chosen = first ? static_cast<index_t>(offset_t{n} * j / count) : 0;
    const index_t* const order = a.order + offset_t{item} * a.keys.tokens;
    const index_t* const starts = a.starts + offset_t{item} * (a.clusters + 1);
    for (auto c = static_cast<index_t>(threadIdx.x % 32); c < a.columns; c += 32) {
        double sum = first ? entry_of(a.keys.x, item, chosen, c) : 0;
        if (!first)
            for (index_t at = starts[j]; at < starts[j + 1]; ++at) sum = __dadd_rn(sum, entry_of(a.keys.x, item, order[at], c));
        centroid[c] = first ? sum : __ddiv_rn(sum, double(starts[j + 1] - starts[j]));
    }
}

/// A row's nearest centroid, the first of equal ones, a row a thread.
template <class T>
__global__ void __launch_bounds__(cluster_threads) find_nearest(const __grid_constant__ ClusterArguments<T> a, const __grid_constant__ ClusteredRows<T> rows) {
    const index_t item = a.item(blockIdx.y), b = item / rows.heads, n = rows.lengths(b), i = static_cast<index_t>(blockIdx.x * cluster_threads + threadIdx.x);
    if (i >= n) return;
    const index_t key_item = b * a.keys.heads + item % rows.heads / (rows.heads / a.keys.heads), count = min(a.clusters, a.valid(key_item));
    const double* centroid = a.centroids + offset_t{key_item} * a.clusters * a.columns;
    index_t nearest = 0;
    double shortest = 0;
    for (index_t j = 0; j < count; ++j, centroid += a.columns) {
        double distance = 0;
        for (index_t c = 0; c < a.columns; ++c) {
            const double apart = __dsub_rn(entry_of(rows.x, item, i, c), centroid[c]);
            distance = __dadd_rn(distance, __dmul_rn(apart, apart));
        }
        if (j == 0 || distance < shortest) {
            shortest = distance;
            nearest = j;
        }
    }
    rows.nearest[offset_t{item} * rows.tokens + i] = nearest;
    if (rows.distances) rows.distances[offset_t{item} * rows.tokens + i] = shortest;
}

/// Keys by cluster, a head a block. What is rare, a cluster that runs empty and takes the farthest key, is done by one thread.
template <class T>
__global__ void __launch_bounds__(cluster_threads) sort_by_cluster(const __grid_constant__ ClusterArguments<T> a) {
    const index_t item = a.item(blockIdx.x), n = a.valid(item), count = min(a.clusters, n), thread = static_cast<index_t>(threadIdx.x);
    index_t* const cluster = a.keys.nearest + offset_t{item} * a.keys.tokens;
    index_t* const sizes = a.sizes + offset_t{item} * a.clusters;
    index_t* const starts = a.starts + offset_t{item} * (a.clusters + 1);
    for (index_t j = thread; j < count; j += cluster_threads) {
        index_t size = 0;
        for (index_t i = 0; i < n; ++i) size += cluster[i] == j;
        sizes[j] = size;
    }
    __syncthreads();
    if (thread == 0) {
        double* const distances = a.keys.distances + offset_t{item} * a.keys.tokens;
        for (index_t j = 0; j < count; ++j) {
            if (sizes[j] > 0) continue;
            index_t farthest = -1;
            for (index_t i = 0; i < n; ++i)
                if (sizes[cluster[i]] > 1 && (farthest < 0 || distances[i] > distances[farthest])) farthest = i;
            --sizes[cluster[farthest]];
            cluster[farthest] = j;
            distances[farthest] = 0;
            sizes[j] = 1;
        }
        starts[0] = 0;
        for (index_t j = 0; j < count; ++j) starts[j + 1] = starts[j] + sizes[j];
    }
    __syncthreads();
    index_t* const order = a.order + offset_t{item} * a.keys.tokens;
    for (index_t j = thread; j < count; j += cluster_threads) {
        index_t at = starts[j];
        for (index_t i = 0; i < n; ++i)
            if (cluster[i] == j) order[at++] = i;
    }
}

/// The clusters of all key heads of a call, in the call's scratch memory.
template <class T>
class DeviceClusters {
public:
    DeviceClusters() = default;
    /// At most `clusters` for each head, of `tokens` keys with padded `columns`; the cluster of each key goes to of_keys, [items][tokens]. The carver may only count.
    DeviceClusters(Carver& carver, index_t batch, index_t heads, index_t tokens, index_t clusters, index_t columns, index_t* of_keys) : batch_(batch) {
        const offset_t items = offset_t{batch} * heads;
        a_.keys.heads = heads;
        a_.keys.tokens = tokens;
        a_.keys.nearest = of_keys;
        a_.keys.distances = carver.template take<double>(items * tokens);
        a_.clusters = clusters;
        a_.columns = columns;
        a_.order = carver.template take<index_t>(items * tokens);
        a_.sizes = carver.template take<index_t>(items * clusters);
        a_.starts = carver.template take<index_t>(items * (clusters + 1));
        a_.centroids = carver.template take<double>(items * clusters * columns);
    }
    const index_t* cluster() const { return a_.keys.nearest; }
    const index_t* order() const { return a_.order; }    // keys by cluster, [items][tokens]
    const index_t* starts() const { return a_.starts; }  // where clusters begin in them, [items][clusters + 1]

    /// Clusters of the keys, KMeans::bind; and of other rows, if there are any, the nearest of the clusters' means.
    void find(const Rows<T>& keys, Lengths lengths, index_t iterations, cudaStream_t stream, const ClusteredRows<T>* others = nullptr) const {
        if (a_.clusters == 0) return;
        ClusterArguments<T> a = a_;
        a.keys.x = keys;
        a.keys.lengths = lengths;
        const auto find_means = [&](unsigned items, bool first) {
            launch("find_centroids", find_centroids<T>, dim3(blocks_for(a.clusters, cluster_threads / 32), items), cluster_threads, 0, stream, a, first);
        };
        const auto assign = [&](unsigned items, const ClusteredRows<T>& rows) {
            launch("find_nearest", find_nearest<T>, dim3(blocks_for(rows.tokens, cluster_threads), items), cluster_threads, 0, stream, a, rows);
        };
        for_each_grid(0, batch_ * a.keys.heads, [&](index_t item, unsigned items) {
            a.first_item = item;
            for (index_t iteration = 0; iteration <= iterations; ++iteration) {
                find_means(items, iteration == 0);
                assign(items, a.keys);
                launch("sort_by_cluster", sort_by_cluster<T>, dim3(items), cluster_threads, 0, stream, a);
            }
            if (others) find_means(items, false);
        });
        if (!others || others->tokens == 0) return;
        for_each_grid(0, batch_ * others->heads, [&](index_t item, unsigned items) {
            a.first_item = item;
            assign(items, *others);
        });
    }

private:
    index_t batch_ = 0;
    ClusterArguments<T> a_{};
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
