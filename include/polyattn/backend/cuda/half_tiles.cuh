#pragma once
// The softmax operator on tiles of half or bfloat16, for inference: both products on tensor cores, everything else in float. 4 warps, each with 16
// of a group's 64 queries, walk over 64 keys at a time. Fragments are those of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"): a thread
// has rows lane / 4 and lane / 4 + 8 of its warp's 16, and of each 8 columns numbers lane % 4 * 2 and the next one.

#include <polyattn/backend/cuda/sparse_softmax.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
inline constexpr bool has_tensor_cores = std::is_same_v<T, __half>;
inline constexpr int half_blocks = 2;  // of a multiprocessor with 64 KB of shared memory
#else
template <class T>
inline constexpr bool has_tensor_cores = true;
inline constexpr int half_blocks = 3;
#endif

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

struct FragmentSlots {
    static constexpr int count = 2;
    static __device__ int slot(int i) { return static_cast<int>(threadIdx.x) / 32 * 16 + lane_of_warp() / 4 + 8 * i; }
};

/// Four 8 x 8 matrices from shared memory; the row's address is that of lane % 8 of matrix lane / 8.
template <bool Transposed>
__device__ void load_fragments(unsigned (&to)[4], const void* row) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

/// sum += a b, 16 x 16 times 16 x 8.
template <class T>
__device__ void multiply_fragments(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    const auto step = [](float (&s)[4], unsigned x, unsigned y, unsigned z) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(x), "r"(y), "r"(z));
    };
    step(sum, a[0], a[1], b0);
    step(sum, a[2], a[3], b1);
#else
    if constexpr (std::is_same_v<T, __half>)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// The sign bit of each of two narrow numbers that is not finite: adding one to an exponent of all ones carries into it.
template <class T>
__device__ unsigned not_finite(unsigned pair) {
    constexpr unsigned exponents = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u, ones = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;
    return ((pair & exponents) + ones) & 0x80008000u;
}
/// Both numbers, or 0 for those that are not finite.
template <class T>
__device__ unsigned only_finite(unsigned pair) {
    return pair & ~((not_finite<T>(pair) >> 15) * 0xffffu);
}

/// Rows [begin, begin + side) of a sequence and columns [column, column + width) to shared memory; zeros from `end` and from `columns` on.
template <class T>
__device__ unsigned load_half_tile(T* to, const T* head, std::ptrdiff_t row_stride, Sequence tokens, index_t begin, index_t end, index_t column, index_t columns) {
    using S = TileShape<T>;
    constexpr int per_row = S::width / S::vector;
    const int c = static_cast<int>(threadIdx.x) % per_row * S::vector;
    unsigned odd = 0;
#pragma unroll
    for (int r = static_cast<int>(threadIdx.x) / per_row, turn = 0; turn < S::side / (tile_threads / per_row); ++turn, r += tile_threads / per_row) {
        uint4 words{};
        if (begin + r < end && column + c < columns) words = *reinterpret_cast<const uint4*>(head + tokens[begin + r] * row_stride + column + c);
        odd |= not_finite<T>(words.x) | not_finite<T>(words.y) | not_finite<T>(words.z) | not_finite<T>(words.w);
        *reinterpret_cast<uint4*>(to + r * S::stride + c) = words;
    }
    return odd;
}

/// s += q k^T over `depth` columns, a multiple of 16.
template <class T>
__device__ void score_fragments(float (&s)[8][4], const T* q, const T* k, int depth) {
    using S = TileShape<T>;
    const int lane = lane_of_warp();
    q += (static_cast<int>(threadIdx.x) / 32 * 16 + lane % 16) * S::stride + lane / 16 * 8;
    k += (lane / 16 * 8 + lane % 8) * S::stride + lane / 8 % 2 * 8;
#pragma unroll 2
    for (int c = 0; c < depth; c += 16) {
        unsigned a[4];
        load_fragments<false>(a, q + c);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned b[4];
            load_fragments<false>(b, k + 8 * j * S::stride + c);
            multiply_fragments<T>(s[j], a, b[0], b[1]);
            multiply_fragments<T>(s[j + 1], a, b[2], b[3]);
        }
    }
}

