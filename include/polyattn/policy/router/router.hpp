#pragma once
// Which resolution a query attends to, in nn::AdaptiveMultiResolution.

#include <polyattn/core/error.hpp>
#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

struct router_kind {};

// Gates: how the router learns from the rows that it sent somewhere. P_i = softmax(router W q_i), h* the chosen resolution.

/// Not at all: argmax has no gradient.
struct Literal {};
/// The row is multiplied by P_ih*. Source: Fedus et al., "Switch transformers" (2021), equation 2.
struct Switch {};
/// The row stays as it is; the gradient is that of Switch. Source: Bengio et al., "Estimating or propagating gradients" (2013).
struct StraightThrough {};

/// Each query goes to the resolution with the highest probability, the first of equal ones. `balance` times H sum_h f_h mean_i P_ih is added to the loss,
/// f_h the share of queries at h (Switch transformers, equation 4). Source: AdaMRA (2021), equations 5 and 6.
template <class Gate = StraightThrough>
struct TopOne {
    static_assert(std::same_as<Gate, Literal> || std::same_as<Gate, Switch> || std::same_as<Gate, StraightThrough>, "polyattn: TopOne<Gate> needs Literal, Switch or StraightThrough");
    using policy_kind = router_kind;
    double balance = 0;
    void validate() const { detail::require_in_range(balance, 0, 1e3, "balance", "a weight from 0 to 1000"); }
};
/// Each query goes to a random resolution, a function of (seed, draw, row). The paper's ablation.
struct RandomRoute {
    using policy_kind = router_kind;
    std::uint64_t seed = 0;
};
/// Each query attends to all resolutions, whose outputs stand side by side.
struct ConcatenateAll {
    using policy_kind = router_kind;
};

namespace detail {

template <class R>
inline constexpr bool is_learned_router = false;
template <class Gate>
inline constexpr bool is_learned_router<TopOne<Gate>> = true;
template <class R>
concept RouterPolicy = is_learned_router<R> || std::same_as<R, RandomRoute> || std::same_as<R, ConcatenateAll>;

}  // namespace detail

POLYATTN_END_NAMESPACE
