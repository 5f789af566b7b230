#pragma once
// What every backend's layer shares: the policies, the plans that they make, and the checks of a call.

#include <polyattn/call_options.hpp>
#include <polyattn/core/parallel.hpp>
#include <polyattn/policy/pattern/concept.hpp>
#include <polyattn/policy/set.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// The policies of a layer, sorted by kind.
template <class Pattern, class Sampler, class Diffusion, class Score, class Bias>
class LayerPolicies {
public:
    template <class... Policies>
    explicit LayerPolicies(std::tuple<Policies...> policies)
        : pattern_(take<Pattern>(policies)), sampler_(take<Sampler>(policies)), diffusion_(take<Diffusion>(policies)), score_(take<Score>(policies)),
          bias_(take<Bias>(policies)), cache_(std::make_shared<PlanCache>()) {
        validate(pattern_);
        validate(sampler_);
        validate(score_);
        validate(bias_);
        recursion_ = checked_recursion(diffusion_);
    }

    const Pattern& pattern() const { return pattern_; }
    const Sampler& sampler() const { return sampler_; }
    const Diffusion& diffusion() const { return diffusion_; }
    const Bias& bias() const { return bias_; }
    const Recursion& recursion() const { return recursion_; }

    /// Which keys each query sees. The last 8 for other (queries, keys, draw of the sampler) are kept; copies of a layer share them.
    /// Throws invalid_input if the pattern does not exist for these numbers.
    Plan plan(index_t queries, index_t keys, const Draw& draw = {}) const {
        static_assert(!data_dependent, "polyattn: this pattern depends on q and k; the plans of a call are in forward().saved.plan(batch, head)");
        return cached_plan({queries, keys}, {queries, keys}, draw);
    }

    /// The plans of a call with a batch: one for all items, or one for each where the sampler draws per item or the options name them.
    /// Throws invalid_input.
    std::vector<Plan> plans(index_t batch, index_t queries, index_t keys, const CallOptions& options) const {
        static_assert(!data_dependent, "polyattn: this pattern depends on q and k; the plans of a call are in forward().saved.plan(batch, head)");
        check_lengths(options.key_lengths, batch, keys, "key_lengths");
        check_lengths(options.query_lengths, batch, queries, "query_lengths");
        const Plans found = plans_for(options, batch, 1, queries, keys);
        if (found.shared) return {*found.shared};
        return {found.items.begin(), found.items.end()};
    }

protected:
    static constexpr bool samples = !std::is_same_v<Sampler, AllSources>;
    static constexpr bool kernel = is_kernel<Score>;
    static constexpr bool data_dependent = DataDependentPattern<Pattern>;
    static constexpr bool positioned_bias = requires(const Bias& bias, index_t i) { bias.bind(i, i); };

    struct Valid {
        index_t queries, keys;
        friend bool operator==(const Valid&, const Valid&) = default;
    };
    struct PlanCache {
        static constexpr std::size_t capacity = 8;
        struct Key {
            Valid valid, all;
            Draw draw;
            friend bool operator==(const Key&, const Key&) = default;
        };
        std::mutex mutex;
        std::vector<std::pair<Key, Plan>> plans;
    };

    template <class P, class... Policies>
    static P take(std::tuple<Policies...>& policies) {
        if constexpr ((std::is_same_v<P, Policies> || ...)) return std::move(std::get<P>(policies));
        else return P{};
    }

    /// A V alone has any number of queries; everything else feeds outputs back as values.
    bool needs_square() const { return recursion_.hops.size() != 1 || recursion_.hops[0].teleport != 0; }

    template <class T>
    void check_shapes(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v) const {
        require(q.dim() >= 1, "q", "a head dimension >= 1", q.dim());
        require(k.heads() == q.heads() || (k.heads() > 0 && q.heads() % k.heads() == 0), "k",
                        [&] { return text("a number of heads that divides q's ", q.heads()); }, k.heads());
        require_shape(k, {q.extents[0], k.extents[1], k.extents[2], q.extents[3]}, q.rank, "k");
        require_shape(v, {q.extents[0], k.extents[1], k.extents[2], v.extents[3]}, q.rank, "v");
        if (needs_square() && q.tokens() != k.tokens())
            throw invalid_input("k", text("as many keys as queries for diffusion, ", q.tokens()), std::to_string(k.tokens()));
        if constexpr (requires { bias_.check_heads(q.heads()); }) bias_.check_heads(q.heads());
    }