/// sum += p v. A sum of two products is the first operand of the next: p stays in registers.
template <class T>
__device__ void sum_fragments(float (&sum)[8][4], const unsigned (&p)[4][4], const T* v) {
    using S = TileShape<T>;
    const int lane = lane_of_warp();
    v += lane % 16 * S::stride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            unsigned b[4];
            load_fragments<true>(b, v + 16 * n * S::stride + 8 * j);
            multiply_fragments<T>(sum[j], p[n], b[0], b[1]);
            multiply_fragments<T>(sum[j + 1], p[n], b[2], b[3]);
        }
}

/// A warp's weights to its 16 rows of a tile in shared memory, [own][others], and back.
template <class T>
__device__ void store_weights(T* to, const unsigned (&p)[4][4]) {
    T* const row = to + FragmentSlots::slot(0) * TileShape<T>::stride + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) *reinterpret_cast<unsigned*>(row + i % 2 * 8 * TileShape<T>::stride + 16 * n + i / 2 * 8) = p[n][i];
    __syncwarp();
}
template <class T>
__device__ void load_weights(unsigned (&p)[4][4], const T* from) {
    __syncwarp();
    const T* const row = from + (static_cast<int>(threadIdx.x) / 32 * 16 + lane_of_warp() % 16) * TileShape<T>::stride + lane_of_warp() / 16 * 8;
#pragma unroll
    for (int n = 0; n < 4; ++n) load_fragments<false>(p[n], row + 16 * n);
}

/// sum += p v for the values that are not finite, of the pairs that allows(i, other) names. The rest of the rows keep their bits.
template <class T, class Allows>
__device__ void add_not_finite(float (&sum)[8][4], const T* p, const T* v, int others, Allows&& allows) {
    using S = TileShape<T>;
    const int column = lane_of_warp() % 4 * 2;
#pragma unroll 1
    for (int n = 0; n < others; ++n) {
        unsigned pairs[8], odd = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) odd |= not_finite<T>(pairs[j] = *reinterpret_cast<const unsigned*>(v + n * S::stride + 8 * j + column));
        if (odd == 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!allows(i, n)) continue;
            const float weight = widen(p[FragmentSlots::slot(i) * S::stride + n]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const unsigned which = not_finite<T>(pairs[j]);
                const float2 value = unpack<T>(pairs[j]);
                if (which & 0x8000u) sum[j][2 * i] += weight * value.x;
                if (which & 0x80000000u) sum[j][2 * i + 1] += weight * value.y;
            }
        }
    }
}

/// Over the four threads that share rows.
__device__ inline float largest_of_quad(float value) {
#pragma unroll
    for (int step = 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(~0u, value, step);
        value = other > value ? other : value;
    }
    return value;
}
__device__ inline float sum_of_quad(float value) {
    value += __shfl_xor_sync(~0u, value, 2);
    return value + __shfl_xor_sync(~0u, value, 1);
}

