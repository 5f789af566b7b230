#pragma once
// What a policy is. A policy is a small value type that names its kind, `using policy_kind = sparsity_pattern_kind;`, and may
// offer `void validate() const`, which throws invalid_input for a parameter out of range (Attention calls it once, when it is
// built). The concept of each kind sits in policy/<kind>/concept.hpp. A type of one's own that models it works like ours.

#include <polyattn/core/config.hpp>

#include <concepts>
#include <type_traits>

POLYATTN_BEGIN_NAMESPACE

struct sparsity_pattern_kind {};
struct sampler_kind {};
struct diffusion_kind {};
struct score_kind {};
struct bias_kind {};
struct backend_kind {};

template <class P>
concept Policy = std::copy_constructible<P> && requires { typename P::policy_kind; };

template <class P, class Kind>
concept PolicyOf = Policy<P> && std::same_as<typename P::policy_kind, Kind>;

namespace detail {

template <class P>
void validate(const P& policy) {
    if constexpr (requires { policy.validate(); }) policy.validate();
}

}  // namespace detail

POLYATTN_END_NAMESPACE
