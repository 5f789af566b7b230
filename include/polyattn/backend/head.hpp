#pragma once
// What a backend computes: one (batch, head) of the stages scores -> weights -> diffusion, and its adjoint.

#include <polyattn/core/dropout.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/core/workspace.hpp>
#include <polyattn/plan/plan.hpp>
#include <polyattn/policy/bias/concept.hpp>
#include <polyattn/policy/diffusion/concept.hpp>
#include <polyattn/policy/score/kernel.hpp>

#include <bit>
#include <limits>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// Everything that defines the operator A of one head and the polynomial of it.
template <class T, class Bias>
struct Head {
    MatrixView<const T> q, k, v;
    const Plan* plan;
    const Recursion* recursion;
    const Bias* bias;  // bound
    double scale;      // of q . k
    index_t batch, head;
    index_t query_length, key_length;  // queries and keys behind these are padding
    DropoutMask dropout;
    std::size_t weight_budget;  // bytes of stored weights
    std::span<const MatrixView<const T>> next = {};  // what the head after this one reads and writes; a hint
};

/// The same for kernel scores. Queries see all keys, or, causal, those up to their own position.
template <class T, class Features>
struct KernelHead {
    MatrixView<const T> q, k, v;
    const Plan* plan;
    const Recursion* recursion;
    const Features* features;  // bound
    ZeroRow zero;
    double epsilon;
    bool causal;
    index_t batch, head;
    index_t query_length, key_length;
    DropoutMask dropout;
};

template <class T>
struct HeadResult {
    MatrixView<T> out;
    bool accumulate = false;   // add to what `out` holds
    T* logsumexp = nullptr;    // [queries], natural log; -inf for a row without keys
    T* hops = nullptr;         // Z_1 .. Z_K, [K][queries][value dim], for backward
    T* states = nullptr;       // what the operator itself keeps for backward
};

/// What the forward pass saved, in contiguous rows, and where gradients go.
template <class T>
struct HeadGradient {
    MatrixView<const T> d_out;
    const T* logsumexp;
    const T* hops;
    const T* states;
    MatrixView<T> d_q, d_k, d_v;      // written
    bool adds_to_keys;                // d_k and d_v hold sums of other heads of q, which are added to
    std::span<double> bias_gradient;  // added to; empty if the bias is not learned
};

/// Zeros to add to.
template <class T>
void start_gradients(const HeadGradient<T>& gradient) {
    fill_with_zeros(gradient.d_q);
    if (gradient.adds_to_keys) return;
    fill_with_zeros(gradient.d_k);
    fill_with_zeros(gradient.d_v);
}

/// -infinity, the mark of a row without keys, made and recognised by its bits: comparisons with it fold away under -ffast-math.
template <class T>
T empty_row() {
    if constexpr (sizeof(T) == 4) return std::bit_cast<float>(0xff800000u);
    else return std::bit_cast<double>(0xfff0000000000000u);
}
/// The mark of a row of kernel attention that is a mean: finite, and no inverse of a denominator. Signs of zeros are lost under -ffast-math.
template <class T>
constexpr T mean_row() {
    return std::numeric_limits<T>::lowest();
}
template <class T>
bool is_mean_row(T inverse) {
    return inverse == mean_row<T>();
}
inline bool is_empty_row(float logsumexp) { return std::bit_cast<std::uint32_t>(logsumexp) == 0xff800000u; }
inline bool is_empty_row(double logsumexp) { return std::bit_cast<std::uint64_t>(logsumexp) == 0xfff0000000000000u; }

}  // namespace detail

POLYATTN_END_NAMESPACE
