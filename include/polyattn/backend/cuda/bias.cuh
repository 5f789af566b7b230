#pragma once
// Biases as kernels see them: plain values and device memory. Own biases work if their call operator is POLYATTN_HOST_DEVICE and the type can be
// copied bit by bit.

#include <polyattn/backend/cuda/runtime.cuh>
#include <polyattn/policy/bias/bias.hpp>

#include <algorithm>
#include <memory>
#include <type_traits>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Sums of a learned bias's gradient: in fixed point, since integers may be added in any order. `scale` is a power of two for which no sum
/// of this call can exceed 62 bits.
struct BiasSums {
    unsigned long long* sums = nullptr;
    const double* scale = nullptr;
    __device__ void add(offset_t entry, double value) const { atomicAdd(sums + entry, static_cast<unsigned long long>(__double2ll_rn(value * *scale))); }
};

template <class B>
concept LearnedDeviceBias = requires(const B& bias, index_t i) { bias.entry(i, i, i, i); };

struct DeviceAlibi {
    const double* slopes;
    offset_t offset;
    __device__ double operator()(index_t, index_t head, index_t query, index_t key) const {
        const offset_t distance = query + offset - key;
        return -slopes[head] * static_cast<double>(distance < 0 ? -distance : distance);
    }
};
struct DeviceRelativePosition {
    const double* table;
    offset_t offset;
    index_t reach;
    __device__ offset_t entry(index_t, index_t head, index_t query, index_t key) const {
        const offset_t most = reach, distance = key - (query + offset);
        return head * (2 * most + 1) + (distance < -most ? -most : distance > most ? most : distance) + most;
    }
    __device__ double operator()(index_t b, index_t head, index_t query, index_t key) const { return table[entry(b, head, query, key)]; }
};
struct DeviceRelativePosition2D {
    const double* table;
    index_t width, reach;
    __device__ offset_t entry(index_t, index_t head, index_t query, index_t key) const {
        const auto within = [&](index_t distance) { return (distance < -reach ? -reach : distance > reach ? reach : distance) + reach; };
        const offset_t side = 2 * offset_t{reach} + 1;
        return (head * side + within(key / width - query / width)) * side + within(key % width - query % width);
    }
    __device__ double operator()(index_t b, index_t head, index_t query, index_t key) const { return table[entry(b, head, query, key)]; }
};
template <class Index>
struct DeviceTableBias {
    const double* table;
    index_t heads;
    Index index;  // its call operator must be POLYATTN_HOST_DEVICE
    offset_t rows;
    __device__ offset_t entry(index_t batch, index_t head, index_t query, index_t key) const {
        const auto row = static_cast<offset_t>(index(batch, query, key));
        if (row < 0 || row >= rows) __trap();  // the call that waits for the kernel throws
        return row * heads + head;
    }
    __device__ double operator()(index_t batch, index_t head, index_t query, index_t key) const { return table[entry(batch, head, query, key)]; }
};

/// A bias on the device and the memory that it refers to. Tables are copied at each call: they change between steps of training.
struct BiasMemory {
    Carver* carver;
    cudaStream_t stream;
    const double* put(const std::vector<double>& table) const {
        double* const to = carver->take<double>(static_cast<offset_t>(table.size()));
        if (to) check_cuda(cudaMemcpyAsync(to, table.data(), table.size() * sizeof(double), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync of a bias");
        return to;
    }
};
inline DeviceAlibi on_device(const Alibi& bias, index_t queries, index_t keys, BiasMemory memory) {
    return {memory.put(*bias.bind(queries, keys).slopes), offset_t{keys} - queries};
}
inline DeviceRelativePosition on_device(const RelativePosition& bias, index_t queries, index_t keys, BiasMemory memory) {
    return {memory.put(bias.table), offset_t{keys} - queries, bias.reach};
}
inline DeviceRelativePosition2D on_device(const RelativePosition2D& bias, index_t, index_t, BiasMemory memory) { return {memory.put(bias.table), bias.width, bias.reach}; }
template <class Index>
DeviceTableBias<Index> on_device(const TableBias<Index>& bias, index_t, index_t, BiasMemory memory) {
    return {memory.put(bias.table), bias.heads, bias.index, static_cast<offset_t>(bias.table.size()) / bias.heads};
}
template <class Bias>
auto on_device(const Bias& bias, index_t queries, index_t keys, BiasMemory) {
    const auto bound = bind_bias(bias, queries, keys);
    static_assert(std::is_trivially_copyable_v<decltype(bound)>, "polyattn: a bias of one's own for Cuda must be trivially copyable, with a POLYATTN_HOST_DEVICE call operator");
    static_assert(!LearnedBias<std::remove_const_t<decltype(bound)>> || LearnedDeviceBias<std::remove_const_t<decltype(bound)>>,
                  "polyattn: a learned bias of one's own for Cuda needs POLYATTN_HOST_DEVICE offset_t entry(batch, head, query, key) const, the entry of its gradient that a pair adds to");
    return bound;
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