    /// The pattern of the first `valid` of `all` queries and keys.
    Plan cached_plan(Valid valid, Valid all, const Draw& draw) const {
        const typename PlanCache::Key key{valid, all, samples ? draw : Draw{}};
        const std::lock_guard lock(cache_->mutex);
        for (const auto& [known, plan] : cache_->plans)
            if (known == key) return plan;
        Plan made = make_plan(valid, all, draw);
        if (cache_->plans.size() == PlanCache::capacity) cache_->plans.erase(cache_->plans.begin());
        cache_->plans.emplace_back(key, made);
        return made;
    }
    Plan make_plan(Valid valid, Valid all, const Draw& draw) const {
        if (is_empty_item(valid, all)) return PlanBuilder(all.queries, all.keys).build();
        if constexpr (!samples) return padded_plan(pattern_, valid.queries, valid.keys, all.queries, all.keys);
        else return thinned(padded_sample(sampler_, valid.queries, valid.keys, all.queries, all.keys, draw, is_causal<Pattern>()), valid);
    }
    /// Nobody who looks or nothing to see, in a batch that has both: patterns need not know plans without queries or keys.
    static bool is_empty_item(Valid valid, Valid all) { return valid != all && (valid.queries == 0 || valid.keys == 0); }
    Plan thinned(Plan sampled, Valid valid) const {
        if constexpr (std::is_same_v<Pattern, Dense>) return sampled;
        else return intersect(padded_plan(pattern_, valid.queries, valid.keys, sampled.queries(), sampled.keys()), sampled);
    }

    /// The plans of a call: `shared` by all batch items, or those of `items`, which are the caller's or drawn for this call.
    struct Plans {
        std::optional<Plan> shared;
        std::span<const Plan> items;
        std::vector<Plan> drawn;
        template <class T>
        const Plan& of(const TensorView<T>& q, index_t b, index_t h) const { return items.empty() ? *shared : plan_of(items, q, b, h); }
        bool same_for_heads(index_t batch) const { return items.empty() || items.size() == static_cast<std::size_t>(batch); }
    };
    Plans plans_for(const CallOptions& options, index_t batch, index_t heads, index_t queries, index_t keys) const {
        const auto check = [&](const Plan& plan, const char* argument) {
            if (plan.queries() != queries || plan.keys() != keys)
                throw invalid_input(argument, text(queries, " queries x ", keys, " keys"), text(plan.queries(), " x ", plan.keys()));
        };
        Plans plans;
        if (!options.item_plans.empty()) {
            require(!options.plan, "item_plans", "none beside plan", options.item_plans.size());
            const std::size_t given = options.item_plans.size();
            require(given == static_cast<std::size_t>(batch) || given == static_cast<std::size_t>(offset_t{batch} * heads), "item_plans",
                            [&] { return text("one for each of ", batch, " batch items, or of their ", heads, " heads"); }, given);
            for (const Plan& plan : options.item_plans) check(plan, "item_plans");
            plans.items = options.item_plans;
        } else if (options.plan) {
            check(*options.plan, "plan");
            plans.shared = *options.plan;
        } else if (draws_per_item()) {
            if constexpr (PerItemSampler<Sampler>) {
                const Valid all{queries, keys};
                const bool differ = positions_differ(options, queries, keys);
                for (index_t b = 0; b < batch; ++b) {
                    const Valid item = valid_of(options, b, queries, keys), placed = differ ? item : all;
                    plans.drawn.push_back(is_empty_item(placed, all) ? PlanBuilder(queries, keys).build()
                                                                     : thinned(extended(sampler_.sample_item(placed.queries, placed.keys, b, item.keys, options.draw, is_causal<Pattern>()), queries, keys), placed));
                }
            }
            plans.items = plans.drawn;
        } else if constexpr (!data_dependent) {
            if ((samples || !std::is_same_v<Pattern, Dense>) && positions_differ(options, queries, keys)) {
                for (index_t b = 0; b < batch; ++b) plans.drawn.push_back(cached_plan(valid_of(options, b, queries, keys), {queries, keys}, options.draw));
                plans.items = plans.drawn;
            } else plans.shared = plan(queries, keys, options.draw);
        }
        return plans;
    }
    /// With other numbers of queries than keys the last valid query of an item stands at its last valid key, wherever the padding begins.
    static bool positions_differ(const CallOptions& options, index_t queries, index_t keys) {
        const auto ragged = [](const std::vector<index_t>& lengths, index_t all) { return std::any_of(lengths.begin(), lengths.end(), [&](index_t length) { return length != all; }); };
        return queries != keys && (ragged(options.key_lengths, keys) || ragged(options.query_lengths, queries));
    }
    bool draws_per_item() const {
        if constexpr (PerItemSampler<Sampler>) return sampler_.draws_per_item();
        else return false;
    }

