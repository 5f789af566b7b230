#pragma once
// Numbers as they lie in memory and as kernels compute with them: half and bfloat16 are only stored, all arithmetic on them is in float.

#include <polyattn/core/config.hpp>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// What sums, weights and states of tensors of T are made in.
template <class T>
struct arithmetic {
    using type = T;
};
template <>
struct arithmetic<__half> {
    using type = float;
};
template <>
struct arithmetic<__nv_bfloat16> {
    using type = float;
};
template <class T>
using arithmetic_t = typename arithmetic<T>::type;

/// Half or bfloat16.
template <class T>
inline constexpr bool is_narrow = !std::is_same_v<T, arithmetic_t<T>>;

/// Two narrow numbers, the first in the low bits. By the intrinsics: some programs turn the conversions of operators off.
template <class T>
__device__ unsigned pack(float first, float second) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(first, second);
        return reinterpret_cast<const unsigned&>(pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
        return reinterpret_cast<const unsigned&>(pair);
    }
}
template <class T>
__device__ float2 unpack(unsigned pair) {
    if constexpr (std::is_same_v<T, __half>) return __half22float2(reinterpret_cast<const __half2&>(pair));
    else return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <class T>
__device__ T narrow(arithmetic_t<T> value) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
    else if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
    else return value;
}

/// As many numbers as 16 bytes of T hold.
template <class T>
struct alignas(16) Vector {
    arithmetic_t<T> at[16 / sizeof(T)];
};
template <class T>
__device__ Vector<T> load_vector(const T* from) {
    if constexpr (is_narrow<T>) {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
        return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
    } else return *reinterpret_cast<const Vector<T>*>(from);
}
template <class T>
__device__ void store_vector(T* to, const Vector<T>& value) {
    if constexpr (is_narrow<T>) {
        const auto& v = value.at;
        *reinterpret_cast<uint4*>(to) = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
    } else *reinterpret_cast<Vector<T>*>(to) = value;
}

/// The same from and to memory in arithmetic type.
template <class T>
__device__ Vector<T> load_numbers(const arithmetic_t<T>* from) {
    if constexpr (is_narrow<T>) {
        const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    } else return load_vector(from);
}
template <class T>
__device__ void store_numbers(arithmetic_t<T>* to, const Vector<T>& value) {
    if constexpr (is_narrow<T>) {
        const auto& v = value.at;
        *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
        *reinterpret_cast<float4*>(to + 4) = {v[4], v[5], v[6], v[7]};
    } else store_vector(to, value);
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