/// What apply_tiles<T, Bias, false> does. Half has few exponents: weights are times 2^headroom, so that those below 2^-28 of the largest, not
/// those below 2^-14, lose digits. In `highest` is then that much less than the highest score: any reference will do that sum and partial share.
template <class T, class Bias>
__global__ void __launch_bounds__(tile_threads, half_blocks) apply_tiles_half(const __grid_constant__ TileArguments<T, Bias> a) {
    if constexpr (has_tensor_cores<T>) {
        using S = TileShape<T>;
        constexpr float headroom = std::is_same_v<T, __half> ? 14 : 0, scale_up = std::is_same_v<T, __half> ? 16384 : 1;
        extern __shared__ __align__(16) unsigned char memory[];
        T* const own_rows = reinterpret_cast<T*>(memory);
        T* const other_rows = own_rows + S::buffer;  // then the weights, where they have to leave registers
        T* const value_rows = other_rows + S::buffer;
        __shared__ float totals[S::side];

        const Operator<T, Bias>& op = a.op;
        const DeviceGroup group = a.plan.groups[a.first_group + static_cast<index_t>(blockIdx.x)];
        const index_t item = op.first_item + static_cast<index_t>(blockIdx.y), b = item / op.q.heads;
        const index_t panel = (a.first_panel + static_cast<index_t>(blockIdx.z)) * S::width;
        const index_t own_length = op.query_lengths(b), other_length = op.key_lengths(b);
        const Sequence own_tokens{group.first, group.list < 0 ? nullptr : a.plan.lists + group.list};
        const int slot = FragmentSlots::slot(0), quad_lane = lane_of_warp() % 4, column = panel + quad_lane * 2;
        const auto active = [&](int i) { return (group.active >> (slot + 8 * i) & 1) != 0; };

        float sum[8][4], reference[2], total[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            reference[i] = lowest<float>();
            total[i] = 0;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[j][2 * i] = sum[j][2 * i + 1] = 0;
            if (!active(i)) continue;
            const offset_t row = offset_t{item} * op.queries + own_tokens[slot + 8 * i];
            if (!a.online) reference[i] = reference_of(op.logsumexp[row]) - headroom;
            else if (a.begins_state) {
                reference[i] = a.highest[row];
                total[i] = a.sum[row];
            }
            if (!a.continues) continue;
            const float unit = a.online ? 1 : scale_up;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (column + 8 * j >= a.value_columns) continue;
                const float2 before = *reinterpret_cast<const float2*>(a.partial + row * a.value_columns + column + 8 * j);
                sum[j][2 * i] = before.x * unit;
                sum[j][2 * i + 1] = before.y * unit;
            }
        }

        const T *const own_head = op.q.head(item), *const other_head = op.k.head(item), *const value_head = a.values.head(item);
        const bool one_load = op.dim <= S::width;
        if (one_load) load_half_tile(own_rows, own_head, op.q.row_stride, own_tokens, 0, group.count, 0, op.dim);
        for (index_t g = group.first_segment; g < group.last_segment; ++g) {
            const Segment segment = a.plan.segments[g];
            const DeviceTile tile = a.plan.tiles[segment.tile];
            const PairMask<T, false, FragmentSlots> mask(a.plan, tile, segment, group, own_tokens, own_length, other_length);
            for (index_t begin = segment.begin; begin < segment.end; begin += S::side) {
                float s[8][4] = {};
                unsigned odd = load_half_tile(value_rows, value_head, a.values.row_stride, mask.others(), begin, segment.end, panel, a.value_columns);
                for (index_t k = 0; k < op.dim; k += S::width) {
                    if (!one_load) load_half_tile(own_rows, own_head, op.q.row_stride, own_tokens, 0, group.count, k, op.dim);
                    load_half_tile(other_rows, other_head, op.k.row_stride, mask.others(), begin, segment.end, k, op.dim);
                    odd = static_cast<unsigned>(__syncthreads_or(static_cast<int>(odd)));
                    score_fragments(s, own_rows, other_rows, min(S::width, op.dim - k));
                    if (k + S::width < op.dim) __syncthreads();
                }
                const bool full = mask.is_full(segment, begin);
                constexpr bool plain = std::is_same_v<Bias, NoBias>;
                if constexpr (plain) {
#pragma unroll
                    for (int at = 0; at < 32; ++at) s[at / 4][at % 4] *= op.scale;
                }
                if (!plain || !full) {
#pragma unroll
                    for (int j = 0; j < 8; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int n = 8 * j + quad_lane * 2 + e;
                            const auto seen = mask.column(begin, n);
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                float& score = s[j][2 * i + e];
                                if (!mask.allows(i, seen)) score = minus_infinity<float>();
                                else if constexpr (!plain) score = op.score(score, item, own_tokens[slot + 8 * i], mask.others()[begin + n]);
                            }
                        }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (a.online) {
                        float most = s[0][2 * i];
#pragma unroll
                        for (int j = 0; j < 8; ++j) {
                            most = s[j][2 * i] > most ? s[j][2 * i] : most;
                            most = s[j][2 * i + 1] > most ? s[j][2 * i + 1] : most;
                        }
                        most = largest_of_quad(most) - headroom;
                        if (most > reference[i]) {
                            const float shrink = exp_base2(reference[i] - most);
                            total[i] *= shrink;
#pragma unroll
                            for (int j = 0; j < 8; ++j) {
                                sum[j][2 * i] *= shrink;
                                sum[j][2 * i + 1] *= shrink;
                            }
                            reference[i] = most;
                        }
                    }
                    float added = 0;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        added += s[j][2 * i] = exp_base2(s[j][2 * i] - reference[i]);
                        added += s[j][2 * i + 1] = exp_base2(s[j][2 * i + 1] - reference[i]);
                    }
                    if (a.online) total[i] += sum_of_quad(added);
                }
                unsigned p[4][4];
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) p[n][i] = pack<T>(s[2 * n + i / 2][i % 2 * 2], s[2 * n + i / 2][i % 2 * 2 + 1]);
                const bool selects = odd != 0 && !full;
                if (op.dropout.drops_weights() || selects) {
                    __syncthreads();  // all warps are done with the keys
                    store_weights(other_rows, p);
                    const int others = min(S::side, segment.end - begin), first = static_cast<int>(threadIdx.x) / 32 * 16;
                    if (op.dropout.drops_weights()) {
#pragma unroll 1
                        for (int own = first; own < min(first + 16, group.count); ++own) {
                            const int n = lane_of_warp() * 2;
                            unsigned& pair = *reinterpret_cast<unsigned*>(other_rows + own * S::stride + n);
                            float2 weights = unpack<T>(pair);
                            if (n < others) weights.x *= op.mask(item, own_tokens[own], mask.others()[begin + n]);
                            if (n + 1 < others) weights.y *= op.mask(item, own_tokens[own], mask.others()[begin + n + 1]);
                            pair = pack<T>(weights.x, weights.y);
                        }
                        load_weights(p, other_rows);
                    }
                    if (selects) {
                        add_not_finite(sum, other_rows, value_rows, others, [&](int i, int n) { return mask.allows(i, mask.column(begin, n)); });
                        __syncthreads();
#pragma unroll 1
                        for (int at = static_cast<int>(threadIdx.x); at < S::side * S::width / 2; at += tile_threads) {
                            unsigned& pair = *reinterpret_cast<unsigned*>(value_rows + at / (S::width / 2) * S::stride + at % (S::width / 2) * 2);
                            pair = only_finite<T>(pair);
                        }
                        __syncthreads();
                    }
                }
                sum_fragments(sum, p, value_rows);
                __syncthreads();
            }
        }

        // Sums to shared memory, in rows of 72 numbers: the first four of each 8 columns, then from 36 on the others. Reads and writes are free of conflicts.
        constexpr int stride = 72, second_half = 36;
        static_assert(S::side * stride * sizeof(float) <= 3 * S::buffer * sizeof(T));
        float* const rows = reinterpret_cast<float*>(memory);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float unit = a.online ? 1 : 1 / scale_up;
            if (a.online && active(i)) {
                const index_t token = own_tokens[slot + 8 * i];
                const offset_t row = offset_t{item} * op.queries + token;
                if (token >= own_length) total[i] = 0;
                if (!a.partial) unit = 1 / total[i];
                if (quad_lane == 0) {
                    totals[slot + 8 * i] = total[i];
                    if (a.stores_state && blockIdx.z == 0) {
                        if (a.partial) {
                            a.highest[row] = reference[i];
                            a.sum[row] = total[i];
                        } else op.logsumexp[row] = total[i] != 0 ? reference[i] + log_base2(total[i]) : minus_infinity<float>();
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float* const to = rows + (slot + 8 * i) * stride + quad_lane / 2 * second_half + 4 * j + quad_lane % 2 * 2;
                *reinterpret_cast<float2*>(to) = {sum[j][2 * i] * unit, sum[j][2 * i + 1] * unit};
            }
        }
        __syncthreads();
        constexpr int per_row = S::width / S::vector;
#pragma unroll 1
        for (int own = static_cast<int>(threadIdx.x) / per_row; own < group.count; own += tile_threads / per_row) {
            if (!(group.active >> own & 1)) continue;
            const int part = static_cast<int>(threadIdx.x) % per_row;
            const float4 x = *reinterpret_cast<const float4*>(rows + own * stride + 4 * part), y = *reinterpret_cast<const float4*>(rows + own * stride + second_half + 4 * part);
            const Vector<T> value{{x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w}};
            const index_t token = own_tokens[own], c = panel + part * S::vector;
            const offset_t row = offset_t{item} * op.queries + token;
            if (a.partial) {
                if (c < a.value_columns) store_numbers<T>(a.partial + row * a.value_columns + c, value);
                continue;
            }
            bool alive = token < own_length;
            if (alive) alive = a.online ? totals[own] != 0 : !is_empty(op.logsumexp[row]);
            a.finish.store(item, token, c, value, alive);
        }
    }
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