    template <class T>
    Plans check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) const {
        return check(q, k, v, options, [&] {
            std::vector<Plan> drawn(static_cast<std::size_t>(offset_t{q.batch()} * q.heads()));
            if constexpr (data_dependent)
                parallel_for(static_cast<offset_t>(drawn.size()), [&](offset_t item, int) {
                    const auto b = static_cast<index_t>(item / q.heads()), h = static_cast<index_t>(item % q.heads());
                    const Valid valid = valid_of(options, b, q.tokens(), k.tokens());
                    drawn[static_cast<std::size_t>(item)] = pattern_.plan_for(q.head(b, h), k.head(b, h / (q.heads() / k.heads())), valid.queries, valid.keys, options.draw);
                });
            return drawn;
        });
    }
    /// With plans_of_heads(): the plans of all (batch, head) of a pattern that depends on q and k.
    template <class T, class PlansOfHeads>
    Plans check(const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options, [[maybe_unused]] PlansOfHeads&& plans_of_heads) const {
        check_shapes(q, k, v);
        check_lengths(options.key_lengths, q.batch(), k.tokens(), "key_lengths");
        check_lengths(options.query_lengths, q.batch(), q.tokens(), "query_lengths");
        options.dropout.validate();
        if constexpr (kernel) {
            require(options.dropout.weights == 0, "dropout.weights", "0 with kernel scores, whose weights are never formed", options.dropout.weights);
            if (options.plan && options.plan->queries() == q.tokens() && options.plan->keys() == k.tokens())
                require(same_pairs(*options.plan, plan(q.tokens(), k.tokens())), "plan", "none with kernel scores, or the pattern's own", "one of other pairs");
            require(options.item_plans.empty(), "item_plans", "none with kernel scores", options.item_plans.size());
            require(!is_causal<Pattern>() || !positions_differ(options, q.tokens(), k.tokens()), "key_lengths", "all queries and keys where causal kernel scores have other numbers of queries than keys", "less");
        }
        Plans plans = plans_for(options, q.batch(), q.heads(), q.tokens(), k.tokens());
        if constexpr (data_dependent)
            if (!plans.shared && plans.items.empty()) {
                plans.drawn = plans_of_heads();
                plans.items = plans.drawn;
            }
        return plans;
    }

    static Valid valid_of(const CallOptions& options, index_t b, index_t queries, index_t keys) {
        const auto item = static_cast<std::size_t>(b);
        const index_t valid = options.key_lengths.empty() ? keys : options.key_lengths[item];
        return {!options.query_lengths.empty() ? options.query_lengths[item] : queries == keys ? valid : queries, valid};
    }

    /// What a score needs beside a head's q, k and v: the bound bias, or the bound feature map.
    template <class T>
    decltype(auto) bind(const TensorView<const T>& q, const TensorView<const T>& k) const {
        if constexpr (kernel) {
            auto bound = bind_features(score_.features, q.dim());
            if constexpr (has_directions<decltype(bound)> && is_causal<Pattern>())
                require(bound->fixed_shift < (sizeof(T) == 4 ? 80 : 700), "q", "a head dimension whose random features don't underflow in a causal layer (float: up to some 250)", q.dim());
            return bound;
        }
        else return bind_bias(bias_, q.tokens(), k.tokens());
    }
    /// That of each batch item: `first` of all, but where the positions of items differ.
    template <class Bound>
    struct BoundOfItems {
        Bound first;
        std::vector<std::remove_cvref_t<Bound>> items;
        const auto& of(index_t b) const { return items.empty() ? first : items[static_cast<std::size_t>(b)]; }
    };
    template <class T>
    auto bind_items(const TensorView<const T>& q, const TensorView<const T>& k, const CallOptions& options) const {
        BoundOfItems<decltype(bind(q, k))> bound{bind(q, k), {}};
        if constexpr (positioned_bias)
            if (positions_differ(options, q.tokens(), k.tokens()))
                for (index_t b = 0; b < q.batch(); ++b) {
                    const Valid valid = valid_of(options, b, q.tokens(), k.tokens());
                    bound.items.push_back(bias_.bind(valid.queries, valid.keys));
                }
        return bound;
    }
    /// What the states of start() take.
    static void check_recurrent(index_t batch, index_t heads, index_t key_heads, index_t dim, index_t value_dim) {
        require(batch >= 0, "batch", "a number >= 0", batch);
        require(heads >= 1, "heads", "a number >= 1", heads);
        require(key_heads >= 1 && heads % key_heads == 0, "key_heads", [&] { return text("a number that divides the ", heads, " heads"); }, key_heads);
        require(dim >= 1, "dim", "a head dimension >= 1", dim);
        require(value_dim >= 0, "value_dim", "a number of columns >= 0", value_dim);
    }
    index_t feature_count(index_t dim) const {
        if constexpr (requires { score_.features.count(dim); }) return score_.features.count(dim);
        else return dim;
    }

    Pattern pattern_;
    Sampler sampler_;
    Diffusion diffusion_;
    Score score_;
    Bias bias_;
    Recursion recursion_;
    std::shared_ptr<PlanCache> cache_;
};

}  // namespace detail

POLYATTN_END_NAMESPACE
