#pragma once

#include <polyattn/core/dropout.hpp>
#include <polyattn/core/view.hpp>
#include <polyattn/core/workspace.hpp>
#include <polyattn/plan/plan.hpp>
#include <polyattn/policy/diffusion/concept.hpp>

#include <optional>
#include <utility>

POLYATTN_BEGIN_NAMESPACE

/// What one call may set; nothing of it changes the layer.
struct CallOptions {
    /// Valid keys of each batch item; the keys behind are padding and have weight 0. Empty: all. Where there are other numbers of queries
    /// than keys, as in decoding with a cache, patterns and biases see each item's last valid query at its last valid key.
    std::vector<index_t> key_lengths = {};
    /// Valid queries of each batch item; the outputs behind are 0. Empty: as key_lengths if there are as many queries as keys
    /// (self-attention), else all. A query may be valid although the key at its position is padding: nobody attends to it, but a diffusion with
    /// teleport still mixes that row's own value into its output.
    std::vector<index_t> query_lengths = {};
    /// What samplers and dropout draw from.
    Draw draw = {};
    /// Applied by every call that sets it, operator() and into() as well: leave it at 0 for inference.
    Dropout dropout = {};
    /// Used instead of the pattern's and sampler's own.
    std::optional<Plan> plan = {};
    /// The same with a plan for each batch item, where items differ: graphs, draws of their own; or for each (batch, head), heads of an
    /// item one after the other.
    std::vector<Plan> item_plans = {};
    /// Scratch memory to reuse; one call at a time.
    Workspace* workspace = nullptr;
    /// Bytes that the stored weights of a head's tiles may take under diffusion and in backward; beyond, they are computed again. Weights
    /// of edges are always stored: one number an edge.
    std::size_t weight_budget = std::size_t{256} << 20;
    /// into() and forward_into() add to what the output holds (a residual connection); calls that return a tensor ignore it.
    bool accumulate = false;
};

namespace detail {

/// One of a plan for each batch item, or for each (batch, head).
template <class T>
const Plan& plan_of(std::span<const Plan> plans, const TensorView<T>& q, index_t b, index_t h) {
    return plans[static_cast<std::size_t>(plans.size() == static_cast<std::size_t>(q.batch()) ? b : b * q.heads() + h)];
}

/// The steps of a diffusion whose parameters are in range. Throws invalid_input.
template <class Diffusion>
Recursion checked_recursion(const Diffusion& diffusion) {
    validate(diffusion);
    const Recursion recursion = diffusion.recursion();
    const auto check = [](double factor) { require(is_finite(factor), "recursion", "finite factors", "one that is not"); };
    check(recursion.start);
    for (const Hop& hop : recursion.hops) {
        check(hop.walk);
        check(hop.teleport);
    }
    if constexpr (SaysHops<Diffusion>)
        require(std::cmp_equal(recursion.hops.size(), Diffusion::hops), "recursion", [] { return text(Diffusion::hops, " hops, as the policy says"); }, recursion.hops.size());
    return recursion;
}
inline void check_lengths(const std::vector<index_t>& lengths, index_t batch, index_t tokens, const char* argument) {
    if (lengths.empty()) return;
    require(lengths.size() == static_cast<std::size_t>(batch), argument, [&] { return text("one length for each of ", batch, " batch items"); }, lengths.size());
    for (const index_t length : lengths) require(length >= 0 && length <= tokens, argument, [&] { return text("lengths from 0 to ", tokens); }, length);
}

/// Throws invalid_input unless queries and keys are the same tokens, with no plan.
template <class T>
void check_self_attention(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) {
    require(q.dim() >= 1, "q", "a head dimension >= 1", q.dim());
    require(k.heads() > 0 && q.heads() % k.heads() == 0, "k", [&] { return text("a number of heads that divides q's ", q.heads()); }, k.heads());
    require_shape(k, {q.extents[0], k.extents[1], q.extents[2], q.extents[3]}, q.rank, "k");
    require_shape(v, {q.extents[0], k.extents[1], q.extents[2], v.extents[3]}, q.rank, "v");
    check_lengths(options.key_lengths, q.batch(), q.tokens(), "key_lengths");
    require(options.query_lengths.empty() || options.query_lengths == options.key_lengths, "query_lengths", "none, or the key_lengths", "others");
    require(!options.plan && options.item_plans.empty(), "plan", "none", "one");
}

}  // namespace detail

POLYATTN_END_NAMESPACE
